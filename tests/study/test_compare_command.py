"""`jaxformer compare` as a user starts it: stopped in the middle, and by several processes, it ends
with the same numbers."""

import json
import shutil
import signal
import subprocess
import sys
import types

import pytest

from jaxformer.cli import main
from jaxformer.models.zoo import FAMILIES
from jaxformer.planning.cost import cost
from jaxformer.study.studies import STUDIES
from jaxformer.workflows.names import get_study
from tests.e2e.program import environment, start
from tests.helpers import temporary_types
from tests.tiers import case, thorough

STUDY = """
from jaxformer.study.study import FixedModel, Study
from jaxformer.data import AssociativeRecall
from jaxformer.models.zoo import FAMILIES


def entry(family):
  make = FAMILIES[family].make
  model = make(width=16, layers=1, vocab_size=10, context_length=8)
  return FixedModel(name=family, model_config=model)


study = Study(
  name='tiny', entries=(entry('gru'), entry('lstm'), entry('mamba')),
  tasks=(AssociativeRecall(length=6, test_sequences=64),), tokens=8 * 8 * 60, batch_size=8,
  learning_rates=(1e-3, 3e-3), max_grid_extensions=1, seeds=(1, 2), runs_per_program=2,
  contexts=(8,), timing_repeats=1)
"""
LAYER = """
import jax.numpy as jnp

from jaxformer.layers.layer import Layer, LayerConfig, Output


class Nothing(Layer):
  class Config(LayerConfig):
    def build(self, width, rngs, position):
      return Nothing()

  def __call__(self, x_BTD, ctx, state=None):
    return Output(jnp.zeros_like(x_BTD), state)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
  (tmp_path / 'study.py').write_text(STUDY)
  (tmp_path / 'my_layer.py').write_text(LAYER)
  monkeypatch.chdir(tmp_path)
  with temporary_types():
    yield tmp_path


def stopped(folder, cache, number, after):
  """The study, sent a signal once `after` runs are reported; its exit code and what it said."""
  command = [sys.executable, '-m', 'jaxformer', 'compare', '../study.py', '--workers', '2']
  with subprocess.Popen(
    command, cwd=folder, env=environment(cache), stderr=subprocess.PIPE, text=True
  ) as process:
    lines = []
    for line in process.stderr:
      lines.append(line)
      if sum('seed' in text for text in lines) == after:
        process.send_signal(number)
        break
    lines += process.stderr.readlines()
  return process.returncode, lines


@pytest.mark.e2e
@thorough
def test_stopped_twice_it_ends_with_the_same_numbers(folder, tmp_path_factory):
  cache = tmp_path_factory.getbasetemp() / 'jaxformer-cache'
  reports = []
  for name in ('whole', 'stopped'):
    (folder / name).mkdir()
    if name == 'stopped':
      code, lines = stopped(folder / name, cache, signal.SIGTERM, 1)
      assert code == 75
      assert lines[-1].startswith('interrupted: ')
      assert stopped(folder / name, cache, signal.SIGKILL, 6)[0] == -signal.SIGKILL
    done = start(
      ['compare', '../study.py', '--json', '--workers', '1' if name == 'whole' else '3'],
      folder / name,
      cache,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    # a line a run and a cost, and nothing of the trainings
    assert all(line.count(' | ') >= 2 for line in lines), done.stderr
    reports.append(json.loads(done.stdout))
    assert (
      json.loads((folder / name / 'runs' / 'tiny' / 'report' / 'report.json').read_text())
      == reports[-1]
    )
  assert 'finished before' in done.stderr
  assert reports[0]['tasks'] == reports[1]['tasks']
  assert [len(o['scores']) for o in reports[0]['tasks'][0]['outcomes']] == [2, 2, 2]
  for run in (folder / 'whole' / 'runs' / 'tiny').glob('mamba-*'):
    shutil.rmtree(run)
  part = start(['report', '../study.py', '--json'], folder / 'whole', cache)
  assert part.returncode == 0, part.stderr
  assert 'left out: mamba' in part.stderr
  kept = json.loads(part.stdout)['tasks'][0]['outcomes']
  assert [o['scores'] for o in kept] == [
    o['scores'] for o in reports[0]['tasks'][0]['outcomes'][:2]
  ]


@pytest.mark.quick
@pytest.mark.parametrize(
  ('command', 'parts'),
  [
    (['compare', 'quickstrat'], ["'quickstrat'", 'did you mean quickstart']),
    (['compare', 'nothing.py'], ['nothing.py', 'o such file']),
    (['compare', 'my_layer.py'], ['defines no `study`']),
    (['compare', 'study.py', '--study.tokenz', '3'], ['--study.tokenz', 'did you mean tokens']),
    (['compare', 'study.py', '--study.tokens', 'many'], ['tokens', "'many'"]),
    (['compare', 'study.py', '--tokens', '3'], ["'--tokens'"]),
    (['compare', 'study.py', '--workers', '0'], ['workers', 'at least 1']),
    (['report', 'study.py'], ['tiny', 'finished all its runs']),
    (['compare', 'study.py', '--model.width', '3'], ['--model.width', 'study']),
    (['compare', 'study.py', '--study.seeds', '1,1'], ['seeds', 'each once']),
    (['compare', 'study.py', '--study.evaluations', '0'], ['Study.evaluations = 0', 'positive']),
    (['compare', 'study.py', '--add', 'my_layer.py'], ['my_layer.py', 'FILE.py:NAME']),
    (['compare', 'study.py', '--add', 'mambo'], ['mambo', 'did you mean mamba', 'FILE.py:NAME']),
    (['compare', 'study.py', '--add', 'mamba-130m'], ['mamba-130m', 'its family is mamba']),
    (['compare', 'quickstart', '--add', 'mamba'], ['mamba', 'the study has this entry']),
    (['compare', 'study.py', '--add', 'my_layer.py:Nothin'], ["'Nothin'", 'did you mean Nothing']),
    (['compare', 'study.py', '--add', 'study.py:study'], ['study.py:study', 'neither']),
    (['check', 'my_layer.py'], ['FILE.py:NAME']),
    (['check', 'absent.py:Layer.Config'], ['absent.py', 'o such file']),
    (['check', 'study.py:study'], ['study.py:study', 'layer']),
  ],
)
def test_bad_input(command, parts, folder, capsys):
  assert main(command) == 2
  out, err = capsys.readouterr()
  assert out == ''
  assert err.startswith('error: ')
  assert 'Traceback' not in err
  for part in parts:
    assert part in err
  assert sorted(p.name for p in folder.iterdir() if p.suffix != '') == ['my_layer.py', 'study.py']


@pytest.mark.quick
def test_an_own_layer_is_added(folder, capsys):
  assert (
    main(
      [
        'compare',
        'study.py',
        '--add',
        'my_layer.py:Nothing.Config',
        '--study.tokens',
        '1e5',
        '--show',
      ]
    )
    == 0
  )
  shown = json.loads(capsys.readouterr().out)
  assert shown['tokens'] == 100_000
  assert shown['entries'][-1]['layer']['type'] == 'Nothing'


@pytest.mark.parametrize(
  'family',
  [
    case(name, standing=name in ('gated-deltanet', 'deepseek-v3', 'recurrentgemma'))
    for name in FAMILIES
    if not FAMILIES[name].of_pairs
  ],
)
def test_a_family_is_added_at_the_size_of_the_quickstart(family):
  known = [e.family for e in STUDIES['quickstart'].entries]
  study = get_study('quickstart', add=[] if family in known else [family])
  entry = next(e for e in study.entries if e.family == family)
  for vocab_size, length in ((264, 128), (20, 21)):  # bytes, and recall
    active = cost(entry.model(study, vocab_size, length)).active_params
    assert active == pytest.approx(study.target, rel=study.tolerance)


@pytest.mark.quick
def test_named_studies_hold_ten_architectures():
  assert {len(s.entries) for name in STUDIES if (s := STUDIES[name]).scaling is None} == {10}


@pytest.mark.quick
@pytest.mark.parametrize(('evaluations', 'every'), [(1, 195), (6, 32), (1000, 1)])
def test_evaluations_lie_at_even_steps(evaluations, every):
  study = STUDIES['quickstart'].replace(evaluations=evaluations, tokens=200_000)
  model = FAMILIES['gru'].make(width=8, layers=1, vocab_size=264, context_length=128)
  dataset = types.SimpleNamespace(config=study.tasks[0], identity={})
  training = study.experiment(study.entries[0], model, dataset, 1e-3, 1).training
  assert (training.steps, training.eval_every) == (195, every)
