"""The files and commands of each engine: golden, of known fields and flags, and quoted so that what
was asked for arrives."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from jaxformer.config import InputError
from jaxformer.launch import ENGINES, XPK, CodeSource, GCloud, Sky, Slurm, source_of
from jaxformer.launch.sky import to_yaml
from jaxformer.launch.sweep import grid
from jaxformer.launch.user_files import user_files
from tests.launch.jobs import CASES, FOLDER, GIT, HARD, INSTALLED, WHEEL, job

pytestmark = pytest.mark.quick
HERE = Path(__file__).parent
GOLDEN = HERE / 'golden'
# What each tool takes: of sky and xpk as their --help and schema say (skypilot 0.14.1, xpk 1.16.0;
# test_tools holds it to them), of gcloud and sbatch as their reference pages do.
KNOWN = {name: set(words) for name, words in json.loads((HERE / 'flags.json').read_text()).items()}
FILES = [
  (case, path, text)
  for case, (engine, one) in CASES.items()
  for path, text in engine.files(one).items()
]


def ids(value):
  return value if isinstance(value, str) and len(value) < 30 else getattr(value, 'name', '')


@pytest.mark.parametrize(('case', 'path', 'text'), FILES, ids=ids)
def test_golden(case, path, text):
  file = GOLDEN / f'{case}.{path.name.partition(".")[2]}'
  if os.environ.get('JAXFORMER_UPDATE_GOLDEN'):
    file.write_text(text)
  assert file.read_text() == text


def test_every_golden_file_has_a_case():
  assert {f.name for f in GOLDEN.iterdir()} == {
    f'{case}.{path.name.partition(".")[2]}' for case, path, _ in FILES
  }


@pytest.mark.parametrize('case', CASES)
def test_checked(case):
  engine, one = CASES[case]
  engine.check(one)


# ---- fields and flags --------------------------------------------------------------------------


def unknown_fields(task):
  """Fields of a SkyPilot task that SkyPilot does not have."""
  resources = task.get('resources', {})
  parts = {
    'task': task,
    'resources': resources,
    **{k: resources.get(k, {}) for k in ('accelerator_args', 'job_recovery')},
  }
  return {
    name for part, value in parts.items() for name in value if name not in KNOWN[f'sky {part}']
  }


def commands(text):
  """The commands of a script as words, continued lines joined and variables left as they stand."""
  lines = [line.strip() for line in text.replace('\\\n', ' ').splitlines()]
  return [shlex.split(line) for line in lines if line.startswith(('xpk', 'gcloud compute'))]


def unknown_flags(words):
  start = next(
    name for name in sorted(KNOWN, key=len, reverse=True) if ' '.join(words).startswith(name)
  )
  return {w.partition('=')[0] for w in words if w.startswith('--')} - KNOWN[start]


@pytest.mark.parametrize('case', [c for c in CASES if c.startswith('sky')])
def test_sky_fields(case):
  engine, one = CASES[case]
  task = engine.task(one)
  assert unknown_fields(task) == set()
  assert yaml.safe_load(to_yaml(task)) == task
  assert unknown_flags(engine.command(one)) == set()


def test_a_misspelt_field_or_flag_is_seen():
  task = CASES['sky-tpu-spot'][0].task(CASES['sky-tpu-spot'][1])
  recovery = task['resources']['job_recovery'] | {'recover_on_exit_code': [75]}
  resources = task['resources'] | {'use_spott': True, 'job_recovery': recovery}
  assert unknown_fields(task | {'num_nods': 1, 'resources': resources}) == {
    'num_nods',
    'use_spott',
    'recover_on_exit_code',
  }
  assert unknown_flags(['xpk', 'workload', 'create', '--tpu-typ=v6e-16']) == {'--tpu-typ'}


@pytest.mark.parametrize(
  ('case', 'path', 'text'), [f for f in FILES if f[1].suffix == '.sh'], ids=ids
)
def test_flags(case, path, text):
  found = commands(text)
  assert found or path.name.endswith('startup.sh')
  assert [unknown_flags(words) for words in found] == [set()] * len(found)


@pytest.mark.parametrize(
  ('case', 'path', 'text'), [f for f in FILES if f[1].suffix == '.sbatch'], ids=ids
)
def test_sbatch_directives(case, path, text):
  head, _, body = text.partition('\n\n')  # sbatch reads directives up to the first command
  flags = [line.removeprefix('#SBATCH ').partition('=')[0] for line in head.splitlines()[1:]]
  assert set(flags) <= KNOWN['sbatch']
  assert {'--requeue', '--signal', '--ntasks-per-node', '--nodes', '--gres'} <= set(flags)
  assert '#SBATCH' not in body


@pytest.mark.parametrize(('case', 'path', 'text'), FILES, ids=ids)
def test_shell_syntax(case, path, text):
  task = yaml.safe_load(text) if path.suffix == '.yaml' else {}
  for script in [task['setup'], task['run']] if task else [text]:
    done = subprocess.run(['bash', '-n'], input=script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, '')


# ---- what arrives ------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path):
  """A machine of stand-ins: `jaxformer` writes its arguments to a file, `srun` starts what it is
  given, the rest does nothing."""
  bin_ = tmp_path / 'bin'
  bin_.mkdir()
  home = tmp_path / 'home'
  home.mkdir()
  # The arguments, each ended by a zero byte.
  (bin_ / 'jaxformer').write_text(
    f'#!/bin/bash\nprintf "%s\\0" "$@" > {tmp_path}/arguments\nexit 0\n'
  )
  for tool in ('uv', 'python', 'srun', 'curl', 'gcloud', 'sleep'):
    (bin_ / tool).write_text('#!/bin/bash\nif [ "${0##*/}" = srun ]; then exec "$@"; fi\n')
  for file in bin_.iterdir():
    file.chmod(0o755)

  def run(script):
    env = {'PATH': f'{bin_}:/usr/bin:/bin', 'HOME': str(home)}
    done = subprocess.run(
      ['bash', '-c', script],
      cwd=home,
      env=env,
      capture_output=True,
      text=True,
      check=False,
      timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return (tmp_path / 'arguments').read_text().split('\0')[:-1], home

  return run


def there(text, home='/nowhere'):
  """The script of a TPU machine, in the home folder instead."""
  return (
    text.replace('/var/log/jaxformer.log', '"$HOME"/log')
    .replace('export HOME=/root\ncd /root', '')
    .replace('/root/jaxformer-env', '"$HOME"/env')
  )


def of_file(file, target='v6e-8', source=GIT, **more):
  """A job of an experiment file."""
  return job(target, source, experiment=str(file), files=user_files(str(file), ()), **more)


def script_of(engine, one):
  """What one machine runs, of setup and training."""
  if isinstance(engine, Sky):
    return engine.task(one)['setup'] + engine.task(one)['run']
  if isinstance(engine, XPK):
    return engine.container_command(one)
  return there(list(engine.files(one).values())[-1])


ENGINES_READY = {'sky': Sky(), 'xpk': XPK(cluster='c'), 'gcloud': GCloud(), 'slurm': Slurm()}


@pytest.mark.parametrize('name', ENGINES_READY)
def test_arguments_arrive_as_they_were_given(name, machine):
  engine = ENGINES_READY[name]
  one = job(
    'h100:8' if name == 'slurm' else 'v6e-8',
    GIT,
    overrides=[('data.corpus.path', HARD), ('model.width', '64')],
  )
  engine.check(one)
  arguments, _ = machine(script_of(engine, one))
  assert arguments == [
    'train',
    'gpt2-tiny',
    f'--data.corpus.path={HARD}',
    '--model.width=64',
    '--run.name=gpt2-tiny',
    '--run.dir=gs://bucket/runs',
  ]


@pytest.mark.parametrize('name', ENGINES_READY)
def test_a_file_of_the_user_is_written_there(name, machine, tmp_path):
  text = f"# {HARD}\nEXPERIMENT = 1\nexperiment = '''\n  $x\n'''\n"
  file = tmp_path / 'my question.py'
  file.write_text(text)
  one = of_file(file, 'h100:8' if name == 'slurm' else 'v6e-8')
  arguments, home = machine(script_of(ENGINES_READY[name], one))
  assert arguments[:2] == ['train', f'{one.files_folder}/my question.py']
  assert (home / one.files_folder / 'my question.py').read_text() == text


def test_the_command_of_xpk_is_one_line_in_the_script_as_well(tmp_path):
  one = job('v6e-8', GIT, overrides=[('data.corpus.path', HARD)])
  engine = ENGINES_READY['xpk']
  text = next(iter(engine.files(one).values()))
  (tmp_path / 'xpk').write_text('#!/bin/bash\nprintf "%s\\0" "$0" "$@"\n')
  (tmp_path / 'xpk').chmod(0o755)
  done = subprocess.run(
    ['bash', '-c', text],
    env={'PATH': f'{tmp_path}:/usr/bin:/bin'},
    capture_output=True,
    text=True,
    check=True,
  )
  words = done.stdout.split('\0')[1:-1]
  assert words == engine.arguments(one)[1:]
  assert '\n' not in words[-1]


# ---- names, targets, sources, sweeps -----------------------------------------------------------


def test_names_are_what_clusters_take_and_stay_apart():
  def short(name):
    return job('v6e-8', GIT, name=name).short_name()

  assert short('gpt2-tiny') == 'gpt2-tiny'
  assert short('study/LR_3e-4') == 'study-lr-3e-4'
  assert short('7b') == 'run-7b'
  long = [short(f'{"a" * 60}{i}') for i in range(20)]
  assert len(set(long)) == 20
  assert all(re.fullmatch(r'[a-z]([-a-z0-9]*[a-z0-9])?', n) and len(n) < 40 for n in long)


@pytest.mark.parametrize(
  ('target', 'sky', 'xpk', 'gcloud'),
  [
    ('v4-64', 'tpu-v4-64', 'v4-2x4x4', ('v4-64', 'tpu-ubuntu2204-base')),
    ('v5e-64', 'tpu-v5litepod-64', 'v5litepod-64', ('v5litepod-64', 'v2-alpha-tpuv5-lite')),
    ('v5p-2048', 'tpu-v5p-2048', 'v5p-8x8x16', ('v5p-2048', 'v2-alpha-tpuv5')),
    ('v6e-256', 'tpu-v6e-256', 'v6e-256', ('v6e-256', 'v2-alpha-tpuv6e')),
  ],
)
def test_names_of_slices(target, sky, xpk, gcloud):
  one = job(target, GIT)
  assert Sky().task(one)['resources']['accelerators'] == {sky: 1}
  assert Sky().task(one)['resources']['accelerator_args'] == {'runtime_version': gcloud[1]}
  assert f'--tpu-type={xpk}' in XPK(cluster='c').arguments(one)
  assert {f'--accelerator-type={gcloud[0]}', f'--runtime-version={gcloud[1]}'} <= set(
    GCloud().create(one)
  )


def test_a_topology_that_the_size_does_not_say():
  one = job('v5p:4x4x16', GIT)
  assert '--tpu-type=v5p-4x4x16' in XPK(cluster='c').arguments(one)
  assert {'--type=v4', '--topology=4x4x16'} <= set(GCloud().create(job('v4:4x4x16', GIT)))
  for engine in (Sky(), GCloud()):
    with pytest.raises(InputError, match=r'4x4x16 is not .* by their size'):
      engine.check(one)


@pytest.mark.parametrize(
  ('target', 'nodes', 'gpus'),
  [('h100:8', 1, 8), ('h100:16', 2, 8), ('2xh100:8', 2, 8), ('a100:4', 1, 4), ('h100-nvl:4', 2, 2)],
)
def test_nodes_of_gpus(target, nodes, gpus):
  text = next(iter(Slurm().files(job(target, INSTALLED)).values()))
  assert f'--nodes={nodes}\n' in text
  assert f'--ntasks-per-node={gpus}\n' in text
  assert f':{gpus}\n' in text


def test_sources(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'pyproject.toml').write_text('[project]\nname = "jaxformer"\nversion = "3"')
  (tmp_path / 'a.whl').write_text('')
  assert source_of('git+https://h/r@0123abc') == CodeSource('git', 'git+https://h/r@0123abc')
  assert source_of('git+ssh://git@h/r@0123abc') == CodeSource('git', 'git+ssh://git@h/r@0123abc')
  assert source_of('a.whl') == CodeSource('wheel', 'a.whl')
  assert source_of(WHEEL) == CodeSource('wheel', WHEEL)
  assert source_of('.') == FOLDER
  assert source_of('installed') == INSTALLED
  for wrong in ('git+https://h/r', 'git+ssh://git@h/r', 'b.whl', 'nowhere', 'jaxformer', '/', '\0'):
    with pytest.raises(InputError, match='--source'):
      source_of(wrong)


def test_a_wheel_here_goes_along():
  task = Sky().task(job('v6e-8', CodeSource('wheel', 'dist/j-0.1-py3-none-any.whl')))
  assert task['file_mounts'] == {'~/j-0.1-py3-none-any.whl': 'dist/j-0.1-py3-none-any.whl'}
  assert (
    """uv pip install --quiet --python "$HOME/jaxformer-env" "$HOME"/'j-0.1-py3-none-any.whl[tpu,storage]'"""
    in task['setup']
  )
  words = XPK(cluster='c').arguments(
    job('v6e-8', CodeSource('wheel', 'dist/j-0.1-py3-none-any.whl'))
  )
  assert '--script-dir=dist' in words
  assert "./'j-0.1-py3-none-any.whl[tpu,storage]'" in words[-1]
  with pytest.raises(InputError, match='gcloud needs a wheel that is at gs:// or at https://'):
    GCloud().check(job('v6e-8', CodeSource('wheel', 'dist/j.whl')))
  with pytest.raises(InputError, match='sky needs a wheel that is a file or at https://'):
    Sky().check(job('v6e-8', CodeSource('wheel', WHEEL)))


def test_sweeps_are_products_with_names_of_their_own():
  assert grid([]) == [('', ())]
  points = grid(['optimizer.learning-rate=1e-3,3e-4', 'training.seed=0,1'])
  assert [name for name, _ in points] == [
    '-learning_rate-1e-3-seed-0',
    '-learning_rate-1e-3-seed-1',
    '-learning_rate-3e-4-seed-0',
    '-learning_rate-3e-4-seed-1',
  ]
  assert points[2][1] == (('optimizer.learning_rate', '3e-4'), ('training.seed', '0'))
  assert [name for name, _ in grid(['a.x=1', 'b.x=2'])] == ['-a.x-1-b.x-2']


@pytest.mark.parametrize(
  'sweeps',
  [
    ['training.seed'],
    ['training.seed='],
    ['=1'],
    ['training.seed=0,,1'],
    ['training.seed=1,1'],
    ['training.seed=0', 'training.seed=1'],
    ['run.name=a,b'],
  ],
)
def test_sweeps_that_cannot_be(sweeps):
  with pytest.raises(InputError, match='--sweep'):
    grid(sweeps)


def test_yaml_reads_back():
  value = {
    'plain': 'a-b_c.d/e',
    'number': '75',
    'off': 'off',
    'colon': 'a: b',
    'empty': '',
    'tilde': '~',
    'one': 1,
    'float': 0.5,
    'no': False,
    'list': ['a b', 3, 'yes'],
    'block': 'a\n\n  b: #c\n',
    'indented': '  a\nb\n',
    'under': {'tpu-v6e-16': 1, '~/x': 'y'},
  }
  assert yaml.safe_load(to_yaml(value)) == value


def test_no_launcher_is_needed_to_train():
  package = HERE.parent.parent / 'jaxformer'
  loads = re.compile(r'^\s*(import|from) (sky|xpk|submitit|googleapiclient|google)\b', re.MULTILINE)
  assert [str(f) for f in package.rglob('*.py') if loads.search(f.read_text())] == []


def test_the_command_line_names_the_engines():
  from jaxformer.cli.launch import ENGINES as NAMES

  assert tuple(ENGINES) == NAMES


def test_names_of_swept_runs_are_safe_and_apart():
  def names(*sweeps):
    return [name for name, _ in grid(sweeps)]

  for values in ('1e-3,1e+3', '1,-1', 'a b,a;b', 'A,a', f'{"x" * 300}1,{"x" * 300}2'):
    found = names(f'a.b={values}')
    short = {job('v6e-8', GIT, name=f'run{name}').short_name() for name in found}
    assert len(short) == len(found) == 2
    assert all(re.fullmatch(r'-[\w.+-]+', n, re.ASCII) and len(n) <= 100 for n in found)
  assert [point[0][1] for _, point in grid(['a.b=[1,2],[3,4]'])] == ['[1,2]', '[3,4]']
  assert [point[0][1] for _, point in grid(['a.b={"c":"x,y"},2'])] == ['{"c":"x,y"}', '2']
