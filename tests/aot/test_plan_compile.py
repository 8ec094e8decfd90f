"""`jaxformer plan --compile` and `--search` with the TPU's compiler, on the smallest models of
several families."""

from __future__ import annotations

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxformer.cli.main import main
from jaxformer.config import InputError
from jaxformer.inference.decoding import lowered_decode, lowered_prefill
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from jaxformer.planning.compiler import compile_plan, memory_refusal, topology_mesh
from jaxformer.planning.estimate import inference_setup
from jaxformer.planning.memory import memory
from jaxformer.planning.target import parse_target
from jaxformer.sharding import MeshConfig, Parallel
from tests import tiers

tpu_compiler = pytest.mark.tpu_compiler
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason='needs libtpu (pip install jaxformer[tpu])'
)


def plan(capfd, *words: str) -> dict:
  """The JSON answer of `jaxformer plan`; stderr has progress alone."""
  assert main(['plan', *words, '--json']) == 0
  out, err = capfd.readouterr()
  assert all(
    line.startswith(('tracing', 'compiling')) or line.split()[0].isdigit()
    for line in err.splitlines()
  )
  return json.loads(out)


@tpu_compiler
@needs_libtpu
@pytest.mark.parametrize(
  ('name', 'padding'), [('llama2-tiny', 1.7), ('mamba-tiny', 1.05), ('mixtral-tiny', 1.6)]
)
def test_a_training_step(capfd, name, padding):
  """A chip's arguments are its part of parameters and optimizer state, as the formulas have them;
  what its collectives go over are the axes of the mesh that have several devices."""
  found = plan(
    capfd,
    name,
    '--target',
    'v5e:2x4',
    '--mesh.data',
    '1',
    '--mesh.fsdp',
    '4',
    '--mesh.tensor',
    '2',
    '--compile',
    '--profile',
  )
  _check_profile(
    found, {'llama2': 'Attention', 'mamba': 'Mamba', 'mixtral': 'Moe'}[found['family']]
  )
  compiled, memory = found['compiled'], found['memory']
  assert compiled['fits']
  assert compiled['short_by'] == 0
  assert compiled['total'] == compiled['arguments'] + compiled['temporaries'] + compiled['outputs']
  held = memory['parameters'] + memory['optimizer'] + memory['batch']
  assert held <= compiled['arguments'] < padding * held  # parts narrower than a tile are padded
  assert set(compiled['collectives']) <= {'fsdp', 'tensor', 'fsdp+tensor'}
  assert compiled['collectives']['fsdp']['all-gather']['bytes'] > 0
  assert compiled['flops']['total'] > 0
  assert (compiled['jax'], compiled['libtpu'] != '') == (jax.__version__, True)


@tpu_compiler
@needs_libtpu
def test_the_compiler_has_the_options_of_a_file_of_chips(capfd, tmp_path):
  """They replace those of the table; `training.compiler_options` replace both."""
  (tmp_path / 'chips.toml').write_text('v5e.compiler_options = { xla_no_such_option = "1" }')
  words = ['plan', 'gpt2-tiny', '--target', 'v5e:2x2', '--compile', '--hardware']
  assert main([*words, str(tmp_path / 'chips.toml')]) == 2
  assert "No such compile option: 'xla_no_such_option'" in capfd.readouterr().err


def _check_profile(found: dict, layer: str) -> None:
  """The predicted time is above the lower bound; all of it has a phase, a layer and a source."""
  predicted, profile = found['predicted'], found['profile']
  seconds = predicted['seconds']
  assert found['step']['seconds'] < seconds == profile['seconds']
  low, high = predicted['interval']
  assert low < seconds < high
  assert 0 < predicted['mfu'] < predicted['hfu'] < 1
  for parts in (profile['by_kind'], profile['by_phase']):
    assert sum(parts.values()) == pytest.approx(seconds)
  assert sum(s['seconds'] for s in profile['sources']) == pytest.approx(seconds)
  assert {'Head', 'Optimizer', layer} <= set(profile['by_layer'])
  assert min(profile['by_layer'][layer][phase] for phase in ('forward', 'backward')) > 0
  named = sum(s['seconds'] for s in profile['sources'] if s['place'])
  assert named > 0.7 * seconds


