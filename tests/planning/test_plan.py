"""Memory, bounds and plans against closed forms and what the TPU's compiler said
(experiments/tpu_fit.py)."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from jaxformer.cli.main import main
from jaxformer.config import InputError
from jaxformer.hardware import GIB
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from jaxformer.planning import memory as programs
from jaxformer.planning.cost import flops, head_flops
from jaxformer.planning.estimate import estimate, inference_setup, parse_amount
from jaxformer.planning.memory import fits, memory
from jaxformer.planning.mesh_search import candidates
from jaxformer.planning.residuals import residuals, traced
from jaxformer.planning.setup import PlanSetup, default_mesh
from jaxformer.planning.target import parse_target
from jaxformer.sharding import MeshConfig
from jaxformer.workflows.describe import describe_model
from tests.tiers import families

TINY = sorted(n for n in PRESETS if n.endswith('-tiny'))


def setup(name, target, mesh, batch, length, **changes):
  return PlanSetup(
    model=PRESETS[name].model,
    target=parse_target(target),
    mesh=mesh,
    batch_size=batch,
    length=length,
    **changes,
  )


@pytest.mark.parametrize(
  ('name', 'mesh', 'batch', 'length', 'remat', 'arguments', 'temporaries'),
  [
    ('llama2-7b', MeshConfig(data=1, fsdp=16, rules='fsdp'), 16, 4096, 'full', 4.71, 5.49),
    ('llama2-7b', MeshConfig(data=1, fsdp=16, rules='fsdp'), 32, 4096, 'names', 4.71, 16.35),
    ('llama3.1-8b', MeshConfig(data=1, fsdp=16, rules='fsdp'), 16, 8192, 'full', 5.61, 8.14),
    ('llama3.1-8b', MeshConfig(data=1, fsdp=8, tensor=2), 16, 8192, 'full', 5.61, 11.57),
    ('mamba-1.4b', MeshConfig(data=1, fsdp=16), 16, 2048, 'full', 1.60, 2.20),
  ],
)
def test_memory_is_the_compilers(name, mesh, batch, length, remat, arguments, temporaries):
  found = memory(setup(name, 'v5p-32', mesh, batch, length, remat=remat))  # 16 chips
  assert found.arguments / GIB == pytest.approx(arguments, abs=0.01)
  assert found.total / GIB == pytest.approx(arguments + temporaries, rel=0.15)
  assert found.temporaries / GIB == pytest.approx(temporaries, rel=0.15)


@pytest.mark.parametrize('name', families(TINY))
def test_every_family_has_a_plan_of_memory(name):
  """Remat keeps less; a wider fsdp holds less."""

  def of(remat='none', mesh=MeshConfig()):  # noqa: B008
    return memory(setup(name, 'h100:2', mesh, 4, 64, remat=remat))

  one = of()
  assert of('full').activations < one.activations
  assert one.parameters == 4 * define(PRESETS[name].model).size
  assert of(mesh=MeshConfig(data=1, fsdp=2)).parameters < one.parameters


@pytest.mark.quick
def test_a_plan_for_gpus_is_of_their_kernels():
  """On a machine without them: cuDNN keeps the output in heads and one fp32 number per query and
  head, as splash attention does on a TPU, and no logits."""
  model = PRESETS['llama3-8b'].model
  found = describe_model('llama3-8b', model, 'h100:8').implementations['h100:8']
  assert found['training']['attention'] == ['cudnn']

  def kept(target):
    return memory(setup('llama3-8b', target, MeshConfig(), 1, 8192, remat='none')).activations

  assert kept('h100:1') == kept('v6e-1')


@pytest.mark.quick
def test_one_program_serves_meshes_and_what_cannot_fit_is_not_traced():
  def traces():
    return programs._backward.cache_info().misses

  def sharded(target, tensor):
    mesh = MeshConfig(data=1, tensor=tensor)
    return setup('llama3-tiny', target, mesh, 2, 64)

  assert fits(sharded('h100:1', 1))
  before = traces()
  two = sharded('a100:2', 2)
  assert fits(two)
  assert memory(two).working < memory(sharded('h100:1', 1)).working
  assert traces() == before  # other meshes and chips, the same programs
  too_large = setup('llama3.1-405b', 'v5e-16', MeshConfig(data=1, fsdp=16), 16, 8192)
  assert not fits(too_large)
  assert traces() == before
  one = setup('gpt2', 'v5e-1', MeshConfig(), 64, 1024, remat='none')  # activations decide
  assert not fits(one)
  assert memory(one).total > one.target.device_memory_bytes
  assert memory(one).total - memory(one).activations < one.target.device_memory_bytes


@pytest.mark.quick
def test_what_is_kept_of_a_product():
  def backward(params, batch):
    return jax.vjp(lambda p: jnp.tanh(batch @ p['w']).sum(), params)[1]

  w, x = jax.ShapeDtypeStruct((8, 6), jnp.float32), jax.ShapeDtypeStruct((3, 8), jnp.float32)
  closed = jax.make_jaxpr(backward)({'w': w}, x)
  kept = residuals(closed.jaxpr, [traced(w, (1, 2)), traced(x, activation=True)])
  # x itself is an argument; what is kept for the gradient of tanh is sharded by columns, as w is.
  assert kept
  assert all(k == ((3, 6), jnp.float32, (1, 2), True, 1) and k.bytes == 4 * 3 * 3 for k in kept)


@pytest.mark.quick
def test_tensor_divides_what_it_divides_in_a_transformer():
  whole, half = (
    memory(setup('llama2-7b', target, MeshConfig(data=1, tensor=tensor), 1, 4096, remat='none'))
    for target, tensor in (('h100:1', 1), ('h100:2', 2))
  )
  # q, k, v, attention's output in heads and joined, six hidden arrays and the logsumexp are halved;
  # the others are whole.
  stream, hidden = 2 * 4096 * 4096, 2 * 4096 * 11008
  saved = (whole.activations - half.activations) / 32
  assert saved == pytest.approx((5 * stream + 6 * hidden + 4 * 32 * 4096) / 2, rel=1e-3)


@pytest.mark.quick
def test_bounds_by_hand():
  model, target = PRESETS['llama2-7b'].model, parse_target('h200:1')

  def step(*workload):
    return estimate(inference_setup(*workload)).step

  one = step('decode', model, target, 1, 4096)
  assert one.bound == 'memory'
  looked_up = 32000 * 4096
  assert one.memory_seconds == pytest.approx(
    2 * (define(model).size - looked_up + 2 * 32 * 4096 * 4096) / 4.8e12, rel=0.001
  )
  many = step('prefill', model, target, 8, 2048)
  assert many.bound == 'compute'
  assert many.tokens_per_second == pytest.approx(
    989e12 / (2 * (define(model).size - looked_up)), rel=0.05
  )


@pytest.mark.quick
def test_what_a_mesh_sends():
  model, rows = PRESETS['llama2-7b'].model, 128
  size = define(model).size
  # neither looked-up tables nor norms are all-gathered
  multiplied = size - 32000 * 4096 - (2 * 32 + 1) * 4096

  def step(target, length=4096, batch=rows, **mesh):
    config = MeshConfig(**{'data': 1} | mesh)
    return estimate(setup('llama2-7b', target, config, batch, length)).step

  gathered = step('v5e-64', fsdp=64)
  assert gathered.interconnect_seconds == pytest.approx(
    63 / 64 * 3 * 2 * multiplied / 200e9, rel=1e-6
  )
  assert gathered.network_seconds == 0
  # Gradients travel in bfloat16; each slice has half of the sum to receive.
  both = step('2 x v5e-64', replica=2, fsdp=64)
  assert both.network_seconds == pytest.approx(2 * 1 / 2 * 2 * size / 64 / 3.125e9, rel=0.01)
  # Half the weights over 32 of them; two all-reduces of the residual stream in each of 64 branches,
  # forward and backward.
  stream = 2 * 4 * 4096 * 4096
  tensor = 31 / 32 * 3 * multiplied + 1 / 2 * 4 * 64 * stream
  assert step('v5e-64', fsdp=32, tensor=2).interconnect_seconds == pytest.approx(
    tensor / 200e9, rel=1e-6
  )
  # Over `data` and over `context` the gradients are all-reduced; over `context` also keys and
  # values all-gathered, forward and twice backward.
  summed = 2 * 7 / 8 * 2 * size
  assert step('v5e-8', data=8).interconnect_seconds == pytest.approx(summed / 200e9, rel=1e-6)
  keys = 3 * 7 / 8 * 32 * 2 * 2 * 4096 * 4096
  assert step('v5e-8', batch=1, context=8).interconnect_seconds == pytest.approx(
    (summed + keys) / 200e9, rel=1e-6
  )


@pytest.mark.quick
def test_what_experts_send():
  """Each token to two experts and back, forward and backward; gradients of all other parameters are
  summed over the devices that have different tokens."""
  model = PRESETS['mixtral-8x7b'].model
  info = define(model).info.values()
  others = sum(i.size for i in info if 'experts' not in i.axes)
  tokens = 7 / 8 * 4 * 2 * 32 * 2 * 4096 * 4096
  step = estimate(setup('mixtral-8x7b', 'v5p-16', MeshConfig(data=1, expert=8), 8, 4096)).step
  assert step.interconnect_seconds == pytest.approx(
    (2 * 7 / 8 * 2 * others + tokens) / 600e9, rel=1e-6
  )


@pytest.mark.quick
def test_gpus_of_a_host_share_its_network():
  """Eight GPUs each receive an eighth of the weights of the other hosts, and pass it on."""
  size = define(PRESETS['llama2-7b'].model).size - (32000 + 2 * 32 + 1) * 4096
  mesh = MeshConfig(data=1, fsdp=16)
  step = estimate(setup('llama2-7b', 'h100:16', mesh, 16, 4096)).step
  assert step.network_seconds == pytest.approx(3 * 2 * size / 2 / 8 / 50e9, rel=1e-6)
  assert step.interconnect_seconds == pytest.approx(3 * 2 * size * 7 / 8 / 450e9, rel=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize(
  ('target', 'rate'),
  [('v5e-8', 1.97e14), ('v7x-8', 2.307e15), ('a100:8', 1.56e14), ('h100:8', 4.945e14)],
)
def test_products_in_fp32(target, rate):
  """A TPU multiplies them in one pass of bfloat16 by default, an NVIDIA GPU in TF32."""
  assert parse_target(target).chip.peak('fp32') == rate
  mesh = MeshConfig(data=1, fsdp=8)
  fp32 = estimate(setup('gpt2-tiny', target, mesh, 8, 64, precision='fp32'))
  bf16 = estimate(setup('gpt2-tiny', target, mesh, 8, 64))
  peak = parse_target(target).chip.peak()
  assert fp32.step.compute_seconds / bf16.step.compute_seconds == pytest.approx(peak / rate)


@pytest.mark.quick
def test_default_mesh():
  model = PRESETS['llama2-7b'].model
  assert default_mesh(model, parse_target('v5e-64'), 64) == MeshConfig(data=1, fsdp=64)
  assert default_mesh(model, parse_target('2 x v5e-64'), 128) == MeshConfig(
    replica=2, data=1, fsdp=64
  )
  assert default_mesh(model, parse_target('v5e-64'), 16) == MeshConfig(data=1, fsdp=16, tensor=4)
  assert default_mesh(PRESETS['mamba-2.8b'].model, parse_target('v5p-2048'), 1024) == MeshConfig(
    data=2, fsdp=512
  )


@pytest.mark.quick
def test_amounts():
  assert [parse_amount(t) for t in ('2T', '300B', '1.4e12', '5k')] == [2e12, 300e9, 1.4e12, 5e3]
  for wrong in ('many', '-3', '0', '2X', '1e400', 'nan', 'inf', math.inf, math.nan, 0, -1.0):
    with pytest.raises(InputError, match='a number such as 2T'):
      parse_amount(wrong)


@pytest.mark.quick
def test_a_batch_that_the_mesh_does_not_divide():
  def local_batch(batch, length, **changes):
    mesh = MeshConfig(data=2, fsdp=4, context=2)
    return setup('gpt2-tiny', 'h100:16', mesh, batch, length, **changes).local_batch

  assert local_batch(32, 64, accumulate=2) == (2, 32)
  with pytest.raises(InputError, match='batch_size = 12: must be a multiple of 8'):
    local_batch(12, 64)
  with pytest.raises(
    InputError, match=r'sequence length = 63: must be a multiple of mesh.context = 2'
  ):
    local_batch(16, 63)


def _plan(capsys, *words):
  assert main(['plan', *words, '--json']) == 0
  return json.loads(capsys.readouterr().out)


@pytest.mark.quick
def test_the_command_in_json(capsys):
  v = _plan(capsys, 'llama2-7b', '--target', 'v5e-64', '--tokens', '2T', '--price', '2')
  assert v['params'] == 6_738_415_616
  assert v['run']['seconds'] == pytest.approx(
    v['train_flops_per_token'] * 2e12 / (64 * 197e12 * 0.4)
  )
  assert v['run']['price_usd'] == pytest.approx(v['run']['seconds'] / 3600 * 64 * 2)
  assert v['memory']['fits']
  assert v['memory']['optimizer'] == pytest.approx(2 * v['memory']['parameters'], rel=1e-6)
  assert v['mesh']['fsdp'] == 64
  assert v['step']['bound'] == 'compute'
  assert v['target']['chip']['source']
  decode = _plan(capsys, 'jamba-v0.1', '--target', 'h100:8', '--phase', 'decode')
  assert decode['step']['bound'] == 'memory'
  plain = _plan(capsys, 'llama2-7b')
  assert plain['tokens'] == 476_837 * 1024 * 4096
  assert plain['length'] == 4096
  # one length, that of the recipe, not the 131,072 tokens of its context
  long = _plan(capsys, 'llama3.1-405b')
  assert long['length'] == 8192
  on_slice = _plan(capsys, 'llama3.1-405b', '--target', 'v5p-2048')
  assert on_slice['train_flops_per_token'] == long['train_flops_per_token']
  assert on_slice['step']['sequence_length'] == 8192


@pytest.mark.quick
def test_a_plan_that_does_not_fit_says_what_would(capsys):
  v = _plan(capsys, 'llama2-7b', '--target', 'v5e-8')
  assert not v['memory']['fits']
  assert v['memory']['short_by'] == pytest.approx(v['memory']['total'] - 15.75 * GIB)
  assert any('--target v5e-16' in words for words in v['memory']['would_fit'])
  assert main(['plan', 'llama2-7b', '--target', 'v5e-8']) == 0
  assert 'does not fit, by' in capsys.readouterr().out


@pytest.mark.quick
@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['--target', 'v5q-8'], 'did you mean v5p'),
    (['--target', 'v5e-8', '--mesh.fsdp', '3'], 'needs a multiple of 3 devices'),
    (['--target', '2 x v5e-8', '--mesh.fsdp', '8'], 'mesh.replica = 1: must be a multiple of 2'),
    (
      ['--target', 'v5e-8', '--training.batch-size', '12', '--mesh.fsdp', '8'],
      'must be a multiple of 8',
    ),
    (['--price', '2'], 'price: needs a target'),
    (['--phase', 'decode'], 'phase: needs a target'),
    (['--tokens', 'x'], 'a number'),
    (['--utilization', '40'], 'at most 1'),
    (['--tokens', '1e400'], "tokens = '1e400': must be a number such as"),
    (['--tokens', 'nan'], "tokens = 'nan': must be a number such as"),
    (['--target', 'v5e-8', '--price', 'nan'], 'price = nan: must be a finite number'),
    (['--target', 'v5e-8', '--price', 'inf'], 'price = inf: must be a finite number'),
    (['--target', 'v5e-8', '--utilization', 'nan'], 'utilization = nan: must be a finite number'),
    (['--target', 'v5e-8', '--utilization', '1e-320'], 'utilization'),
    (['--target', 'v5e-8', '--mesh.tensor', '5', '--mesh.fsdp', '1'], 'multiple of 5 devices'),
  ],
)
def test_bad_input(capsys, words, message):
  assert main(['plan', 'llama2-7b', *words]) == 2
  out = capsys.readouterr()
  assert message in out.err
  assert out.out == ''


def test_arithmetic_intensity_is_what_the_times_say():
  """Decoding one sequence does 1 multiplication and addition for each weight of two bytes that it
  reads: a FLOP a byte."""
  one = inference_setup('decode', PRESETS['llama2-7b'].model, parse_target('h100:1'), 1, 16)
  step = estimate(one).as_json()['step']
  assert step['arithmetic_intensity'] == pytest.approx(1.0, rel=0.05)
  assert step['ridge_intensity'] == pytest.approx(989e12 / 3.35e12, rel=0.01)
  assert step['bound'] == 'memory'


@pytest.mark.quick
@pytest.mark.parametrize('phase', ['prefill', 'decode'])
@pytest.mark.parametrize('name', ['llama2-7b', 'mixtral-8x7b', 'mamba-1.4b', 'transformer-big'])
def test_the_roofline_computes_the_flops_of_the_one_formula(name, phase):
  """The bound on compute is `flops` at the peak. The prefill computes the head at the last position
  alone."""
  model, target = PRESETS[name].model, parse_target('h100:2')
  step = estimate(inference_setup(phase, model, target, 4, 512)).step
  every, last = (flops(model, phase, 4, 512, last_logits=b) for b in (False, True))
  counted = last if phase == 'prefill' else every
  assert step.compute_seconds * target.chip.peak() * 2 == pytest.approx(counted, rel=1e-12)
  skipped = 4 * 511 if phase == 'prefill' else 0
  assert every - last == pytest.approx(skipped * head_flops(model), rel=1e-9)


@pytest.mark.quick
def test_a_search_keeps_the_batch_of_a_recipe():
  """Rows per device are those of microbatches, so that the run trains on as many tokens."""
  base = PlanSetup(
    model=PRESETS['gpt2-tiny'].model,
    target=parse_target('v5e-4'),
    mesh=MeshConfig(),
    batch_size=32,
    length=256,
  )
  kept = list(candidates(base, (1, 8), ('full',), keep_batch=True))
  assert {s.batch_size for s in kept} == {32}
  found = {s.accumulate for s in kept if s.mesh.fsdp == 4}
  assert found == {1, 8}
  (one,) = (s for s in kept if s.mesh.fsdp == 4 and s.accumulate == 8)
  assert one.overrides[-2:] == ['--training.accumulate', '8']
  assert {s.batch_size for s in candidates(base, (1, 8), ('full',))} > {4, 32}
