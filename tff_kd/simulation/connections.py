"""Connections to workers on other machines (`pipelines.worker`), or to tunnels' ends."""

import ipaddress
import os
import socket
from typing import Optional

import grpc
from tff_kd.compat import tff

from tff_kd.simulation import channels
from tff_kd.simulation import tls
from tff_kd.simulation import transport

_CONNECT_TIMEOUT_S = 10.0


class RemoteWorker:
  """A worker at an address, for `several_workers.remote_runtime`.

  Attributes:
    name: Its address.
    traffic: What has crossed so far.
  """

  def __init__(
      self,
      address: str,
      *,
      tls_dir: Optional[os.PathLike] = None,
      allow_open: bool = False,
      silence_s: float = transport.SILENCE_S,
  ):
    """Initializes the worker; does not connect.

    Args:
      address: `host:port`.
      tls_dir: A folder that `tls.make_certificates` has made for scripts; then the
        connection is encrypted, and each side makes sure of the other. Without it the
        address must be of this machine, as the end of an SSH tunnel is.
      allow_open: Whether an address elsewhere may do without.
      silence_s: After so many seconds without an answer the worker is lost.

    Raises:
      ValueError: If the address is none, or is elsewhere without `tls_dir`.
      FileNotFoundError: If the folder lacks a certificate.
    """
    self.name = address
    self.traffic = transport.Traffic()
    self._silence_s = silence_s
    self._connection: Optional[transport.Connection] = None
    host = _check_address(address)
    self._credentials = None
    if tls_dir is not None:
      self._credentials = tls.channel_credentials(tls_dir)
    elif not allow_open and not _is_here(host):
      raise ValueError(
          f'The worker {address} is on another machine, and without certificates '
          'everything would go there open, and come from whoever answers. Give the '
          'folder of certificates (--tls_dir), or the end of an SSH tunnel on this '
          'machine; in a network that you trust, --allow_open.'
      )

  def _connect(self) -> transport.Connection:
    if self._credentials is None:
      channel = channels.insecure_channel(self.name)
    else:
      options = [*channels.CHANNEL_OPTIONS, *tls.CLIENT_OPTIONS]
      channel = grpc.secure_channel(self.name, self._credentials, options)
    return transport.Connection(
        self.name, channel, self.traffic, silence_s=self._silence_s
    )

  def executor_factory(self) -> tff.framework.ExecutorFactory:
    """Connects anew.

    Raises:
      transport.WorkerLostError: If it does not answer.
    """
    self.close()
    self._connection = self._connect()
    reason = self._connection.why_silent(_CONNECT_TIMEOUT_S, wait=True)
    if reason is not None:
      raise transport.WorkerLostError(self.name, reason)
    return self._connection.executor_factory()

  def why_silent(self, timeout_s: float) -> Optional[str]:
    """Why it does not answer, over a connection of its own; `None` if it does."""
    connection = self._connect()
    try:
      return connection.why_silent(timeout_s)
    finally:
      connection.close()

  def close(self) -> None:
    """Ends the connection."""
    if self._connection is not None:
      self._connection.close()
      self._connection = None


def _check_address(address: str) -> str:
  host, colon, port = address.rpartition(':')
  if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
    raise ValueError(
        f'A worker is named as host:port, for example 127.0.0.1:8000, found {address!r}.'
    )
  return host.strip('[]')


def _is_here(host: str) -> bool:
  try:
    found = socket.getaddrinfo(host, None)
  except OSError as error:
    raise ValueError(f'The host {host!r} of a worker is not known: {error}.') from error
  return all(ipaddress.ip_address(its[4][0]).is_loopback for its in found)
