"""Aggregation factories beside those of TFF: Byzantine-robust means, truncated SVD."""

from tff_kd import _lazy

__getattr__, __dir__ = _lazy.attach(__name__, ['robust', 'svd'])