@tpu_compiler
@needs_libtpu
@pytest.mark.parametrize('phase', ['prefill', 'decode'])
def test_serving(capfd, phase):
  """Weights are in bfloat16; a round of decoding is one token for each of 32 sequences per chip."""
  found = plan(
    capfd,
    'llama2-tiny',
    '--target',
    'v5e:2x2',
    '--phase',
    phase,
    '--compile',
    '--training.batch-size',
    '128',
  )
  compiled = found['compiled']
  assert compiled['fits']
  assert found['mesh']['data'] == 4
  assert compiled['left_out'] == []
  assert compiled['flops']['total'] == pytest.approx(compiled['predicted_flops'][0], rel=0.3)


@tpu_compiler
@needs_libtpu
def test_what_a_program_does_not_show(capfd):
  """Traffic between slices, and the loops of attention over `context`."""
  mesh = ['--mesh.replica', '2', '--mesh.data', '1', '--mesh.context', '2', '--mesh.fsdp', '2']
  compiled = plan(capfd, 'llama2-tiny', '--target', '2 x v5e-4', '--compile', *mesh)['compiled']
  assert [line.partition(':')[0] for line in compiled['left_out']] == [
    'traffic between slices',
    'attention over the context axis',
  ]


@tpu_compiler
@needs_libtpu
@pytest.mark.parametrize(
  ('phase', 'name', 'target', 'batch', 'length', 'within'),
  [
    *tiers.first_stands(
      [
        ('decode', 'llama3.2-1b', 'v5e-16', 1, 8192, 0.02),
        ('decode', 'llama3-8b', 'v5e-16', 4, 8192, 0.15),
        ('decode', 'rwkv4-169m', 'v5e-8', 256, 1024, 0.05),
        ('decode', 'rwkv5-0.4b', 'v5e-8', 64, 1024, 0.05),
      ]
    ),
    ('decode', 'mamba2-130m', 'v5e-8', 64, 2048, 0.05),
    *tiers.first_stands(
      [
        ('prefill', 'mamba-370m', 'v5e-8', 16, 2048, 0.15),
        ('prefill', 'llama3.2-1b', 'v5e-8', 16, 4096, 0.15),
      ]
    ),
  ],
)
def test_bytes_of_inference(phase, name, target, batch, length, within):
  """Few key/value heads, which 16 chips hold in full; and recurrent state in fp32, in tiles. The
  state is there once, and heads of 64 channels take no copy of their projections."""
  chips = parse_target(target)
  setup = inference_setup(phase, PRESETS[name].model, chips, batch, length)
  mesh = topology_mesh(chips.topology, setup.mesh)
  program = define(setup.model), Parallel(mesh, setup.mesh.rules), batch, length
  lower = {'prefill': lowered_prefill, 'decode': lowered_decode}[phase]
  found = compile_plan(lambda: lower(*program), mesh, chips.device_memory_bytes)
  assert found.total == pytest.approx(memory(setup).total, rel=within)


@tpu_compiler
@needs_libtpu
def test_decoding_that_does_not_fit(capfd):
  """The state alone has 69 GB; the program that would leave it is refused."""
  found = plan(
    capfd,
    'llama2-7b',
    '--target',
    'v5e-4',
    '--phase',
    'decode',
    '--compile',
    '--training.batch-size',
    '32',
  )
  assert not found['memory']['fits']
  assert not found['compiled']['fits']
  assert found['compiled']['short_by'] > 0


def test_an_encoder_decoder_is_planned_by_formulas(capfd):
  words = ['transformer-tiny', '--target', 'v5e:2x2', '--phase', 'decode', '--compile']
  assert main(['plan', *words]) == 2
  assert 'compile: decode of EncoderDecoder is planned by formulas alone' in capfd.readouterr().err


@tpu_compiler
@needs_libtpu
def test_what_does_not_fit_says_by_how_much(capfd):
  """4,096 sequences per chip without remat: some 60 GiB."""
  found = plan(
    capfd,
    'llama2-tiny',
    '--target',
    'v5e:2x4',
    '--compile',
    '--training.batch-size',
    '32768',
    '--training.remat',
    'none',
  )
  compiled = found['compiled']
  assert not compiled['fits']
  assert compiled['flops'] is None
  assert compiled['limit'] == pytest.approx(15.75 * 2**30, rel=0.01)
  assert compiled['short_by'] == compiled['total'] - compiled['limit'] > 2**30


