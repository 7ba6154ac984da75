"""What an attacker learns from a model or a client's update, measured."""

from tff_kd import _lazy

__getattr__, __dir__ = _lazy.attach(
    __name__, {'inversion': 'inversion', 'membership': 'membership'}
)
