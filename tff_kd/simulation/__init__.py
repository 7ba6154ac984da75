"""Running processes: TFF's runtime and the training loop."""

from tff_kd.simulation.runtime import build_async_context
from tff_kd.simulation.runtime import local_runtime