@tpu_compiler
@needs_libtpu
def test_search(capfd):
  """The recommendation compiled and fits; every other has its reason; the command has the overrides
  of the recommendation."""
  found = plan(
    capfd, 'llama2-tiny', '--target', 'v5e:2x4', '--search', '--training.batch-size', '32'
  )
  search = found['search']
  best = next(c for c in search['compiled'] if c['name'] == search['best'])
  assert best['fits']
  assert best['total'] < best['limit']
  assert len(search['compiled']) >= 3
  assert all(entry['reason'] for entry in search['rejected'])
  assert '--training.batch-size 32' in search['command']
  assert search['command'].startswith(
    'jaxformer train llama2-tiny --data.sequence-length 256 --mesh.data'
  )
  assert search['candidates'] > 10


def test_gpus_are_refused(capfd):
  assert main(['plan', 'llama2-tiny', '--target', 'h100:8', '--compile']) == 2
  assert 'h100:8 is not a TPU slice' in capfd.readouterr().err


@pytest.mark.parametrize(
  ('words', 'said'),
  [
    (('--compile',), 'compile: needs a target'),
    (('--target', 'v5e:2x4', '--search', '--compile'), 'search: compiles by itself'),
    (('--target', 'v5e:2x4', '--search', '--mesh.fsdp', '8'), 'mesh.fsdp: search chooses it'),
  ],
)
def test_options_without_effect(capfd, words, said):
  assert main(['plan', 'llama2-tiny', *words]) == 2
  assert said in capfd.readouterr().err


def test_without_the_compiler(capfd, monkeypatch):
  real = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda name, *rest: None if name == 'libtpu' else real(name, *rest)
  )
  assert main(['plan', 'llama2-tiny', '--target', 'v5e:2x4', '--compile']) == 2
  assert capfd.readouterr().err.splitlines()[-1] == (
    "error: compiling for a TPU needs its compiler, libtpu: pip install 'jaxformer[tpu]'"
  )


@pytest.mark.quick
def test_refusals_are_read():
  text = (
    'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. '
    'Used 87.02G of 15.75G hbm. '
    'Exceeded hbm capacity by 71.28G.'
  )
  assert memory_refusal(text) == (87.02 * 2**30, 15.75 * 2**30)
  early = 'the total memory required for HLO temporaries (55.90G) exceeds available HBM (15.75G).'
  assert memory_refusal(f'RESOURCE_EXHAUSTED: Ran out of memory on HBM, {early}') == (
    55.9 * 2**30,
    15.75 * 2**30,
  )
  assert memory_refusal(text.replace('RESOURCE_EXHAUSTED', 'INTERNAL')) is None
  assert memory_refusal('RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.') is None


@pytest.mark.quick
def test_a_program_that_the_compiler_refuses_is_one_line():
  """As bf16 kernels of TPU v3, where Pallas raises its own error, caused by the compiler's."""

  def refused():
    try:
      raise jax.errors.JaxRuntimeError('INTERNAL: Mosaic failed to compile TPU kernel: E2001\nmore')
    except jax.errors.JaxRuntimeError as e:
      raise RuntimeError('INTERNAL: Mosaic failed to compile TPU kernel: E2001\nmore') from e

  with pytest.raises(InputError, match=r'refuses the program: .* E2001; without compile the plan'):
    compile_plan(refused, None, 1e9)
  with pytest.raises(ZeroDivisionError):  # no error of a compiler
    compile_plan(lambda: 1 // 0, None, 1e9)


@tpu_compiler
@needs_libtpu
@pytest.mark.parametrize('topology', tiers.first_stands(['v5p:4x4x4', 'v5e:16x16']))
def test_slices_that_close_to_rings_are_described_as_such(topology):
  """In a cube that it takes for open the compiler gathers weights by sums, at twice the time."""
  mesh = topology_mesh(topology, MeshConfig(data=1, fsdp=-1))
  rows, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (('fsdp',), ()))
  x = jax.ShapeDtypeStruct((8192, 2048), jnp.float32, sharding=rows)
  gather = jax.jit(lambda x: x.astype(jnp.bfloat16), out_shardings=whole)
  text = gather.trace(x).lower(lowering_platforms=('tpu',)).compile().as_text()
  assert 'all-gather(' in text
  assert 'all-reduce(' not in text
