"""Auxiliary client-side components: private mentors, generators, certainty scores."""

from tff_kd import _lazy

__getattr__, __dir__ = _lazy.attach(
    __name__,
    [
        'certainty', 'companion', 'contrast', 'control_variates', 'density',
        'dynamic_regularizer', 'generator', 'mutual',
    ],
    {
        'companion': [
            'Attachment', 'Beginning', 'ClientExamples', 'ClientState', 'Companion',
            'CompanionValues', 'Observer',
        ],
    },
)
