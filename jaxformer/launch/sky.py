"""SkyPilot: a YAML task for `sky jobs launch`, which recovers a job that was preempted, or `sky
launch`.

https://docs.skypilot.co/en/latest/reference/yaml-spec.html
"""

from __future__ import annotations

import pathlib
import shlex
from typing import Any

from jaxformer.config import InputError
from jaxformer.exit_codes import PREEMPTED
from jaxformer.launch.engine import Engine, accelerator_type, nodes_of_gpus, shape, standard
from jaxformer.launch.job import Job, Wheel, WorkingDirectory, environment, write_experiment
from jaxformer.launch.yaml import to_yaml

# The images of TPU machines; SkyPilot's own choice for v4 is older, and for v5e it is that of v5p.
RUNTIMES = {
  'v4': 'tpu-ubuntu2204-base',
  'v5e': 'v2-alpha-tpuv5-lite',
  'v5p': 'v2-alpha-tpuv5',
  'v6e': 'v2-alpha-tpuv6e',
}
_ENVIRONMENT = '"$HOME/jaxformer-env"'


class Sky(Engine):
  """
  Attributes:
    infra: where, CLOUD, CLOUD/REGION or CLOUD/REGION/ZONE; None lets SkyPilot look for the lowest
      price.
    managed: a managed job: SkyPilot looks after it, starts it again when it was preempted, and
      takes its machines down at the end. False starts a cluster that stays until `sky down`.
    max_restarts: of a managed job after a failure that is no preemption, as of a host that died.
    disk_gb: of each machine; None for SkyPilot's own choice.
  """

  infra: str | None = None
  managed: bool = True
  max_restarts: int | None = None
  disk_gb: int | None = None

  program = 'sky'
  get = "`pip install 'skypilot[gcp]>=0.14,<0.15'` in an environment of its own"
  chips = {
    'v4': 'tpu-v4',
    'v5e': 'tpu-v5litepod',
    'v5p': 'tpu-v5p',
    'v6e': 'tpu-v6e',
    'a100': 'A100-80GB',
    'h100': 'H100',
    'h100-nvl': 'H100-NVL',
    'h200': 'H200',
    'b200': 'B200',
  }

  def validate(self):
    self.require(self.max_restarts is None or self.max_restarts >= 0, 'max_restarts', 'at least 0')
    self.require(
      self.managed or self.max_restarts is None,
      'max_restarts',
      'none when managed is false: nothing restarts the job',
    )
    self.require(self.disk_gb is None or self.disk_gb > 0, 'disk_gb', 'positive')

  def default_source(self):
    return WorkingDirectory()

  @property
  def keeps_disk(self):
    return not self.managed

  def check(self, job):
    super().check(job)
    if job.spot and not self.managed:
      raise InputError(
        'sky.managed = False: must be true with --spot, or nothing starts the job again when it is '
        'preempted'
      )
    if job.tpu and job.target.slices > 1:
      raise InputError(
        f'--target {job.target.name}: sky does not connect slices; one slice, or xpk or gcloud'
      )
    if job.tpu and not standard(job.target):
      raise InputError(
        f'--target {job.target.name} of {shape(job.target)}: sky names slices by their size; the '
        'standard topology, '
        'or xpk or gcloud'
      )

  def task(self, job: Job) -> dict[str, Any]:
    """The task as data."""
    resources: dict[str, Any] = {} if self.infra is None else {'infra': self.infra}
    if job.tpu:
      nodes, name = 1, f'tpu-{accelerator_type(job.target)}'
      resources |= {
        'accelerators': {name: 1},
        'accelerator_args': {'runtime_version': RUNTIMES[job.target.chip.name]},
      }
    else:
      nodes, count = nodes_of_gpus(job.target)
      resources |= {'accelerators': {self.chips[job.target.chip.name]: count}}
    resources['use_spot'] = job.spot
    if self.disk_gb is not None:
      resources['disk_size'] = self.disk_gb
    if self.managed:
      restarts = 3 if self.max_restarts is None else self.max_restarts
      resources['job_recovery'] = {
        'max_restarts_on_errors': restarts,
        'recover_on_exit_codes': [PREEMPTED],
      }
    task: dict[str, Any] = {'name': job.short_name(), 'num_nodes': nodes, 'resources': resources}
    requirement = shlex.quote(job.source.requirement(job.extra))
    if isinstance(job.source, WorkingDirectory):
      task['workdir'] = job.source.path
    elif isinstance(job.source, Wheel) and job.source.local:
      wheel = pathlib.Path(job.source.path).name
      task['file_mounts'] = {f'~/{wheel}': job.source.path}
      requirement = f'"$HOME"/{shlex.quote(f"{wheel}[{job.extra}]")}'
    *setup, on_path = environment(requirement, _ENVIRONMENT)
    # The process takes the shell's place, so that a signal to the job reaches it.
    return task | {
      'setup': _script(setup),
      'run': _script([on_path, *write_experiment(job), f'exec {job.train}']),
    }

  def files(self, job):
    return {job.path('sky.yaml'): to_yaml(self.task(job))}

  def command(self, job):
    file = str(job.path('sky.yaml'))
    if self.managed:
      return ['sky', 'jobs', 'launch', '--yes', '--detach-run', file]
    return ['sky', 'launch', '--yes', '--detach-run', '--cluster', job.short_name(), file]

  def after(self, job):
    return (
      'sky jobs queue'
      if self.managed
      else f'sky logs {job.short_name()}; sky down {job.short_name()}'
    )


def _script(lines: list[str]) -> str:
  return '\n'.join(['set -euo pipefail', *lines]) + '\n'
