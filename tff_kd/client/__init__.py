"""One client's part of a round: local training, companions and what is exchanged."""

from tff_kd import _lazy

__getattr__, __dir__ = _lazy.attach(
    __name__,
    {
        'exchanges': 'exchanges',
        'inclusion': 'inclusion',
        'work': 'work',
    },
)
