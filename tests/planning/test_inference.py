"""Plans of prefill and decoding: the mesh, bytes per device, bounds, and what a million tokens
cost."""

import json

import pytest

from jaxformer.cli.main import main
from jaxformer.config import InputError
from jaxformer.hardware import GIB
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from jaxformer.planning.estimate import estimate, inference_setup
from jaxformer.planning.memory import memory
from jaxformer.planning.target import parse_target
from jaxformer.sharding import MeshConfig

pytestmark = pytest.mark.quick


def setup(name, target, batch, length, phase='decode', **mesh):
  given = MeshConfig(**{'data': 1} | mesh) if mesh else None
  return inference_setup(
    phase, PRESETS[name].model, parse_target(target), batch, length, mesh=given
  )


@pytest.mark.parametrize(
  ('name', 'target', 'batch', 'length', 'mesh', 'arguments'),
  [
    # Figures are arguments of the TPU compiler's program (jax 0.10.2, libtpu 0.0.42.1). Eight
    # key/value heads do not divide over 16: each chip holds all of them.
    ('llama3-8b', 'v5e-16', 16, 2048, {'data': 16}, 15.208),
    ('llama3-8b', 'v5e-16', 16, 8192, {'data': 2, 'tensor': 8}, 2.870),
    # as many sequences as key/value heads
    ('llama3-70b', 'v5p-16', 8, 8192, {'data': 4, 'tensor': 2}, 68.209),
    # matrices of 64 x 64 numbers in tiles of 128 columns
    ('rwkv7-2.9b', 'v5e-8', 64, 4096, {'data': 8}, 5.806),
    ('rwkv5-1.5b', 'v5e-8', 64, 4096, {'data': 8}, 3.128),
  ],
)
def test_weights_and_state_are_those_of_the_program(name, target, batch, length, mesh, arguments):
  assert memory(setup(name, target, batch, length, **mesh)).total / GIB == pytest.approx(
    arguments, rel=0.01
  )


@pytest.mark.parametrize(
  ('name', 'target', 'batch', 'length', 'compiled'),
  [
    # all bytes of the TPU compiler's program, in GiB
    ('llama3.2-1b', 'v5e-8', 16, 4096, 2.86),
    ('mamba-370m', 'v5e-8', 16, 2048, 0.80),
    *(
      pytest.param(*case, marks=pytest.mark.thorough)
      for case in (
        ('gpt2-large', 'v5e-8', 32, 1024, 2.15),
        ('llama3-8b', 'v5e-16', 16, 8192, 9.37),
        ('mamba2-370m', 'v5e-8', 16, 2048, 0.96),
        ('rwkv4-430m', 'v5e-8', 32, 1024, 0.81),
      )
    ),
  ],
)
def test_prefill_has_activations(name, target, batch, length, compiled):
  found = memory(setup(name, target, batch, length, 'prefill'))
  assert found.total / GIB == pytest.approx(compiled, rel=0.15)
  # without them it would be wrong by more
  assert found.working > abs(found.total - compiled * GIB)


def test_heads_that_do_not_divide_are_replicated():
  """Llama 3 8B has 8 key/value heads."""
  one, eight, sixteen = (
    memory(setup('llama3-8b', f'v5e:{shape}', 4, 8192, tensor=n)).state
    for shape, n in (('1x1', 1), ('2x4', 8), ('4x4', 16))
  )
  assert eight == pytest.approx(one / 8, rel=1e-3)
  assert sixteen == pytest.approx(one, rel=1e-3)


def test_what_a_recurrence_accumulates_is_fp32():
  held = memory(setup('rwkv7-2.9b', 'v5e-8', 64, 4096, data=8)).state
  assert held == pytest.approx(64 / 8 * 32 * (4 * 40 * 64 * 64 + 2 * 2 * 2560), rel=1e-3)


