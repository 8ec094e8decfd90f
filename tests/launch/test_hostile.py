"""Fields of engines have a stated syntax; nothing that is given breaks out of YAML or the shell, and
nothing else is overwritten."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from jaxformer.cli import main
from jaxformer.config import InputError
from jaxformer.launch import XPK, GCloud, Sky, Slurm
from tests.e2e.program import contents
from tests.launch.jobs import GIT, HARD, job
from tests.launch.test_files import ENGINES_READY

pytestmark = pytest.mark.quick

HOSTILE = [
  'a\nb',
  'a\n#SBATCH --uid=0',
  'a: b',
  "a'b",
  'a"b',
  '$(touch x)',
  '`touch x`',
  'a;b',
  'a b',
  'a\0b',
  'é',
  '-a',
  '--a',
  '',
  'a|b',
  'a&b',
  '\ud800',
]
FIELDS = [
  (Sky, 'infra'),
  *((XPK, f) for f in ('cluster', 'project', 'zone', 'image', 'priority')),
  *((GCloud, f) for f in ('project', 'zone', 'runtime_version', 'service_account', 'valid_for')),
  *((Slurm, f) for f in ('partition', 'account', 'qos', 'time', 'gpu')),
]


@pytest.mark.parametrize(('engine', 'field'), FIELDS)
@pytest.mark.parametrize('text', HOSTILE, ids=ascii)
def test_a_field_takes_only_its_syntax(engine, field, text):
  with pytest.raises(InputError, match=rf'{field} = .*must be') as e:
    engine(**{field: text})
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  ('engine', 'field', 'right', 'wrong'),
  [
    (GCloud, 'valid_for', '6h 90m 1d12h 30s', 'banana 6 h6 6hours 1h1d'),
    (GCloud, 'zone', 'us-east5-b us-central1-ai1a', 'banana us-east5 US-EAST5-B'),
    (GCloud, 'project', 'my-project 123456 example.com:p', 'My-Project 1a p_q'),
    (GCloud, 'service_account', 'a@p.iam.gserviceaccount.com', 'banana a@ @b'),
    (XPK, 'zone', 'us-east5-b us-east5', 'banana'),
    (XPK, 'cluster', 'my-cluster c', 'My_cluster c- 1c'),
    (
      XPK,
      'image',
      'python:3.12 gcr.io/p/n:t localhost:5000/n us-docker.pkg.dev/p/r/n@sha256:' + '0' * 64,
      'python: :3.12 n@sha256:0 /n',
    ),
    (Sky, 'infra', 'gcp gcp/us-east5 gcp/us-east5/us-east5-b k8s/a/b/c@d:e */*/z', 'banana gcp/ '
     'gcp/a/b/c /us-east5'),
    (Slurm, 'time', '90 90:00 2:00:00 2-12 2-12:30 2-12:30:00 UNLIMITED', 'banana 2d 1-2-3 -1'),
    (Slurm, 'partition', 'gpu gpu,long.2', 'gpu, ,'),
  ],
)  # fmt: skip
def test_the_syntax_of_fields(engine, field, right, wrong):
  for text in right.split():
    engine(**{field: text})
  for text in wrong.split():
    with pytest.raises(InputError, match=f'{field} = '):
      engine(**{field: text})


def test_a_cloud_that_is_none_names_the_nearest():
  with pytest.raises(InputError, match='did you mean gcp'):
    Sky(infra='gpc/us-east5')


@pytest.mark.parametrize('name', ENGINES_READY)
@pytest.mark.parametrize('field', ['overrides', 'run_dir', 'experiment', 'options'])
@pytest.mark.parametrize('text', ['a\nb', 'a\0b', '\x1b[2J', '\ud800', 'a\u2028b'], ids=ascii)
def test_no_job_holds_control_characters(name, field, text):
  value = {'overrides': [('data.corpus.path', text)], 'options': (('code', text),)}.get(field, text)
  one = job('h100:8' if name == 'slurm' else 'v6e-8', GIT, name='x', **{field: value})
  with pytest.raises(InputError, match='without control characters'):
    ENGINES_READY[name].check(one)


@pytest.mark.parametrize('name', ['é' * 105, 'a/' + 'b' * 200])
def test_a_name_is_short_enough_for_the_job_files(name):
  with pytest.raises(InputError, match=r'run\.name = .*199 bytes'):
    Slurm().check(job('h100:8', GIT, name=name))


def test_folders_of_any_name_stay_in_their_directive():
  text = next(iter(Slurm().files(job('h100:8', GIT, run_dir=f'{HARD} %j')).values()))
  (line,) = (line for line in text.splitlines() if '--output' in line)
  assert '%%j/gpt2-tiny.%j.log' in line
  task = Sky(managed=False).task(job('a100:4', GIT, run_dir=HARD, overrides=[('a.b', HARD)]))
  assert yaml.safe_load(yaml.safe_dump(task)) == task


# ---- commands ----------------------------------------------------------------------------------

SLURM = ['launch', 'slurm', 'llama3-tiny', '--target', 'h100:8']


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A working folder, and an sbatch that fails as sbatch does."""
  bin_, home = tmp_path / 'bin', tmp_path / 'home'
  bin_.mkdir()
  home.mkdir()
  (bin_ / 'sbatch').write_text(
    '#!/bin/bash\necho queued\necho "sbatch: error: invalid partition" >&2; echo >&2; exit 1\n'
  )
  (bin_ / 'sbatch').chmod(0o755)
  monkeypatch.setenv('PATH', f'{bin_}:/usr/bin:/bin')
  monkeypatch.chdir(home)
  return home


