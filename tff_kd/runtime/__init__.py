"""Runtimes of TFF's computations: this process, Ray, or the worker that TFF ships."""

from tff_kd.runtime.devices import check_device
from tff_kd.runtime.in_process import AsyncInProcessContext
from tff_kd.runtime.in_process import in_process
from tff_kd.runtime.in_process import InProcessContext
from tff_kd.runtime.in_process import set_default
from tff_kd.runtime.in_process import tff_worker
from tff_kd.runtime.ray import check_ray
from tff_kd.runtime.ray import ray
from tff_kd.runtime.ray import RayContext
from tff_kd.runtime.ray_workers import NoWorkerError
from tff_kd.runtime.running import ComputationError

# TFF computes in this process, unless another context is set.
set_default()
