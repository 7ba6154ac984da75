"""Tasks (one file each) and how their examples are split over clients."""

from tff_kd.data import idx
from tff_kd.data import mnist5k
from tff_kd.data import partition
from tff_kd.data.tasks import client_dataset
from tff_kd.data.tasks import Examples
from tff_kd.data.tasks import Task

# Flag value -> the function that loads it. A new task is one file and one line.
TASKS = {
    'idx': idx.load,
    'mnist5k': mnist5k.load,
}
