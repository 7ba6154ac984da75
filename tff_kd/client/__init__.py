"""One client's part of a round: local training, companions and what is exchanged."""

from tff_kd import _lazy

__getattr__, __dir__ = _lazy.attach(
    __name__,
    [
        'class_counts', 'companions', 'conditions', 'exchanges', 'inclusion',
        'label_skew', 'local_terms', 'local_training', 'prototypes', 'work',
    ],
)
