"""What the tools themselves say of the job files, without a network or an account. `pip install
'skypilot>=0.14,<0.15' 'xpk>=1.16,<2'` in an environment of its own, with its `bin` on the path, and
nothing of sky and xpk is skipped."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from jaxformer.launch.engine import shape
from jaxformer.launch.sky import to_yaml
from tests.launch.jobs import CASES, GIT, HARD, job
from tests.launch.test_files import KNOWN, commands

pytestmark = pytest.mark.launchers
HERE = Path(__file__).parent


def of(engine):
  return [case for case in CASES if case.startswith(engine)]


def tool(name):
  found = shutil.which(name)
  if found is None:
    pytest.skip(f'{name} is not on the path')
  return found


def start(words, folder, **env):
  quiet = {'SKYPILOT_DISABLE_USAGE_COLLECTION': '1', 'HOME': str(folder), 'PYTHONPATH': ''}
  return subprocess.run(
    list(map(str, words)),
    cwd=folder,
    env=os.environ | quiet | env,
    capture_output=True,
    text=True,
    check=False,
    timeout=180,
  )


MISSPELT = {
  'task': 'num_nods',
  'resources': 'use_spott',
  'accelerator_args': 'runtime_versions',
  'job_recovery': 'recover_on_exit_code',
}


def spoilt(part):
  """A good task with one field misspelt."""
  engine, one = CASES['sky-tpu-spot']
  task = engine.task(one)
  place = (
    task
    if part == 'task'
    else task['resources']
    if part == 'resources'
    else task['resources'][part]
  )
  place[MISSPELT[part]] = 1
  return task


@pytest.fixture(scope='module')
def verdicts(tmp_path_factory):
  """Why SkyPilot refuses a task, or '', by name; one process asks for all of them."""
  python, folder = Path(tool('sky')).with_name('python'), tmp_path_factory.mktemp('tasks')
  engine, one = CASES['sky-tpu-spot']
  wrong = engine.task(one)
  wrong['resources']['job_recovery']['recover_on_exit_codes'] = [300]
  tasks = (
    {case: CASES[case][0].task(CASES[case][1]) for case in of('sky')}
    | {part: spoilt(part) for part in MISSPELT}
    | {'wrong value': wrong}
  )
  for name, task in tasks.items():
    (folder / f'{name}.yaml').write_text(to_yaml(task))
  done = start(
    [python, HERE / 'sky_check.py', *(folder / f'{name}.yaml' for name in tasks)], folder
  )
  assert done.returncode == 0, done.stderr
  return {Path(file).stem: said for file, said in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize('case', of('sky'))
def test_skypilot_accepts(case, verdicts):
  assert verdicts[case] == ''


@pytest.mark.parametrize('part', MISSPELT)
def test_skypilot_refuses_a_misspelt_field(part, verdicts):
  assert MISSPELT[part] in verdicts[part]


def test_skypilot_refuses_a_wrong_value(verdicts):
  assert '300 is greater than the maximum of 255' in verdicts['wrong value']


@pytest.mark.parametrize(
  'command', [name for name in KNOWN if name.split()[0] in ('xpk', 'gcloud') or 'launch' in name]
)
def test_the_flags_that_we_know_are_those_of_the_tool(command, tmp_path):
  tool(command.split()[0])
  done = start([*command.split(), '--help'], tmp_path)
  assert done.returncode == 0, done.stderr
  plain = re.sub(r'\x1b\[[0-9;]*m', '', done.stdout)  # gcloud writes in bold
  assert set(re.findall(r'(?<![\w-])--[a-z][a-z0-9-]+', plain)) >= KNOWN[command]


def xpk(words, folder):
  assert words[0] == 'xpk'
  project = (
    [] if any(w.startswith('--project') for w in words) else ['--project=p', '--zone=us-east5-b']
  )
  return start([tool('xpk'), *words[1:], *project, '--dry-run', '--skip-validation'], folder)


@pytest.mark.parametrize('case', of('xpk'))
def test_xpk_makes_a_job_set(case, tmp_path):
  engine, one = CASES[case]
  done = xpk(engine.arguments(one), tmp_path)
  assert done.returncode == 0, done.stdout + done.stderr
  for part in ('kind: JobSet', f'name: {one.short_name()}', f'maxRestarts: {engine.max_restarts}'):
    assert part in done.stdout
  if one.tpu:
    assert one.train in done.stdout
    assert f'cloud.google.com/gke-tpu-topology: {shape(one.target)}\n' in done.stdout
    assert re.search(r'operator: NotIn\s+values: \[42,75,127,', done.stdout)
    assert f'terminationGracePeriodSeconds: {engine.grace_seconds}' in done.stdout
    assert f'replicas: {one.target.slices}\n' in done.stdout


def test_xpk_carries_any_argument(tmp_path):
  engine, _ = CASES['xpk-git']
  one = job('v6e-8', GIT, overrides=[('data.corpus.path', HARD)])
  done = xpk(engine.arguments(one), tmp_path)
  assert done.returncode == 0, done.stdout + done.stderr
  assert engine.container_command(one) in done.stdout


@pytest.mark.parametrize(
  ('right', 'wrong'),
  [
    ('--tpu-type=', '--tpu-typ3='),
    ('--tpu-type=v5p-4x4x4', '--tpu-type=v5p-4x4x3'),
    ('--restart-on-exit-codes=75', '--restart-on-codes=75'),
    ('--priority=medium', '--priority=mediun'),
    ('--workload=gpt2-tiny', '--workload=GPT_2'),
  ],
)
def test_xpk_refuses_what_is_misspelt(right, wrong, tmp_path):
  engine, one = CASES['xpk-git']
  words = [w.replace(right, wrong) for w in engine.arguments(one)]
  assert words != engine.arguments(one)
  done = xpk(words, tmp_path)
  assert done.returncode != 0
  assert 'xpk' in done.stderr


def lint(command, folder):
  done = start(
    [
      tool('gcloud'),
      'meta',
      'lint-gcloud-commands',
      f'--command-string={command}',
      '--format=json',
    ],
    folder,
  )
  assert done.returncode == 0, done.stderr
  said, _ = json.JSONDecoder().raw_decode(done.stdout)  # an empty list follows
  return said[0]['success']


@pytest.mark.parametrize('case', of('gcloud'))
def test_gcloud_knows_the_commands(case, tmp_path):
  engine, one = CASES[case]
  found = [words for text in engine.files(one).values() for words in commands(text)]
  assert found
  for words in found:
    # not by the shell
    plain = [
      w if '$' not in w else f'{w.partition("=")[0]}=x' if w.startswith('--') else 'x'
      for w in words
    ]
    assert lint(shlex.join(plain), tmp_path), words


def test_gcloud_refuses_a_misspelt_flag(tmp_path):
  engine, one = CASES['gcloud-spot']
  assert not lint(
    shlex.join(engine.create(one)).replace('--accelerator-type', '--accelerator-typ'), tmp_path
  )
