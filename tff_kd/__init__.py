"""Federated knowledge distillation for Keras models, on TensorFlow Federated."""

from tff_kd import _lazy

_MODULES = (
    'algorithms', 'arguments', 'certainty', 'client', 'client_data', 'client_names',
    'codecs', 'cohorts', 'communication', 'companions', 'conditions', 'data',
    'evaluation', 'generator', 'keras_models', 'knowledge', 'local_terms',
    'local_training', 'losses', 'models', 'mutual', 'optimizers', 'own_files', 'privacy',
    'robust', 'rounds', 'rules', 'runtime', 'server', 'server_distillation', 'simulation',
    'svd', 'transfer',
)

__getattr__, __dir__ = _lazy.attach(
    __name__,
    {
        **{name: name for name in _MODULES},
        'tff': 'compat',
        'ClientBatches': 'client_data',
        'ClientConditions': 'conditions',
        'Reporting': 'conditions',
        'FileClientData': 'client_data',
        'LocalDistillation': 'local_terms',
        'NotTrueDistillation': 'local_terms',
        'ProximalTerm': 'local_terms',
        'StatefulClientsProcess': 'rounds.description',
        'DistillationProcess': 'rounds.description',
        'RoundState': 'rounds.state',
        'cosine_schedule': 'server.settings',
        'Distillation': 'server.settings',
        'TransferSet': 'transfer',
    },
)
