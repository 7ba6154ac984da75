"""Tasks (one file each) and how their examples are split over clients."""

from tff_kd import _lazy
from tff_kd.data import partition
from tff_kd.data import tasks
from tff_kd.data.tasks import task_info
from tff_kd.data.tasks import TASKS

__getattr__, __dir__ = _lazy.attach(
    __name__,
    {
        'augmentation': 'augmentation',
        'RandomShift': 'augmentation',
        **{
            name: name
            for name in ('client_data', 'client_names', 'raw_files', 'transfer')
        },
        **{
            name: 'task'
            for name in (
                'client_dataset', 'Examples', 'image_task', 'Task', 'task_from_clients'
            )
        },
    },
)
