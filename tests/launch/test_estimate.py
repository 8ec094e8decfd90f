"""What a job will take, by hand."""

import re

import pytest

import jaxformer
from jaxformer.config import InputError
from jaxformer.launch.check import check_on
from jaxformer.launch.estimate import estimate
from jaxformer.planning.target import parse_target

pytestmark = pytest.mark.quick


def experiment(*overrides):
  return jaxformer.experiment(
    'llama2-7b',
    ('training.batch-size', '64'),
    ('data.sequence-length', '4096'),
    ('training.steps', '1000'),
    *overrides,
  )


def test_time_and_price():
  found = estimate(experiment(), parse_target('v5p-128'), spot=False, utilisation=0.5)
  assert found.tokens == 1000 * 64 * 4096
  # 6 FLOPs a token and parameter that multiplies (all but the embedding), and the products of
  # attention: 32 layers, width 4096, two products of scores and values, the mean of a causal mask.
  matrices, attention = (
    6 * (6_738_415_616 - 32_000 * 4096 - 65 * 4096),
    3 * 32 * 2 * 2 * 4096 * (4096 + 1) / 2,
  )
  assert found.flops == pytest.approx(found.tokens * (matrices + attention), rel=1e-3)
  assert found.seconds == pytest.approx(found.flops / (64 * 459e12 * 0.5))
  assert found.price_per_hour == pytest.approx(64 * 4.20)
  assert found.price == pytest.approx(64 * 4.20 * found.seconds / 3600)
  assert not found.at_most


def test_spot_capacity_without_a_list_price_costs_at_most_as_much():
  found = estimate(experiment(), parse_target('v5p-128'), spot=True)
  assert (found.price_per_hour, found.at_most) == (pytest.approx(64 * 4.20), True)


@pytest.mark.parametrize(('optimizer', 'numbers'), [('AdamW', 4), ('Lion', 3)])
def test_memory_that_does_not_depend_on_the_batch(optimizer, numbers):
  """Parameters, gradients and one or two moments, all divided over 64 devices but for vectors."""
  memory = check_on(
    experiment(('mesh.fsdp', '64'), ('mesh.data', '1'), ('optimizer', optimizer)),
    parse_target('v5p-128'),
  )
  assert 2 * memory.parameters + memory.optimizer == pytest.approx(
    4 * numbers * 6_738_415_616 / 64, rel=5e-3
  )


def test_what_cannot_fit_says_by_how_much():
  target = parse_target('v5p-128')
  # with mesh.data alone every device has all
  over = 16 * 6_738_415_616 - target.device_memory_bytes
  with pytest.raises(
    InputError, match=re.escape(f'107.8 GB a device, {over / 1e9:.1f} GB more than there is')
  ):
    check_on(experiment(), target)
