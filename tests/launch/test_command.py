"""`jaxformer launch` from the words to the tool. Stand-ins of the tools are on the path: what they
are called with counts."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxformer.cli import main
from jaxformer.installation import installation
from jaxformer.training import read_metrics
from tests.e2e.program import SMALL, environment, last
from tests.launch.jobs import CASES
from tests.launch.test_files import there
from tests.tiers import thorough

SLURM = ['launch', 'slurm', 'gpt2-tiny', '--target', 'h100:8']
SKY = [
  'launch',
  'sky',
  'gpt2-tiny',
  '--target',
  'v6e-16',
  '--spot',
  '--run.dir',
  'gs://bucket/runs',
  '--training.batch-size',
  '16',
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
  home = tmp_path / 'home'
  home.mkdir()
  monkeypatch.chdir(home)
  return home


@pytest.fixture
def tools(tmp_path, monkeypatch):
  """Puts scripts on the path: `tools(sky='exit 0')`. Each writes its arguments to `calls` first."""
  bin_, calls = tmp_path / 'bin', tmp_path / 'calls'
  bin_.mkdir()
  calls.write_text('')
  monkeypatch.setenv('PATH', f'{bin_}:/usr/bin:/bin')

  def add(**scripts):
    for name, body in scripts.items():
      (bin_ / name).write_text(f'#!/bin/bash\necho {name} "$@" >> {calls}\n{body}\n')
      (bin_ / name).chmod(0o755)
    return lambda: calls.read_text().splitlines()

  return add


def empty_path(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path / 'nothing'))


def on_terminal(monkeypatch, typed):
  class Terminal:
    def isatty(self):
      return True

    def readline(self):
      return typed

  monkeypatch.setattr(sys, 'stdin', Terminal())


# ---- what is said, asked and started -----------------------------------------------------------


@pytest.mark.quick
def test_a_dry_run_prints_file_and_plan_and_writes_nothing(folder, tools, capsys):
  calls = tools(sky='exit 0')
  assert main([*SKY, '--dry-run']) == 0
  out, err = capsys.readouterr()
  assert '==== runs/gpt2-tiny.sky.yaml ====\nname: gpt2-tiny\n' in out
  assert 'price per hour: $43.20, on demand' in out  # 16 chips at $2.70
  assert re.search(r'memory per device: about 0\.0\d+ GB of 33\.6, fits', out)
  assert err == ''
  assert list(folder.iterdir()) == calls() == []


@pytest.mark.quick
def test_json_is_one_value_with_files_commands_and_price(folder, capsys):
  assert main([*SKY, '--dry-run', '--json', '--sweep', 'training.seed=0,1']) == 0
  value = json.loads(capsys.readouterr().out)
  assert [j['name'] for j in value['jobs']] == ['gpt2-tiny-seed-0', 'gpt2-tiny-seed-1']
  assert list(value['files']) == [
    'runs/gpt2-tiny-seed-0.sky.yaml',
    'runs/gpt2-tiny-seed-1.sky.yaml',
  ]
  assert value['jobs'][1]['command'] == [
    'sky',
    'jobs',
    'launch',
    '--yes',
    '--detach-run',
    'runs/gpt2-tiny-seed-1.sky.yaml',
  ]
  assert value['price'] == pytest.approx(sum(j['price'] for j in value['jobs']))
  assert value['price'] > 0
  # every device has a copy
  assert value['jobs'][0]['memory_bytes_per_device'] > 16 * value['jobs'][0]['params']


@pytest.mark.quick
def test_an_estimate_over_the_memory_is_said(folder, capsys):
  words = [
    '--run.dir',
    'gs://b/r',
    '--mesh.fsdp',
    '16',
    '--mesh.data',
    '1',
    '--training.batch-size',
    '256',
    '--data.sequence-length',
    '2048',
    '--training.remat',
    'none',
    '--training.accumulate',
    '1',
  ]
  assert main(['launch', 'sky', 'llama2-7b', '--target', 'v6e-16', *words, '--dry-run']) == 0
  assert 'GB too much: use --training.remat full' in capsys.readouterr().out


@pytest.mark.quick
def test_a_sweep_is_a_job_a_value_with_the_price_of_all(folder, tools, capsys):
  calls = tools(sky='exit 0')
  assert (
    main(
      [
        *SKY,
        '--yes',
        '--sweep',
        'optimizer.learning-rate=1e-3,3e-4',
        '--sweep',
        'training.seed=0,1',
      ]
    )
    == 0
  )
  names = [
    f'gpt2-tiny-learning_rate-{rate}-seed-{seed}' for rate in ('1e-3', '3e-4') for seed in (0, 1)
  ]
  assert calls() == [f'sky jobs launch --yes --detach-run runs/{name}.sky.yaml' for name in names]
  text = (folder / 'runs' / f'{names[2]}.sky.yaml').read_text()
  assert f'--optimizer.learning_rate=3e-4 --training.seed=0 --run.name={names[2]}' in text
  assert '4 runs' in capsys.readouterr().err


@pytest.mark.quick
@pytest.mark.parametrize(
  ('typed', 'started'), [('y\n', True), ('yes\n', True), ('n\n', False), ('\n', False), ('', False)]
)
def test_it_asks_on_a_terminal(typed, started, folder, tools, monkeypatch, capsys):
  calls = tools(sky='exit 0')
  on_terminal(monkeypatch, typed)
  assert main(SKY) == 0
  assert bool(calls()) == (folder / 'runs').exists() == started
  err = capsys.readouterr().err
  assert err.index('price per hour') < err.index('start gpt2-tiny? [y/N]')
  assert ('nothing was started' in err) != started


@pytest.mark.quick
def test_it_does_not_start_where_it_cannot_ask(folder, tools, monkeypatch, capsys):
  calls = tools(sky='exit 0')
  monkeypatch.setattr(sys, 'stdin', io.StringIO('y\n'))
  assert main(SKY) == 2
  assert '--yes' in capsys.readouterr().err
  assert list(folder.iterdir()) == calls() == []


@pytest.mark.quick
@pytest.mark.parametrize(
  ('words', 'file', 'get'),
  [
    (SKY, 'runs/gpt2-tiny.sky.yaml', 'pip install'),
    (SLURM, 'runs/gpt2-tiny.sbatch', 'login node'),
    (['launch', 'xpk', *SKY[2:], '--xpk.cluster', 'c'], 'runs/gpt2-tiny.xpk.sh', 'pip install'),
    (
      ['launch', 'gcloud', *SKY[2:], '--source', 'git+https://h/r@1'],
      'runs/gpt2-tiny.startup.sh',
      'https://cloud.google.com/sdk',
    ),
  ],
)
def test_a_missing_tool_is_one_error_after_the_file_is_written(
  words, file, get, folder, tmp_path, monkeypatch, capsys
):
  empty_path(tmp_path, monkeypatch)
  assert main([*words, '--yes']) == 1
  out, err = capsys.readouterr()
  assert out == ''
  assert (folder / file).is_file()
  assert err.index(f'wrote {file}') < err.index('is not installed here')
  assert err.count('error: ') == 1
  assert get in err
  assert 'Traceback' not in err


@pytest.mark.quick
def test_a_tool_that_fails_is_an_error_and_ends_a_sweep(folder, tools, capsys):
  calls = tools(sky='exit 3')
  assert main([*SKY, '--yes', '--sweep', 'training.seed=0,1']) == 1
  assert 'gpt2-tiny-seed-0.sky.yaml exited with code 3' in capsys.readouterr().err
  assert len(calls()) == 1


# ---- Slurm: requeue ----------------------------------------------------------------------------

# A scheduler that runs the job at once, and again for as long as it is requeued.
SBATCH = """
export SLURM_JOB_ID=7 SLURM_RESTART_COUNT=0
while true; do
  bash "$1"; echo "ended $?" >> {calls}
  [ -e requeued ] || break
  rm requeued
  SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1))
