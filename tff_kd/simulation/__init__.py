"""Running processes: the training loop, who takes part, and what is kept."""

from tff_kd import _lazy

__getattr__, __dir__ = _lazy.attach(
    __name__,
    {
        name: name
        for name in (
            'callbacks', 'checkpoints', 'client_states', 'participation', 'trackers',
            'training',
        )
    }
    | {
        name: 'callbacks'
        for name in (
            'Callback', 'EarlyStopping', 'LearningRateSchedule', 'ProgressBar',
            'round_schedule', 'Training',
        )
    }
    | {name: 'checkpoints' for name in ('CheckpointError', 'Checkpoints')}
    | {name: 'client_states' for name in ('ClientStates', 'ClientStatesError')}
    | {name: 'participation' for name in ('Availability', 'Participation')}
    | {name: 'trackers' for name in ('MLflowTracker', 'WandbTracker')}
    | {
        name: 'training'
        for name in (
            'check_monitor', 'flatten_metrics', 'left_out', 'process_metric_names',
            'ROUND_SECONDS', 'train', 'TrainingResult',
        )
    },
)