def test_what_a_command_prints_on_failure_is_passed_on_in_one_line(folder, capfd):
  assert main([*SLURM, '--yes', '--json']) == 1
  out, err = capfd.readouterr()
  assert out == ''
  assert err.splitlines()[-1] == (
    'error: sbatch runs/llama3-tiny.sbatch exited with code 1: sbatch: error: invalid partition'
  )


def test_a_step_or_weights_that_cannot_be_are_refused(folder, capsys):
  start = [*SLURM, '--dry-run']
  for option, value in (('--resume-from', '-1'), ('--init-from', '')):
    assert main([*start, option, value]) == 2
    assert option in capsys.readouterr().err


def test_job_files_replace_only_those_of_the_same_run(folder, capsys):
  runs = folder / 'runs'
  assert main([*SLURM, '--yes']) == 1
  before = (runs / 'llama3-tiny.sbatch').read_text()
  assert main([*SLURM, '--yes', '--slurm.time', '60']) == 1
  assert (runs / 'llama3-tiny.sbatch').read_text() != before
  (runs / 'llama3-tiny-seed-1.sbatch').write_text('mine')
  kept = contents(folder)
  capsys.readouterr()
  assert main([*SLURM, '--yes', '--sweep', 'training.seed=0,1']) == 2
  assert 'llama3-tiny-seed-1.sbatch: exists and is no job file' in capsys.readouterr().err
  assert contents(folder) == kept


def test_files_that_cannot_all_be_written_are_not_left(folder, capsys):
  (folder / 'runs').write_text('')
  assert main([*SLURM, '--yes']) == 2
  assert 'cannot be written' in capsys.readouterr().err
  assert [p.name for p in folder.iterdir()] == ['runs']


def test_launch_fits_a_layer_of_ones_own_to_a_size(folder, capsys):
  Path('mine.py').write_text(
    'from jaxformer.layers.attention import Attention\n'
    'class Mine(Attention):\n  class Config(Attention.Config):\n    pass\n'
  )
  words = ['mine.py:Mine.Config', '--target', 'h100:8', '--params', '2M', '--dry-run', '--json']
  assert main(['launch', 'slurm', *words]) == 0
  told = json.loads(capsys.readouterr().out)
  (one,) = told['jobs']
  assert one['params'] == pytest.approx(2e6, rel=0.02)
  assert one['train'][2].endswith('/mine.py:Mine.Config')
  assert '--params=2M' in one['train']
  assert list(told['user_files']) == ['mine.py']
  script = told['files'][f'runs/{one["name"]}.sbatch']
  assert script.count('mine.py') == 2  # its hash and its training
  assert subprocess.run(['bash', '-n'], input=script, text=True, check=False).returncode == 0


# ---- sweeps ------------------------------------------------------------------------------------

SWEEPS = [
  ['optimizer.learning-rate=1e-3,3e-2', 'optimizer=AdamW,Muon'],
  ['optimizer=AdamW,Lion', 'optimizer.beta2=0.9,0.99'],
  ['schedule=WSD,Cosine', 'schedule.warmup=5,7'],
  ['data.corpus=StandardLibrary', 'data.corpus.max_files=3,4'],
]


@pytest.mark.parametrize('sweeps', SWEEPS, ids=lambda s: s[0])
@pytest.mark.parametrize('backwards', [False, True])
def test_runs_of_a_sweep_train_what_their_names_say(sweeps, backwards, folder, capsys):
  import jaxformer as jf

  words = [w for s in (sweeps[::-1] if backwards else sweeps) for w in ('--sweep', s)]
  code = main([*SLURM, '--dry-run', '--json', '--run.name', 'x', *words])
  out, err = capsys.readouterr()
  if 'max_files' in sweeps[1]:  # a field that is none is named
    assert code == 2
    assert 'max_files' in err
    return
  found = set()
  for one in json.loads(out)['jobs']:
    pairs = [w.removeprefix('--').split('=', 1) for w in one['train'][3:]]
    e = jf.experiment('llama3-tiny', overrides=pairs)
    for path, text in pairs:
      if path in ('optimizer', 'schedule'):
        assert getattr(e, path).tag == text
      elif path.startswith(('optimizer.', 'schedule.')):
        section, field = path.split('.')
        assert getattr(getattr(e, section), field) == float(text)
    found.add(one['name'])
  assert len(found) == 4


@pytest.mark.parametrize(
  ('sweeps', 'problem'),
  [
    (['optimizer=AdamW,AdamW'], 'given twice'),
    (['optimizer.learning-rate=1e-3,0.001'], 'would train the same'),
    (['optimizer=SGD', 'optimizer.beta2=0.9,0.99'], 'optimizer.beta2'),
  ],
)
def test_a_sweep_that_loses_a_setting_is_refused(sweeps, problem, folder, capsys):
  assert main([*SLURM, '--yes', *(w for s in sweeps for w in ('--sweep', s))]) == 2
  err = capsys.readouterr().err
  assert problem in err
  assert err.count('\n') == 1
  assert contents(folder) == {}
