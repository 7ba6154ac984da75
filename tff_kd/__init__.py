"""Federated knowledge distillation for Keras models, on TensorFlow Federated."""

from tff_kd import _lazy
from tff_kd import quiet

# Before anything here imports TensorFlow.
quiet.quiet_tensorflow()

# setup.cfg reads it from here.
__version__ = '0.2.0'

_MODULES = (
    'aggregators', 'algorithms', 'audits', 'client', 'communication', 'data',
    'evaluation', 'knowledge', 'losses', 'models', 'optimizers', 'own_files', 'plots',
    'privacy', 'quiet', 'rounds', 'runtime', 'server', 'simulation',
)

__getattr__, __dir__ = _lazy.attach(
    __name__,
    {
        **{name: name for name in _MODULES},
        'tff': 'compat',
        'ClientBatches': 'data.client_data',
        'ClientConditions': 'client.conditions',
        'Reporting': 'client.conditions',
        'FileClientData': 'data.client_data',
        'LocalDistillation': 'client.local_terms',
        'NotTrueDistillation': 'client.local_terms',
        'PriorCorrection': 'client.label_skew',
        'ProximalTerm': 'client.local_terms',
        'RestrictedSoftmax': 'client.label_skew',
        'VacantClassDistillation': 'client.label_skew',
        'StatefulClientsProcess': 'rounds.description',
        'DistillationProcess': 'rounds.description',
        'RoundState': 'rounds.state',
        'cosine_schedule': 'server.settings',
        'Distillation': 'server.settings',
        'TransferSet': 'data.transfer',
    },
)
