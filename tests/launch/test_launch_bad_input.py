"""What `jaxformer launch` cannot do is said in one message, with code 2, before a file is written
or a tool is called."""

import shlex

import pytest

from jaxformer.cli import main
from tests.e2e.program import contents

pytestmark = pytest.mark.quick
SKY = 'sky gpt2-tiny --training.batch-size 16 --run.dir gs://b/r --target v6e-16'
GIT = '--source git+https://h/r@1'

CASES = [
  ('skyy gpt2-tiny --target v6e-16', "'skyy'", 'did you mean sky?'),
  ('ray gpt2-tiny --target v6e-16', "'ray'", 'known: gcloud, sky, slurm, xpk'),
  ('sky', 'PRESET|FILE'),
  ('sky gpt2-tiny', '--target'),
  (f'{SKY} --targt x', "'--targt'", '--target'),
  ('sky gpt2-tiny --target v9-16', "'v9'", 'known: v4, v5e'),
  ('sky gpt2-tiny --target v6e', "'v6e'", 'v6e-256'),
  ('sky gpt2-tiny --target v6e-17', "'v6e-17'", 'v6e-16 or v6e-32'),
  (
    'xpk gpt2-tiny --target v5e-4 --run.dir gs://b/r --xpk.cluster c',
    'v5e-4',
    'of 8 chips and more',
  ),
  (
    'sky gpt2-tiny --run.dir gs://b/r --target v5p:4x4x16',
    '4x4x16 is not its standard topology',
    'by their size',
  ),
  ('sky gpt2-tinny --target v6e-16', "'gpt2-tinny'", 'did you mean gpt2-tiny'),
  ('sky missing.py --target v6e-16', "'missing.py'", 'No such file'),
  (f'{SKY} --model.widht 3', '--model.widht', 'did you mean width?'),
  (f'{SKY} --sky.infr x', '--sky.infr', 'did you mean infra?'),
  (f'{SKY} --xpk.cluster x', '--xpk.cluster', 'no such field'),
  (f'{SKY} --sky.disk-gb 0', 'disk_gb = 0', 'positive'),
  (f'{SKY} --utilization 1.5', 'utilization', '1.5'),
  (f'{SKY} --utilization 0', 'utilization'),
  # where it can run
  (
    'slurm gpt2-tiny --target v6e-16',
    "--target = 'v6e-16': slurm does not support v6e",
    'a100, h100',
  ),
  (f'gcloud gpt2-tiny --target h100:8 {GIT}', 'gcloud does not support h100', 'v4, v5e, v5p, v6e'),
  ('xpk gpt2-tiny --target a100:8 --xpk.cluster c', 'xpk does not support a100'),
  ('xpk gpt2-tiny --target h100:4 --run.dir gs://b/r --xpk.cluster c', 'h100:4', 'multiple of 8'),
  ('slurm gpt2-tiny --target h100:12', "'h100:12'", 'such as 8 or 16'),
  (
    f'{SKY.replace("v6e-16", "2xv6e-16")}',
    '2 x v6e-16',
    'does not connect slices',
    'xpk or gcloud',
  ),
  ('xpk gpt2-tiny --target v6e-16 --run.dir gs://b/r', 'xpk.cluster', '--xpk.cluster NAME'),
  (f'{SKY} --xpk.cluster x --xpk.zone z', '--xpk.cluster'),
  # whether it fits the chips
  (
    'sky gpt2-tiny --run.dir gs://b/r --target v6e-16',
    '16 devices',
    'batch_size = 8',
    'multiple of 16',
  ),
  (f'{SKY} --mesh.fsdp 3', '16 devices', 'fsdp 3'),
  (
    'sky llama2-7b --run.dir gs://b/r --target v6e-16 --training.batch-size 16 --mesh.data 16',
    '107.8 GB per device',
    '74.3 GB more',
    '--mesh.fsdp',
  ),
  (f'{SKY} --model.heads 5', 'heads = 5'),
  # where the run is kept
  ('sky gpt2-tiny --target v6e-8 --spot', "run.dir = 'runs'", 'gs://', 'spot'),
  (
    'sky gpt2-tiny --target v6e-16 --training.batch-size 16',
    "run.dir = 'runs'",
    'gs://',
    'do not share a disk',
  ),
  ('sky gpt2-tiny --target v6e-8', "run.dir = 'runs'", 'when the job is over'),
  (
    'sky gpt2-tiny --target v6e-8 --spot --run.dir gs://b/r --sky.managed false',
    'sky.managed',
    '--spot',
  ),
  (
    'sky gpt2-tiny --target v6e-8 --sky.managed false --sky.max-restarts 3',
    'max_restarts = 3',
    'nothing restarts',
  ),
  ('slurm gpt2-tiny --target h100:8 --spot', '--spot', '--slurm.partition'),
  # what it installs
  ('gcloud gpt2-tiny --target v6e-8 --run.dir gs://b/r', '--source', 'git+URL@COMMIT'),
  ('gcloud gpt2-tiny --target v6e-8 --run.dir gs://b/r --source .', '--source', 'pyproject.toml'),
  (f'{SKY} --source git+https://h/r', "--source = 'git+https://h/r': must be", '@COMMIT'),
  (f'{SKY} --source nope.whl', "--source = 'nope.whl': no such file"),
  (f'{SKY} --source installed', 'sky does not support installed'),
  # sweeps
  (f'{SKY} --sweep training.seed', "--sweep = 'training.seed': must be FIELD=VALUE"),
  (f'{SKY} --sweep training.sed=0,1', 'training.sed', 'did you mean seed?'),
  (f'{SKY} --sweep training.seed=0,x', "training.seed = 'x'", 'a whole number'),
  (f'{SKY} --sweep run.name=a,b', 'outside `run`'),
]


@pytest.mark.parametrize('case', CASES, ids=lambda c: c[0])
def test_what_cannot_be_launched(case, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert main(['launch', *shlex.split(case[0]), '--yes']) == 2
  out, err = capsys.readouterr()
  assert out == ''
  assert err.count('error: ') == 1
  assert 'Traceback' not in err
  assert [fragment for fragment in case[1:] if fragment not in err] == [], err
  assert contents(tmp_path) == {}
