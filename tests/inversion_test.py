"""Inversion of predictions: where they tell the input, and where they do not."""

import numpy as np
import pytest

from tff_kd.audits import inversion


def _images(n, seed):
  """Images [n, 12, 12] that follow from four numbers each."""
  rng = np.random.default_rng(seed)
  numbers = rng.random((n, 4))
  patterns = np.random.default_rng(9).random((4, 12, 12))
  return np.float32(np.einsum('nk,kij->nij', numbers, patterns) / 4), numbers


def _pairs(numbers):
  logits = np.float32(6 * numbers)
  return inversion.Pairs(logits, -logits)


@pytest.fixture(scope='module')
def public():
  return _images(600, 0)


@pytest.fixture(scope='module')
def brief(public):
  """An inverter that has seen its pairs once, with the seed 0."""
  images, numbers = public
  return inversion.Inverter(images, _pairs(numbers), num_epochs=1, seed=0)


def test_it_reconstructs_what_predictions_tell(public):
  images, numbers = public
  inverter = inversion.Inverter(images, _pairs(numbers), num_epochs=40)
  private, private_numbers = _images(50, 1)
  psnr, ssim = inversion.similarity(
      inverter.invert(_pairs(private_numbers)), private, np.ptp(images)
  )
  mean = np.repeat(images.mean(0, keepdims=True), 50, 0)
  mean_psnr, mean_ssim = inversion.similarity(mean, private, np.ptp(images))
  assert psnr.mean() > mean_psnr.mean() + 3
  assert ssim.mean() > mean_ssim.mean() + 0.05


@pytest.mark.slow
def test_predictions_that_tell_nothing_give_nothing(public):
  images, numbers = public
  same = inversion.Pairs(np.zeros((600, 4)), np.zeros((600, 4)))
  inverter = inversion.Inverter(images, same, num_epochs=20)
  private, _ = _images(50, 1)
  found = inverter.invert(inversion.Pairs(np.zeros((50, 4)), np.zeros((50, 4))))
  psnr, _ = inversion.similarity(found, private, np.ptp(images))
  mean = np.repeat(images.mean(0, keepdims=True), 50, 0)
  mean_psnr, _ = inversion.similarity(mean, private, np.ptp(images))
  assert psnr.mean() < mean_psnr.mean() + 0.5


def test_a_class_is_where_the_client_is_sure(brief):
  pair = brief.pair_of(2)
  assert pair.client.shape == pair.server.shape == (1, 4)
  assert np.argmax(pair.client) == 2 and pair.client[0, 2] > 4.5
  np.testing.assert_array_equal(pair.client, -pair.server)


def test_the_seed_decides(public, brief):
  images, numbers = public
  others = [
      inversion.Inverter(images, _pairs(numbers), num_epochs=1, seed=seed)
      for seed in (0, 1)
  ]
  found = [each.invert(_pairs(numbers[:3])) for each in (brief, *others)]
  np.testing.assert_allclose(found[0], found[1], atol=1e-6)
  assert np.abs(found[0] - found[2]).max() > 1e-4


def test_similarity_is_the_definition():
  rng = np.random.default_rng(0)
  a, b = np.float32(rng.random((2, 3, 16, 16)))
  psnr, ssim = inversion.similarity(a, b, 2.0)
  np.testing.assert_allclose(
      psnr, 10 * np.log10(4.0 / np.mean((a - b) ** 2, axis=(1, 2))), rtol=1e-5
  )
  _, same = inversion.similarity(a, a, 2.0)
  np.testing.assert_allclose(same, 1.0, atol=1e-6)
  assert np.all(ssim < 0.5)
  # Of what is no image, or too small for its window, there is no such number.
  _, none = inversion.similarity(a[:, 0], b[:, 0], 2.0)
  assert np.all(np.isnan(none))


@pytest.mark.parametrize(
    'client, message',
    [
        (np.zeros((599, 4)), r'\[600, classes\], as many as inputs, found \(599, 4\)'),
        (np.full((600, 4), np.inf), "client's logits are not finite"),
    ],
)
def test_bad_pairs_are_named(public, client, message):
  with pytest.raises(ValueError, match=message):
    inversion.Inverter(public[0], inversion.Pairs(client, np.zeros((600, 4))))
