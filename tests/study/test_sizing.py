"""The solver gives every family every size; `plan` and `train` show what it made."""

import functools
import json

import pytest

from jaxformer.cli import main
from jaxformer.config import InputError
from jaxformer.layers.mlp import GatedMlp
from jaxformer.models.params import define
from jaxformer.models.zoo import FAMILIES
from jaxformer.models.zoo.around import around
from jaxformer.planning.cost import cost
from jaxformer.study.sizing import HIDDEN_RANGE, measure, solve
from tests.tiers import case

SMALL = {'vocab_size': 264, 'context_length': 256}
PAIRS = SMALL | {'source_vocab_size': 264}
SIZES = 1e6, 1e7, 1.25e8


def data(family):
  return PAIRS if FAMILIES[family].of_pairs else SMALL


def fits(sized, value):
  """Whether a model is what it is said to be, of a shape that its family may have."""
  family = FAMILIES[sized.family]
  assert sized.value == value
  assert abs(value / sized.target - 1) == abs(sized.error) <= 0.02
  assert sized.width == sized.model.width
  assert sized.width % family.width_step == 0
  assert sized.layers == sum(
    len(g.pattern) * g.repeats
    for g in (sized.model.encoder if family.of_pairs else sized.model.stack)
  )
  assert sized.layers % family.layer_step == 0
  assert (sized.hidden is None) == (family.hidden is None)
  if family.hidden is not None:
    assert HIDDEN_RANGE[0] <= sized.hidden / family.hidden(sized.width) <= HIDDEN_RANGE[1]
  return True


@functools.cache
def flops_of_llama(size):
  return cost(solve('llama3', 'params', size, **SMALL).model).train_flops_per_token


SOLVED = [case(f, standing=f in ('llama3', 'mamba', 'transformer')) for f in FAMILIES]


@pytest.mark.parametrize('family', SOLVED)
def test_a_million_parameters(family):
  sized = solve(family, 'params', 1e6, **data(family))
  assert fits(sized, define(sized.model).size)


@pytest.mark.parametrize('family', SOLVED)
def test_larger_sizes_and_equal_flops(family):
  for size in SIZES:
    for match in ('params', 'active_params'):
      sized = solve(family, match, size, **data(family))
      assert fits(sized, getattr(cost(sized.model), match))
    flops = flops_of_llama(size)
    sized = solve(family, 'train_flops_per_token', flops, **data(family))
    assert fits(sized, cost(sized.model).train_flops_per_token)


@pytest.mark.parametrize('family', list(FAMILIES))
def test_state(family):
  """That of a model of the family: the states of few layers, windows or chunks come in large steps,
  so that no family has every number of bytes."""
  target = measure(solve(family, 'params', 1e6, **data(family)).model, 'state_bytes')
  sized = solve(family, 'state_bytes', target, **data(family))
  assert fits(sized, cost(sized.model).decode_state_bytes)


@pytest.mark.quick
def test_a_state_that_no_model_has():
  with pytest.raises(
    InputError,
    match=r'nothing comes within 2% of 1,000,000 state_bytes; the closest has \d{3},\d{3} \(',
  ):
    solve('s5', 'state_bytes', 1e6, **SMALL)


@pytest.mark.quick
def test_what_no_width_changes_leaves_the_width_alone():
  sized = solve('s5', 'state_bytes', 16 * 256, **SMALL)  # fp32
  assert (sized.layers, sized.error) == (16, 0)
  assert 128 <= sized.width <= 1024


@pytest.mark.quick
def test_other_vocabularies_and_contexts_count():
  sized = solve('gpt2', 'params', 1e7, vocab_size=8192, context_length=512)
  assert fits(sized, define(sized.model).size)
  assert (sized.model.vocab_size, sized.model.context_length) == (8192, 512)


@pytest.mark.quick
def test_what_cannot_be_made_is_said():
  with pytest.raises(
    InputError,
    match=r'llama3: nothing comes within 2% of 3 state_bytes; the closest has 32,768 \(width 64, 1 '
    r'',
  ):
    solve('llama3', 'state_bytes', 3, **SMALL)
  with pytest.raises(InputError, match='have no state_bytes'):
    solve(around(GatedMlp.Config(hidden=8)), 'state_bytes', 1e4, **SMALL)
  with pytest.raises(InputError, match='did you mean mamba'):
    solve('mambo', 'params', 1e6, **SMALL)
  with pytest.raises(InputError, match="'flops': must be one of params, active_params"):
    solve('mamba', 'flops', 1e6, **SMALL)


