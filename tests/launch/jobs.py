"""The jobs that the tests here look at: every engine, every kind of target and of source."""

from pathlib import Path

from jaxformer.launch import XPK, CodeSource, GCloud, Job, Sky, Slurm, source_of
from jaxformer.planning.target import parse_target

GIT = source_of('git+https://github.com/someone/jaxformer@0123abc')
FOLDER, INSTALLED = CodeSource('folder'), CodeSource('installed')
WHEEL = 'gs://bucket/jaxformer-0.1.0-py3-none-any.whl'
# An argument that every layer of quoting has to carry unharmed.
HARD = 'it\'s $HOME `id` "q" \\ *.txt; #&|'


def job(
  target,
  source,
  *,
  experiment='gpt2-tiny',
  run_dir='gs://bucket/runs',
  name=None,
  spot=False,
  overrides=(),
  **more,
):
  return Job(
    name=name or Path(experiment).stem,
    experiment=experiment,
    overrides=tuple(overrides),
    run_dir=run_dir,
    target=parse_target(target),
    spot=spot,
    source=source,
    **more,
  )


STEPS = (('training.steps', '2000'), ('optimizer.learning_rate', '3e-4'))

CASES = {
  'sky-tpu-spot': (Sky(infra='gcp/us-east5'), job('v6e-16', FOLDER, spot=True, overrides=STEPS)),
  'sky-v5e': (Sky(disk_gb=200, max_restarts=0), job('v5e-64', GIT)),
  'sky-gpu-nodes': (Sky(), job('2xh100:8', GIT, experiment='llama2-7b')),
  'sky-cluster': (Sky(managed=False), job('a100:4', FOLDER, run_dir='runs')),
  'xpk-slices': (
    XPK(cluster='c', zone='us-east5-b', project='p'),
    job('2xv5e-64', FOLDER, spot=True, overrides=STEPS),
  ),
  'xpk-git': (XPK(cluster='c'), job('v5p-128', GIT)),
  'xpk-gpu': (XPK(cluster='c', priority='high'), job('h100:16', GIT)),
  'gcloud-spot': (
    GCloud(zone='us-east5-a', project='p'),
    job('v6e-16', GIT, spot=True, overrides=STEPS),
  ),
  'gcloud-slices': (
    GCloud(valid_for='6h', service_account='a@p'),
    job('2xv5p-128', source_of(WHEEL)),
  ),
  'gcloud-topology': (GCloud(runtime_version='mine'), job('v4:4x4x16', GIT)),
  'gcloud-kept': (GCloud(keep=True, max_restarts=0), job('v4-8', GIT, run_dir='runs')),
  'slurm': (
    Slurm(partition='gpu', time='2-00:00:00', setup='module load cuda'),
    job('2xh100:8', INSTALLED, run_dir='runs'),
  ),
  'slurm-git': (Slurm(account='a', qos='q', gpu='hopper', cpus_per_gpu=12), job('h100:16', GIT)),
}
