"""Where TFF's computations run: in this process, or on the worker that TFF ships."""

from tff_kd.runtime.in_process import AsyncInProcessContext
from tff_kd.runtime.in_process import ComputationError
from tff_kd.runtime.in_process import in_process
from tff_kd.runtime.in_process import InProcessContext
from tff_kd.runtime.in_process import set_default
from tff_kd.runtime.in_process import tff_worker

# From here on this process computes, unless another context is set.
set_default()
