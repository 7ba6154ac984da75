"""Running processes: the training loop, who takes part, and what is kept."""

from tff_kd import _lazy

__getattr__, __dir__ = _lazy.attach(
    __name__,
    [
        'callbacks', 'checkpoints', 'client_states', 'participation', 'trackers',
        'training',
    ],
    {
        'callbacks': [
            'Callback', 'EarlyStopping', 'LearningRateSchedule', 'ProgressBar',
            'round_schedule', 'Training',
        ],
        'checkpoints': ['CheckpointError', 'Checkpoints'],
        'client_states': ['ClientStates', 'ClientStatesError'],
        'participation': ['Availability', 'Participation'],
        'trackers': ['MLflowTracker', 'WandbTracker'],
        'training': [
            'check_monitor', 'flatten_metrics', 'left_out', 'process_metric_names',
            'ROUND_SECONDS', 'train', 'TrainingResult',
        ],
    },
)
