"""A round as one federated computation, composed of its stages."""

from tff_kd import _lazy

__getattr__, __dir__ = _lazy.attach(
    __name__,
    [
        'arguments', 'channels', 'checks', 'description', 'options', 'parts', 'process',
        'protection', 'round', 'round_arguments', 'state',
    ],
    {
        'channels': ['AggregationFactory'],
        'description': ['DistillationProcess', 'StatefulClientsProcess'],
        'options': ['ClientTraining', 'Options', 'takes_options'],
        'parts': ['ClientModel', 'Parts'],
        'process': ['compose_process'],
        'state': ['RoundState'],
    },
)