done"""
SCONTROL = '[ "$1 $2" = "requeue 7" ] && touch requeued'


@pytest.mark.quick
@pytest.mark.parametrize(
  ('codes', 'seen'),
  [
    ([0], [0]),
    ([75, 75, 75, 75, 75, 0], [75, 75, 75, 75, 75, 0]),
    ([134, 75, 137, 0], [134, 75, 137, 0]),
    ([2], [2]),
    ([70], [70]),
    ([134, 134, 134, 134, 0], [134, 134, 134, 134]),
  ],
)
def test_slurm_requeues_what_was_preempted(codes, seen, folder, tools, tmp_path):
  """75 always, a process that a signal ended three times, anything else never."""
  (folder / 'codes').write_text(''.join(f'{code}\n' for code in codes))
  calls = tools(
    sbatch=SBATCH.format(calls=tmp_path / 'calls'),
    scontrol=SCONTROL,
    srun='code=$(head -1 codes); sed -i 1d codes; exit "$code"',
    jaxformer=f'echo jaxformer {installation().version}',
  )
  assert main([*SLURM, '--yes']) == 0
  assert [int(line.split()[1]) for line in calls() if line.startswith('ended')] == seen
  assert calls()[1:3] == [
    'jaxformer --version',
    'srun jaxformer train gpt2-tiny --run.name=gpt2-tiny --run.dir=runs',
  ]


@pytest.mark.e2e
@thorough
def test_slurm_requeues_a_real_run_that_goes_on_where_it_was(folder, tools, tmp_path, monkeypatch):
  """The first start is told to save as Slurm does, by USR2 to the processes of the step; the second
  one ends the run."""
  for name, value in environment(tmp_path / 'cache').items():
    if name.startswith(('PYTHONPATH', 'JAX')):
      monkeypatch.setenv(name, value)
  tell = """
