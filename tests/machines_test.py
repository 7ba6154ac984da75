"""Workers in other network namespaces, where these may be made."""

import subprocess
import sys

import numpy as np
import pytest

from tests import helpers
from tests import two_machines
from tff_kd.simulation import tls

_OWN_NETWORK = [
    'unshare', '--user', '--map-root-user', '--net', '--pid', '--fork', '--kill-child',
    '--mount-proc',
]


# Five starts of Python, and a look at all ports; rounds over workers, and certificates,
# are in `several_workers_test` and `faults_test`, too.
@pytest.mark.slow
@pytest.mark.skipif(
    not helpers.is_allowed(*_OWN_NETWORK, 'ip', 'link', 'add', 'type', 'veth'),
    reason='network namespaces may not be made here',
)
def test_two_machines_are_as_one(tmp_path):
  certificates, path = tmp_path / 'certificates', tmp_path / 'weights.npz'
  tls.make_certificates(certificates)
  subprocess.run(
      [*_OWN_NETWORK, sys.executable, '-m', 'tests.two_machines', certificates, path],
      cwd=helpers.ROOT, check=True, timeout=300,
  )
  found = dict(np.load(path))
  # Both took part, and of each only the port with certificates is open.
  assert (found.pop('traffic') > 10_000).all()
  np.testing.assert_array_equal(found.pop('ports'), [[8000], [8000]])
  expected = two_machines.final_weights()
  assert found.keys() == expected.keys() and len(found) > 20
  for name, its in expected.items():
    np.testing.assert_allclose(found[name], its, atol=1e-6, err_msg=name)
