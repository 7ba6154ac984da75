"""Differential privacy, its accounts, and secure sums."""

from tff_kd import _lazy

__getattr__, __dir__ = _lazy.attach(
    __name__,
    ['accounting', 'differential', 'secure'],
    {
        'accounting': [
            'ClientSampling', 'composed_noise', 'find_noise_multiplier',
            'PrivacyAccountant',
        ],
        'differential': ['build_accountant', 'DifferentialPrivacy'],
        'secure': ['SecureAggregation'],
    },
)
