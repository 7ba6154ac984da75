"""Federated knowledge distillation for Keras models, on TensorFlow Federated."""

from tff_kd import _lazy
from tff_kd import quiet

# Before anything here imports TensorFlow.
quiet.quiet_tensorflow()

# setup.cfg reads it from here.
__version__ = '0.2.0'

__getattr__, __dir__ = _lazy.attach(
    __name__,
    [
        'aggregators', 'algorithms', 'audits', 'client', 'communication', 'data',
        'evaluation', 'knowledge', 'losses', 'models', 'optimizers', 'own_files', 'plots',
        'privacy', 'quiet', 'rounds', 'runtime', 'server', 'simulation',
    ],
    {
        'compat': ['tff'],
        'client.conditions': ['ClientConditions', 'Reporting'],
        'client.label_skew': [
            'PriorCorrection', 'RestrictedSoftmax', 'VacantClassDistillation'
        ],
        'client.local_terms': [
            'LocalDistillation', 'NotTrueDistillation', 'ProximalTerm'
        ],
        'data.client_data': ['ClientBatches', 'FileClientData'],
        'data.transfer': ['TransferSet'],
        'rounds.description': ['DistillationProcess', 'StatefulClientsProcess'],
        'rounds.state': ['RoundState'],
        'server.settings': ['cosine_schedule', 'Distillation'],
    },
)
