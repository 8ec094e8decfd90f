"""The layer of docs/layers.md: its code is complete, keeps the contract, is scaled to a size,
trained and compared. Mistakes in it are found by the contract."""

import json
import pathlib
import re
import types

import pytest

from jaxformer.cli import main
from jaxformer.models.zoo.around import around
from jaxformer.study.study import Study, TokenMixer
from jaxformer.testing.contract import check_layer
from jaxformer.user_code import object_in_file
from tests.helpers import temporary_types
from tests.tiers import thorough

TEXT = (pathlib.Path(__file__).parents[2] / 'docs' / 'layers.md').read_text()
SECTION = TEXT.partition('## Your own layer\n')[2]
LAYER, STUDY = re.findall(r'```python\n(.*?)```', SECTION, re.S)
NAME = 'my_layer.py:GatedLinear.Config'
WRONG = {
  'ahead': (
    'w(x_BTD).reshape',
    'w(jnp.roll(x_BTD, -1, 1)).reshape',
    'no output depends on a later input',
    'the output at position 0 depends on the input at position 1, which comes later',
  ),
  'step': (
    '  def __call__',
    '  def step(self, x_BD, ctx, state):\n    out = self(x_BD[:, None], ctx, 0.9 * state)\n'
    '    return Output(out.y[:, 0], out.state)\n\n  def __call__',
    'a sequence equals a prefill and steps',
    'prefill of 0 and 20 steps against the full sequence: the output differs by up to',
  ),
  'documents': (
    'starts_BT(ctx.segments_BT, B, T)',
    'starts_BT(None, B, T)',
    'packed documents equal separate ones',
    'documents of 1, 1, 17, 1 tokens in a row, against separate ones: the output differs by up to',
  ),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'my_layer.py').write_text(LAYER)
  (tmp_path / 'small.py').write_text(STUDY)
  with temporary_types():
    yield tmp_path


@pytest.mark.quick
def test_it_is_short():
  assert len(LAYER.splitlines()) <= 65
  assert max(map(len, LAYER.splitlines())) <= 100


def test_it_keeps_the_contract(folder, capsys):
  assert main(['check', NAME]) == 0
  said = capsys.readouterr().out
  assert 'skipped' not in said  # sharding too: the tests have 8 devices
  assert 'FAILS' not in said


@pytest.mark.parametrize('name', WRONG)
def test_written_wrong_it_is_told_so(name, folder):
  old, new, check, words = WRONG[name]
  assert LAYER.count(old) == 1
  (folder / 'my_layer.py').write_text(LAYER.replace(old, new))
  # as `jaxformer check` prints them
  verdict = next(v for v in check_layer(object_in_file(NAME)) if v.check == check)
  assert words in verdict.wrong
  assert verdict.line.startswith(f'FAILS    {check}: ')


@pytest.mark.quick
def test_it_is_planned_at_a_size(folder, capsys):
  assert main(['plan', NAME, '--params', '125M', '--json']) == 0
  plan = json.loads(capsys.readouterr().out)
  assert abs(plan['params'] / 125e6 - 1) <= 0.02
  assert plan['decode_state_bytes'] == 4 * 16 * plan['shape']['width'] * plan['shape']['layers']
  assert plan['name'] == 'GatedLinear-125M'


@pytest.mark.quick
def test_a_run_of_it_is_used_again_until_its_code_or_the_data_change(folder):
  def run(identity):
    layer = object_in_file(NAME)
    study = Study(name='s', entries=(TokenMixer(layer=layer),), tokens=10**6)
    dataset = types.SimpleNamespace(config=study.tasks[0], identity=identity)
    model = around(layer).make(width=16, layers=1, hidden=32, vocab_size=264, context_length=32)
    return study.experiment(study.entries[0], model, dataset, 1e-3, 1).run.name

  first = run({'train': ['a']})
  assert run({'train': ['a']}) == first
  assert run({'train': ['b']}) != first
  (folder / 'my_layer.py').write_text('import scales\n' + LAYER)
  (folder / 'scales.py').write_text('SCALE = 16')
  second = run({'train': ['a']})
  assert second != first
  (folder / 'scales.py').write_text('SCALE = 8')  # what it imports counts
  assert run({'train': ['a']}) not in (first, second)
  (folder / 'scales.py').write_text('SCALE = 16')
  assert run({'train': ['a']}) == second


SMALL = (
  '--study.tokens',
  '512',
  '--study.batch-size',
  '4',
  '--study.eval-batches',
  '1',
  '--study.target',
  '1e5',
  '--study.seeds',
  '1,2',
  '--study.tasks.0.sequence-length',
  '32',
  '--study.tasks.0.corpus',
  'PydocTopics',
)


@thorough
def test_it_is_trained_and_compared(folder, capsys):
  data = ['--data.corpus', 'PydocTopics', '--data.sequence-length', '32']
  assert (
    main(
      [
        'train',
        NAME,
        '--params',
        '100K',
        '--training.steps',
        '2',
        '--training.eval-batches',
        '1',
        *data,
        '--json',
      ]
    )
    == 0
  )
  assert (folder / 'runs' / 'GatedLinear-100K' / 'metrics.jsonl').exists()
  capsys.readouterr()
  assert main(['compare', 'small.py', '--add', NAME, *SMALL]) == 0
  assert 'runs/small/report/report.html' in capsys.readouterr().out
  rows = [
    line.split(' | ')
    for line in (folder / 'runs' / 'small' / 'report' / 'report.md').read_text().splitlines()
  ]
  row = next(r for r in rows if r[0] == '| GatedLinear')
  shown = next(
    line.split(' | ') for line in SECTION.splitlines() if line.startswith('| GatedLinear')
  )
  assert len(row) == len(shown)
  assert float(row[1].split(' ± ')[0]) > 0