"$@" & child=$!
if [ "$SLURM_RESTART_COUNT" = 0 ]; then
  until [ -s runs/gpt2-tiny/metrics.jsonl ]; do sleep 0.02; done
  kill -USR2 $child
fi
wait $child"""
  calls = tools(
    sbatch=SBATCH.format(calls=tmp_path / 'calls'),
    scontrol=SCONTROL,
    srun=tell,
    jaxformer=f'exec {sys.executable} -m jaxformer "$@"',
  )
  few = [
    *SMALL,
    '--training.steps',
    '400',
    '--training.eval-every',
    '400',
    '--training.checkpoint-every',
    '400',
  ]
  assert main([*SLURM, *last(few), '--yes']) == 0
  assert [line for line in calls() if line.startswith(('ended', 'scontrol'))] == [
    'scontrol requeue 7',
    'ended 75',
    'ended 0',
  ]
  assert [
    row['step'] for row in read_metrics(folder / 'runs' / 'gpt2-tiny') if 'train/loss' in row
  ] == list(range(1, 401))


# ---- queued resources --------------------------------------------------------------------------


@pytest.mark.quick
def test_gcloud_asks_again_for_what_was_preempted_until_the_run_is_over(
  folder, tools, monkeypatch, tmp_path
):
  monkeypatch.setenv('POLL_SECONDS', '0.01')
  (folder / 'states').write_text(
    '\nWAITING_FOR_RESOURCES\nACTIVE\nSUSPENDING\nSUSPENDED\nACTIVE\n\n'
  )
  calls = tools(
    gcloud=f'if [ "$4" = list ]; then head -1 {folder}/states; sed -i 1d {folder}/states; fi'
  )
  words = [
    'launch',
    'gcloud',
    *SKY[2:],
    '--source',
    'git+https://h/r@1',
    '--gcloud.zone',
    'us-east5-b',
    '--yes',
  ]
  assert main(words) == 0
  did = [line.split()[4] for line in calls()]
  assert did == ['list', 'create', *['list'] * 4, 'delete', 'create', 'list', 'list']
  assert (folder / 'runs' / 'gpt2-tiny.startup.sh').is_file()


def machine(tools, tmp_path, codes, case='gcloud-spot', setup='exit 0', worker=0):
  """Runs the script of a TPU machine where training ends with these codes; what was called, and the
  exit code."""
  engine, one = CASES[case]
  (tmp_path / 'codes').write_text(''.join(f'{code}\n' for code in codes))
  metadata = f'case "${{@: -1}}" in *agent-worker-number) echo {worker} ;; *zone) echo projects/1/zones/us-east5-a ;; esac'
  calls = tools(
    uv=setup,
    curl=metadata,
    gcloud='exit 0',
    sleep='exit 0',
    jaxformer=f'code=$(head -1 {tmp_path}/codes); sed -i 1d {tmp_path}/codes; exit "$code"',
  )
  home = tmp_path / 'machine'
  home.mkdir()
  done = subprocess.run(
    ['bash', '-c', there(engine.files(one)[Path('runs/gpt2-tiny.startup.sh')])],
    cwd=home,
    env=os.environ | {'HOME': str(home)},
    capture_output=True,
    text=True,
    check=False,
    timeout=60,
  )
  return [
    line.split()[0] if not line.startswith('gcloud') else ' '.join(line.split()[:5])
    for line in calls()
  ], done.returncode


AGAIN, BACK = 'jaxformer', 'gcloud compute tpus queued-resources delete'


@pytest.mark.quick
@pytest.mark.parametrize(
  ('codes', 'starts', 'code'),
  [
    ([0], 1, 0),
    ([75, 75, 75, 75, 75, 0], 6, 0),
    ([134, 75, 0], 3, 0),
    ([2], 1, 2),
    ([70], 1, 70),
    ([134] * 9, 4, 134),
  ],
)
def test_a_tpu_machine_goes_on_and_gives_itself_back(codes, starts, code, tools, tmp_path):
  did, found = machine(tools, tmp_path, codes)
  assert (did.count(AGAIN), found) == (starts, code)
  assert did[-1] == BACK


@pytest.mark.quick
def test_only_the_first_machine_gives_them_back(tools, tmp_path):
  did, _ = machine(tools, tmp_path, [0], worker=3)
  assert BACK not in did


@pytest.mark.quick
def test_machines_that_cannot_be_set_up_are_given_back(tools, tmp_path):
  did, code = machine(tools, tmp_path, [0], setup='exit 1')
  assert AGAIN not in did
  assert (did[-1], code) == (BACK, 1)


@pytest.mark.quick
def test_kept_machines_stay(tools, tmp_path):
  did, code = machine(tools, tmp_path, [2], case='gcloud-kept')
  assert did[-1] == AGAIN
  assert code == 2