# ---- on the command line -----------------------------------------------------------------------


def answered(capsys, *command):
  assert main([*command, '--json']) == 0
  return json.loads(capsys.readouterr().out)


@pytest.mark.quick
def test_a_plan_of_a_size(capsys):
  plan = answered(capsys, 'plan', 'mamba', '--params', '1M')
  shape = plan['shape']
  assert (plan['name'], plan['family']) == ('mamba-1M', 'mamba')
  assert plan['params'] == shape['value']
  assert shape['error'] == plan['params'] / 1e6 - 1
  assert shape['within']
  assert main(['plan', 'mamba', '--params', '1M']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[1].split() == [
    'shape',
    'width',
    f'{shape["width"]},',
    f'{shape["layers"]}',
    'layers',
    f'{100 * shape["error"]:+.2f}%',
    'of',
    '1M',
    'parameters',
  ]
  active = answered(
    capsys,
    'plan',
    'mamba',
    '--flops-per-token',
    '1e7',
    '--model.vocab-size',
    '512',
    '--model.context-length',
    '64',
  )
  assert abs(active['train_flops_per_token'] / 1e7 - 1) <= 0.02
  assert (active['name'], active['length']) == ('mamba-10M-flops', 64)


def test_a_plan_of_a_size_on_a_target(capsys):
  there = answered(capsys, 'plan', 'mamba', '--params', '1M', '--target', 'v5e-4')
  assert there['params'] == there['shape']['value']
  assert there['memory']['fits']
  assert there['run']['days'] > 0


@pytest.mark.quick
def test_what_is_changed_afterwards_is_measured(capsys):
  shape = answered(capsys, 'plan', 'mamba', '--params', '1M', '--model.d-state', '64')['shape']
  assert shape['value'] > 1.1e6
  assert not shape['within']


def test_a_table_of_all_families(capsys):
  rows = answered(capsys, 'plan', 'families', '--state-bytes', '100K,1M')
  assert [(r['family'], r['target']) for r in rows] == [
    (f, s) for f in FAMILIES for s in (1e5, 1e6)
  ]
  assert all(r['value'] == r['state_bytes'] for r in rows)
  assert main(['plan', 'llama3', '--state-bytes', '3,1M']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[1].endswith('beyond 2%')
  assert lines[-1] == '1 of 2 within 2% of bytes of state'


@pytest.mark.quick
def test_training_takes_a_size(capsys):
  assert main(['train', 'llama3', '--params', '1M', '--training.steps', '3', '--show']) == 0
  shown = json.loads(capsys.readouterr().out)
  assert (shown['run']['name'], shown['training']['steps']) == ('llama3-1M', 3)
  assert shown['model']['width'] == solve('llama3', 'params', 1e6, **SMALL).width


@pytest.mark.quick
@pytest.mark.parametrize(
  ('command', 'parts'),
  [
    (['plan', 'mamba'], ["no preset named 'mamba'", '--params 1M']),
    (['plan', 'mambo', '--params', '1M'], ["no family named 'mambo'", 'did you mean mamba']),
    (
      ['plan', 'mamba-130m', '--params', '1M'],
      ["family = 'mamba-130m': a preset, whose size is fixed", 'families: '],
    ),
    (['plan', 'mamba', '--params', 'many'], ['params', "'many'"]),
    (
      ['plan', 'mamba', '--params', '1M', '--state-bytes', '1M'],
      ['--state-bytes', 'not allowed with', '--params'],
    ),
    (['plan', 'mamba', '--params', '1M', '--model.vocab-size', 'x'], ['model.vocab-size', "'x'"]),
    (
      ['plan', 'mamba', '--params', '1M', '--model.widht', '3'],
      ['--model.widht', 'did you mean width'],
    ),
    (
      ['plan', 'families', '--params', '1M', '--target', 'v5e-4'],
      ['--target', 'one family and one size'],
    ),
    (
      ['plan', 'families', '--params', '1M', '--training.steps', '3'],
      ['--training.steps', 'model.vocab_size'],
    ),
    (['train', 'mamba', '--params', '1M,2M'], ['one model has one size; 2']),
    (
      ['plan', 'llama3', '--state-bytes', '3'],
      ['nothing comes within 2%', 'the closest has 32,768'],
    ),
  ],
)
def test_bad_input(command, parts, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert main(command) == 2
  out, err = capsys.readouterr()
  assert out == ''
  for part in parts:
    assert part in err