@pytest.mark.parametrize(
  ('name', 'target', 'batch', 'mesh'),
  [
    ('llama3-8b', 'v5e-16', 16, {'data': 8, 'tensor': 2}),  # 16 would hold 16 GB of weights each
    ('llama3.2-1b', 'v5e-16', 16, {'data': 16}),
    ('llama3-8b', 'v5e-16', 4, {'data': 4, 'tensor': 4}),
    ('llama3-8b', '2 x v5e-8', 16, {'replica': 2, 'data': 4, 'tensor': 2}),
    ('gpt2', 'v5e-8', 1, {'context': 8}),  # no axis divides 50,257 tokens
  ],
)
def test_the_mesh_that_fits(name, target, batch, mesh):
  found = setup(name, target, batch, 8192 if 'llama' in name else 1024).abstract_mesh.shape
  assert {axis: size for axis, size in found.items() if size > 1} == mesh


def test_what_the_mesh_does_not_divide_is_computed_by_each_device():
  one, eight = (estimate(setup('gpt2', f'v5e-{n}', 1, 1024)).step for n in (1, 8))
  assert eight.seconds == pytest.approx(one.seconds)
  half = estimate(setup('gpt2', 'v5e-8', 4, 1024)).step
  assert half.compute_seconds == pytest.approx(one.compute_seconds)


def test_slices_are_connected_by_the_network():
  """Each slice serves its own sequences; nothing crosses the network."""
  two = estimate(setup('llama3-8b', '2 x v5e-8', 16, 1024)).step
  one = estimate(setup('llama3-8b', 'v5e-8', 8, 1024)).step
  assert two.network_seconds == 0
  assert two.interconnect_seconds == pytest.approx(one.interconnect_seconds)
  assert two.tokens_per_second == pytest.approx(2 * one.tokens_per_second)
  with pytest.raises(InputError, match=r'mesh\.replica = 1: must be a multiple of 2'):
    estimate(setup('llama3-8b', '2 x v5e-8', 16, 1024, tensor=8, data=2))


def plan(capsys, *words):
  assert main(['plan', *words, '--json']) == 0
  return json.loads(capsys.readouterr().out)


def test_what_a_million_tokens_cost(capsys):
  words = 'llama3-8b', '--target', 'v5e-8', '--training.batch-size', '8', '--phase', 'decode'
  v = plan(capsys, *words, '--price', '2', '--utilization', '0.5')
  seconds = v['step']['seconds'] / 0.5 / 8 * 1e6
  assert v['serving']['seconds_per_million_tokens'] == pytest.approx(seconds)
  assert v['serving']['price_per_million_tokens_usd'] == pytest.approx(2 * 8 * seconds / 3600)
  assert plan(capsys, *words)['serving']['price_per_hour_usd'] == pytest.approx(8 * 1.2)
  given = plan(capsys, *words, '--mesh.data', '1', '--mesh.tensor', '8')
  assert given['mesh']['tensor'] == 8
  assert given['memory']['weights'] == pytest.approx(
    2 * define(PRESETS['llama3-8b'].model).size / 8, rel=1e-3
  )


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (('--training.remat', 'none'), 'training.remat: has no effect on the decode phase'),
    (('--training.accumulate', '1'), 'training.accumulate: has no effect'),
    (('--mesh.data', '8'), 'training.batch_size = 1: must be a multiple of 8'),
    (('--mesh.tensor', '3', '--mesh.data', '1'), 'there are 8'),
  ],
)
def test_bad_input(capsys, words, message):
  command = ['plan', 'llama3-tiny', '--target', 'v5e-8', '--phase', 'decode']
  assert main([*command, '--training.batch-size', '1', *words]) == 2
  assert message in capsys.readouterr().err


@pytest.mark.parametrize('phase', ['prefill', 'decode'])
def test_what_does_not_decode_is_refused(capsys, phase):
  words = ['plan', 's4d-classifier-tiny', '--target', 'v5e-8', '--phase', phase]
  assert main(words) == 2
  assert 'reads complete sequences and does not decode' in capsys.readouterr().err


def test_prefill_computes_one_position_of_the_head():
  model = PRESETS['llama3-8b'].model
  step = estimate(setup('llama3-8b', 'v5p-8', 1, 1024, 'prefill', tensor=4)).step
  per_token = 2 * (define(model).size - 2 * 128256 * 4096)
  assert step.compute_seconds * 459e12 * 4 == pytest.approx(1024 * per_token, rel=0.06)
