"""Differential privacy, its accounts, and secure sums."""

from tff_kd import _lazy

__getattr__, __dir__ = _lazy.attach(
    __name__,
    {name: name for name in ('accounting', 'differential', 'secure')}
    | {
        name: 'accounting'
        for name in (
            'ClientSampling', 'composed_noise', 'find_noise_multiplier',
            'PrivacyAccountant',
        )
    }
    | {name: 'differential' for name in ('build_accountant', 'DifferentialPrivacy')}
    | {'SecureAggregation': 'secure'},
)
