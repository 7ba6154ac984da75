"""The ledger of bytes, by hand and against what crosses TFF's wire."""

import numpy as np
import pytest
from tff_kd.compat import tff

import tff_kd
from tests import helpers
from tff_kd import communication

_PREFIX = 'client_work/participation/'
_EACH = communication.RoundBytes(
    down_student=1000, down_round=4, up_model=1000, up_knowledge=200
)


def _metrics(num_clients, **counts):
  return {
      f'{_PREFIX}num_clients': num_clients,
      f'{_PREFIX}num_included': num_clients,
      **{_PREFIX + name: value for name, value in counts.items()},
  }


def test_all_clients_move_all_channels():
  assert communication.ledger(_EACH, _metrics(5)) == {
      'bytes/down_student': 5000, 'bytes/down_round': 20, 'bytes/up_model': 5000,
      'bytes/up_knowledge': 1000, 'bytes/client': 2204,
  }


def test_what_did_not_arrive_was_not_sent():
  metrics = {
      **_metrics(5, num_dropped_after_training=2),
      'participation/num_chosen': 8, 'participation/num_dropped_before_training': 2,
  }
  found = communication.ledger(_EACH, metrics)
  assert found['bytes/down_student'] == 6 * 1000  # Late ones have got theirs, too.
  assert found['bytes/up_model'] == 3 * 1000
  assert found['bytes/client'] == 2204


def test_a_round_of_nobody_moves_nothing():
  assert not any(communication.ledger(_EACH, _metrics(0)).values())


def test_codes_count_as_long_as_they_were():
  metrics = {
      **_metrics(4, num_included=3, knowledge_bits=480),
      'aggregator/model/numbers_sent': np.float32(50),
      'aggregator/model/num_senders': np.float32(3),
  }
  found = communication.ledger(_EACH, metrics)
  assert found['bytes/up_knowledge'] == 60
  assert found['bytes/up_model'] == 3 * 50 * 4
  assert found['bytes/client'] == 1004 + (60 + 600) / 4


# One of predictions only is in `contract_test`, too.
@pytest.mark.parametrize('name', ['fed_avg', helpers.slow('cfd'), 'fed_kd'])
def test_rounds_have_a_ledger(name, tmp_path):
  parts = dict(
      transfer_set=lambda: tff_kd.TransferSet(helpers.examples(12, 9)[0]),
      mentor_fn=lambda: helpers.dense_fn((4,)),
  )
  batches = helpers.batches([helpers.examples(6, k) for k in range(4)], num_epochs=1)
  process = helpers.build_with_parts(
      name, parts, student_fn=helpers.dense_fn((30,)), client_data=batches,
      input_spec=batches.element_spec,
  )
  states = None
  if isinstance(process, tff_kd.StatefulClientsProcess):
    states = tff_kd.simulation.ClientStates(
        process.initialize_client(), tmp_path / 'states'
    )
  result = tff_kd.simulation.train(
      process, select_clients=lambda round_num: [0, 1, 3], num_rounds=2,
      client_states=states,
  )
  each = communication.round_bytes(process)
  for row in result.history:
    moved = {k: v for k, v in row.items() if k.startswith('bytes/')}
    assert sum(moved.values()) - moved['bytes/client'] == pytest.approx(
        3 * moved['bytes/client']
    )
    if name == 'fed_avg':
      assert moved['bytes/client'] == each.total
    if name == 'cfd':
      assert moved['bytes/up_knowledge'] == row[f'{_PREFIX}knowledge_bits'] / 8
    if name == 'fed_kd':
      assert moved['bytes/up_model'] < 3 * each.up_model
      assert moved['bytes/down_student'] == 3 * each.down_student


@pytest.mark.parametrize(
    'factory, expected',
    [
        (tff.aggregators.MeanFactory(), 4 * (60 + 3) + 4),
        # 60 numbers of 4 bits in integers of 28, and their range; 3 floats.
        (
            tff.aggregators.MeanFactory(
                tff.aggregators.EncodedSumFactory.quantize_above_threshold(4, 10)
            ),
            4 * (60 / 7 // 1 + 1) + 8 + 4 * 3 + 4,
        ),
        # A count of those left out, too.
        (tff_kd.aggregators.robust.NormBoundFactory(1.0), 4 * (60 + 3) + 4 + 4),
        # The weight goes with the value, and the numbers of arrays that are not finite.
        (tff_kd.aggregators.robust.TrimmedMeanFactory(3), 4 * (60 + 3) + 4 + 3 * 8),
        # Integers of 64 bits, where the sums need them.
        (
            tff.aggregators.MeanFactory(
                tff.aggregators.SecureSumFactory(1.0, -1.0),
                tff.aggregators.SecureSumFactory(100.0, 0.0),
            ),
            None,
        ),
    ],
)
def test_what_is_aggregated_counts_as_it_is_encoded(factory, expected):
  value_type = tff.to_type([(np.float32, (6, 10)), (np.float32, (3,))])
  process = factory.create(value_type, tff.TensorType(np.float32))
  found = communication.aggregated_bytes(process)
  if expected is None:
    assert 4 * 64 <= found <= 8 * 64 + 64
  else:
    assert found == expected


def test_a_channels_own_aggregator_tells_its_bytes():
  plain, own = (
      helpers.build('fed_avg', student_fn=helpers.dense_fn((50,)), model_aggregator=its)
      for its in (
          None,
          tff.aggregators.MeanFactory(
              tff.aggregators.EncodedSumFactory.quantize_above_threshold(8, 100)
          ),
      )
  )
  plain, own = communication.round_bytes(plain), communication.round_bytes(own)
  assert own.down == plain.down
  assert own.up_model < 0.6 * plain.up_model
