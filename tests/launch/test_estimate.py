"""Estimates of a job, by hand."""

import re

import pytest

import jaxformer
from jaxformer.config import InputError
from jaxformer.launch.check import check_on
from jaxformer.planning.estimate import training_run
from jaxformer.planning.target import parse_target

pytestmark = pytest.mark.quick


def experiment(*overrides):
  own = [
    ('training.batch-size', '64'),
    ('data.sequence-length', '4096'),
    ('training.steps', '1000'),
    ('schedule.warmup', '100'),
    ('training.remat', 'none'),
  ]
  return jaxformer.experiment('llama2-7b', overrides=[*own, *overrides])


def test_time_and_price():
  e = experiment()
  tokens = 1000 * 64 * 4096
  found = training_run(e.model, e.data.positions, parse_target('v5p-128'), tokens, 0.5)
  # 6 FLOPs per token and parameter that multiplies (all but the embedding), and the products of
  # attention: 32 layers, width 4096, two products of scores and values, the mean of a causal mask.
  matrices = 6 * (6_738_415_616 - 32_000 * 4096 - 65 * 4096)
  attention = 3 * 32 * 2 * 2 * 4096 * (4096 + 1) / 2
  assert found.train_flops == pytest.approx(tokens * (matrices + attention), rel=1e-3)
  assert found.seconds == pytest.approx(found.train_flops / (64 * 459e12 * 0.5))
  assert found.price_per_hour_usd == pytest.approx(64 * 4.20)
  assert found.price_usd == pytest.approx(64 * 4.20 * found.seconds / 3600)
  assert found.spot_price_usd is None


@pytest.mark.parametrize(('optimizer', 'numbers'), [('AdamW', 4), ('Lion', 3)])
def test_memory_that_does_not_depend_on_the_batch(optimizer, numbers):
  """Parameters, gradients and one or two moments, all sharded over 64 devices except vectors."""
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
    InputError, match=re.escape(f'107.8 GB per device, {over / 1e9:.1f} GB more than available')
  ):
    check_on(experiment(), target)
