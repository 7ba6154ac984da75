"""Attacks that measure what a model or a client's update reveals."""

from tff_kd import _lazy

__getattr__, __dir__ = _lazy.attach(__name__, ['inversion', 'membership'])
