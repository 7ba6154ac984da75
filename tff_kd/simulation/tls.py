"""Mutual TLS between scripts and workers: certificates, credentials, a front.

TFF's worker knows no encryption and takes commands from whoever connects. So on other
machines it stays reachable from its own machine only, and a front before it lets in
those that hold a certificate of the same authority.
"""

import concurrent.futures
import datetime
import os
import pathlib

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.oid import NameOID
import grpc

from tff_kd.simulation import channels

# All workers have this name, so that a certificate does for any host.
_SERVER_NAME = 'tff-kd-worker'
CLIENT_OPTIONS = [('grpc.ssl_target_name_override', _SERVER_NAME)]
WORKER_DIR, SCRIPT_DIR = 'worker', 'script'
_AUTHORITY, _CERTIFICATE, _KEY = 'authority.pem', 'certificate.pem', 'key.pem'
_SERVICE = '/tensorflow_federated.v0.ExecutorGroup/'
_NUM_THREADS = 64


def make_certificates(output_dir: os.PathLike, *, days: int = 365) -> None:
  """Makes the certificates of one group of workers and scripts.

  Writes two folders: `worker`, for the workers' machines, and `script`, for those that
  use them, each with the authority's certificate, its own, and its own private key,
  which only the owner of the files can read. The authority's key is not kept: nobody
  can make another certificate, and to shut one out means to make all anew.

  Args:
    output_dir: A folder that holds neither of the two yet.
    days: How long the certificates are valid.

  Raises:
    FileExistsError: If there is one of the folders.
  """
  output_dir = pathlib.Path(output_dir)
  output_dir.mkdir(parents=True, exist_ok=True)
  for folder in (WORKER_DIR, SCRIPT_DIR):
    if (output_dir / folder).exists():
      raise FileExistsError(
          f'{output_dir / folder} is there already; its certificates are kept. Name '
          'another folder, or remove it.'
      )
  authority_key = ec.generate_private_key(ec.SECP256R1())
  authority_name = _name('tff-kd authority')
  authority = (
      _builder(authority_name, authority_name, authority_key, days)
      .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
      .add_extension(
          x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key()),
          critical=False,
      )
      .add_extension(_usage(signs_certificates=True), critical=True)
      .sign(authority_key, hashes.SHA256())
  )
  for folder, subject, usage in (
      (WORKER_DIR, _SERVER_NAME, ExtendedKeyUsageOID.SERVER_AUTH),
      (SCRIPT_DIR, 'tff-kd-script', ExtendedKeyUsageOID.CLIENT_AUTH),
  ):
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _builder(_name(subject), authority_name, key, days)
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(subject)]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(
                authority_key.public_key()
            ),
            critical=False,
        )
        .sign(authority_key, hashes.SHA256())
    )
    path = output_dir / folder
    path.mkdir(mode=0o700)
    pem = serialization.Encoding.PEM
    (path / _AUTHORITY).write_bytes(authority.public_bytes(pem))
    (path / _CERTIFICATE).write_bytes(certificate.public_bytes(pem))
    secret = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with open(os.open(path / _KEY, os.O_WRONLY | os.O_CREAT, 0o600), 'wb') as file:
      file.write(secret)


def _name(name: str) -> x509.Name:
  return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
  now = datetime.datetime.now(datetime.timezone.utc)
  return (
      x509.CertificateBuilder()
      .subject_name(subject)
      .issuer_name(issuer)
      .public_key(key.public_key())
      .serial_number(x509.random_serial_number())
      # The machines' clocks may differ.
      .not_valid_before(now - datetime.timedelta(days=1))
      .not_valid_after(now + datetime.timedelta(days=days))
  )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
  return x509.KeyUsage(
      digital_signature=not signs_certificates,
      content_commitment=False,
      key_encipherment=False,
      data_encipherment=False,
      key_agreement=False,
      key_cert_sign=signs_certificates,
      crl_sign=signs_certificates,
      encipher_only=False,
      decipher_only=False,
  )


def _read(tls_dir: os.PathLike) -> list[bytes]:
  """The authority's certificate, the key and the certificate of a folder."""
  found = []
  for name in (_AUTHORITY, _KEY, _CERTIFICATE):
    path = pathlib.Path(tls_dir) / name
    if not path.is_file():
      raise FileNotFoundError(
          f'There is no {path}. `python -m pipelines.certificates --output_dir=DIR` '
          f'makes it: DIR/{WORKER_DIR} is for workers, DIR/{SCRIPT_DIR} for scripts.'
      )
    found.append(path.read_bytes())
  return found


def channel_credentials(tls_dir: os.PathLike) -> grpc.ChannelCredentials:
  """What a script shows, and expects of a worker.

  Args:
    tls_dir: The folder for scripts that `make_certificates` has made.

  Raises:
    FileNotFoundError: If it lacks a file.
  """
  return grpc.ssl_channel_credentials(*_read(tls_dir))


def serve(address: str, tls_dir: os.PathLike, backend: grpc.Channel) -> grpc.Server:
  """Starts a front that lets certified scripts through to a worker.

  Args:
    address: `host:port` to listen on.
    tls_dir: The folder for workers that `make_certificates` has made.
    backend: To the worker.

  Returns:
    The server, started.

  Raises:
    FileNotFoundError: If the folder lacks a file.
    RuntimeError: If the address is taken.
  """
  authority, key, certificate = _read(tls_dir)
  server = grpc.server(
      concurrent.futures.ThreadPoolExecutor(_NUM_THREADS),
      handlers=[_Forward(backend)],
      # Two fronts on one port would each get some of the calls.
      options=[*channels.MESSAGE_OPTIONS, ('grpc.so_reuseport', 0)],
  )
  server.add_secure_port(
      address,
      grpc.ssl_server_credentials(
          [(key, certificate)], authority, require_client_auth=True
      ),
  )
  server.start()
  return server


class _Forward(grpc.GenericRpcHandler):
  """Passes the calls of TFF's service on as they are, and their answers back."""

  def __init__(self, backend: grpc.Channel):
    self._backend = backend

  def service(self, handler_call_details):
    method = handler_call_details.method
    if not method.startswith(_SERVICE):
      return None
    forward = self._backend.unary_unary(method)

    def handle(request: bytes, context: grpc.ServicerContext) -> bytes:
      call = forward.future(request)
      # Also when the script's deadline has passed.
      context.add_callback(call.cancel)
      try:
        return call.result()
      except grpc.RpcError as error:
        context.abort(error.code(), error.details())
      except grpc.FutureCancelledError:
        context.abort(grpc.StatusCode.CANCELLED, 'The script is gone.')

    return grpc.unary_unary_rpc_method_handler(handle)
