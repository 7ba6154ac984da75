"""A round as one federated computation, composed of its stages."""

from tff_kd import _lazy

__getattr__, __dir__ = _lazy.attach(
    __name__,
    {
        'arguments': 'arguments',
        'channels': 'channels',
        'process': 'process',
        'protection': 'protection',
        'round': 'round',
        'round_arguments': 'round_arguments',
        'state': 'state',
        'options': 'options',
        'parts': 'parts',
        'checks': 'checks',
        'description': 'description',
        'ClientModel': 'parts',
        'AggregationFactory': 'channels',
        'Options': 'options',
        'Parts': 'parts',
        'takes_options': 'options',
        'compose_process': 'process',
        'DistillationProcess': 'description',
        'StatefulClientsProcess': 'description',
        'RoundState': 'state',
    },
)
