"""Tasks (one file each) and how their examples are split over clients."""

from tff_kd import _lazy
from tff_kd.data import partition
from tff_kd.data import tasks
from tff_kd.data.tasks import task_info
from tff_kd.data.tasks import TASKS

__getattr__, __dir__ = _lazy.attach(
    __name__,
    ['augmentation', 'client_data', 'client_names', 'raw_files', 'transfer'],
    {
        'augmentation': ['RandomShift'],
        'task': ['client_dataset', 'Examples', 'image_task', 'Task', 'task_from_clients'],
    },
)
