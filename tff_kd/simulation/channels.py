"""How scripts, workers and the fronts between them talk gRPC."""

import grpc

LOOPBACK = '127.0.0.1'
MAX_MESSAGE_MB = 2000
MESSAGE_OPTIONS = [
    (f'grpc.{name}', MAX_MESSAGE_MB * 1000 * 1000)
    for name in (
        'max_message_length',
        'max_receive_message_length',
        'max_send_message_length',
    )
]
CHANNEL_OPTIONS = [
    *MESSAGE_OPTIONS,
    # A worker that is back is found soon, and never through an old connection.
    ('grpc.use_local_subchannel_pool', 1),
    ('grpc.initial_reconnect_backoff_ms', 100),
    ('grpc.min_reconnect_backoff_ms', 1000),
    ('grpc.max_reconnect_backoff_ms', 1000),
]


def insecure_channel(address: str) -> grpc.Channel:
  """A channel without encryption, for this machine's own workers and tunnels."""
  return grpc.insecure_channel(address, CHANNEL_OPTIONS)
