"""Tasks (one file each) and how their examples are split over clients."""

from tff_kd import _lazy
from tff_kd.data import partition
from tff_kd.data import tasks
from tff_kd.data.tasks import TASKS
from tff_kd.data.tasks import task_info

__getattr__, __dir__ = _lazy.attach(
    __name__,
    {
        name: 'task'
        for name in (
            'client_dataset', 'Examples', 'image_task', 'Task', 'task_from_clients'
        )
    },
)
