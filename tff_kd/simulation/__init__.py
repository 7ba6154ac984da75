"""Running processes: TFF's runtime and the training loop."""

from tff_kd.simulation.runtime import build_async_context
from tff_kd.simulation.runtime import local_runtime
from tff_kd.simulation.training import check_monitor
from tff_kd.simulation.training import flatten_metrics
from tff_kd.simulation.training import process_metric_names
from tff_kd.simulation.training import train
from tff_kd.simulation.training import TrainingResult
from tff_kd.simulation.training import ROUND_SECONDS
