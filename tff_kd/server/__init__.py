"""The server's part of a round: the student's update and the distillation."""

from tff_kd import _lazy

__getattr__, __dir__ = _lazy.attach(
    __name__, ['calibration', 'distill', 'finalizer', 'settings']
)
