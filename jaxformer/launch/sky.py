"""SkyPilot: a YAML task for `sky jobs launch`, which restarts preempted jobs, or for `sky launch`.

https://docs.skypilot.co/en/latest/reference/yaml-spec.html
"""

import pathlib
import re
from typing import Any

import yaml

from jaxformer.config import InputError, nearest
from jaxformer.exit_codes import PREEMPTED
from jaxformer.launch.engine import Engine, accelerator_type, nodes_of_gpus, shape, standard
from jaxformer.launch.job import Job

# Images of TPU machines. SkyPilot's default for v4 is older, and for v5e it is that of v5p.
RUNTIMES = {
  'v4': 'tpu-ubuntu2204-base',
  'v5e': 'v2-alpha-tpuv5-lite',
  'v5p': 'v2-alpha-tpuv5',
  'v6e': 'v2-alpha-tpuv6e',
}
GPUS = {'a100': 'A100-80GB', 'h100': 'H100', 'h100-nvl': 'H100-NVL', 'h200': 'H200', 'b200': 'B200'}
# of SkyPilot 0.14
CLOUDS = (
  *('aws', 'azure', 'cudo', 'do', 'fluidstack', 'gcp', 'hyperbolic', 'ibm', 'k8s', 'kubernetes'),
  *('lambda', 'mithril', 'nebius', 'oci', 'paperspace', 'primeintellect', 'runpod', 'scp'),
  *('seeweb', 'shadeform', 'slurm', 'ssh', 'vast', 'verda', 'vsphere', 'yotta'),
)
_ENVIRONMENT = '"$HOME/jaxformer-env"'


class Sky(Engine):
  """
  Attributes:
    infra: CLOUD, CLOUD/REGION or CLOUD/REGION/ZONE; None for the lowest price that SkyPilot finds.
    managed: whether to start a managed job, which SkyPilot restarts after preemptions and whose
      machines it deletes at the end. False starts a cluster that remains until `sky down`.
    max_restarts: restarts of a managed job after other failures, as when a host died.
    disk_gb: disk size per machine; None for SkyPilot's default.
  """

  infra: str | None = None
  managed: bool = True
  max_restarts: int | None = None
  disk_gb: int | None = None

  program = 'sky'
  get = "`pip install 'skypilot[gcp]>=0.14,<0.15'`, in a separate environment"
  chips = (*RUNTIMES, *GPUS)
  # SkyPilot sends scripts that are too long for a command as files
  most_bytes = (1_000_000, 'what is sent with a task')

  def validate(self):
    super().validate()
    self._check_infra()
    self.require_not_negative('max_restarts')
    self.require_positive('disk_gb')
    self.require(
      self.managed or self.max_restarts is None,
      'max_restarts',
      'none when managed is false: nothing restarts the job',
    )

  def _check_infra(self) -> None:
    """Raises `InputError` for an `infra` that is none of SkyPilot's."""
    if self.infra is None:
      return
    cloud, *places = self.infra.split('/')
    form = 'CLOUD, CLOUD/REGION or CLOUD/REGION/ZONE, such as gcp/us-east5'
    place = r'\*|[\w][\w.@:-]*'
    self.require(
      cloud == '*' or cloud.lower() in CLOUDS, 'infra', f'{form}{nearest(cloud, CLOUDS)}'
    )
    self.require(
      all(re.fullmatch(place, p, re.ASCII) for p in places)
      # the context of a Kubernetes cluster may hold slashes
      and (len(places) <= 2 or cloud.lower() in ('k8s', 'kubernetes', 'ssh')),
      'infra',
      form,
    )

  @property
  def infra_of_prices(self):
    return self.infra

  @property
  def keeps_disk(self):
    return not self.managed

  def target_problem(self, target):
    if target.topology is None:
      return None
    if target.slices > 1:
      return 'sky does not connect slices; use one slice, or xpk or gcloud'
    if standard(target):
      return None
    return (
      f'{shape(target)} is not its standard topology, and sky selects slices by their size; use '
      'the standard topology, or xpk or gcloud'
    )

  def check(self, job):
    super().check(job)
    if job.spot and not self.managed:
      why = 'true with --spot; otherwise nothing restarts a preempted job'
      raise InputError('sky.managed', False, why)

  def task(self, job: Job) -> dict[str, Any]:
    """The task as data."""
    chip, source = job.target.chip.name, job.source
    resources: dict[str, Any] = {} if self.infra is None else {'infra': self.infra}
    if job.tpu:
      nodes = 1
      resources['accelerators'] = {f'tpu-{accelerator_type(job.target)}': 1}
      resources['accelerator_args'] = {'runtime_version': RUNTIMES[chip]}
    else:
      nodes, count = nodes_of_gpus(job.target)
      resources['accelerators'] = {GPUS[chip]: count}
    resources['use_spot'] = job.spot
    if self.disk_gb is not None:
      resources['disk_size'] = self.disk_gb
    if self.managed:
      resources['job_recovery'] = {
        'max_restarts_on_errors': 3 if self.max_restarts is None else self.max_restarts,
        'recover_on_exit_codes': [PREEMPTED],
      }
    task: dict[str, Any] = {'name': job.short_name(), 'num_nodes': nodes, 'resources': resources}
    if source.folder is not None:
      task['workdir'] = source.folder
    elif source.upload is not None:
      task['file_mounts'] = {f'~/{pathlib.PurePath(source.upload).name}': source.upload}
    *setup, on_path = source.install(job.extra, _ENVIRONMENT, '"$HOME"', job.requirements)
    # `exec`: training replaces the shell, so that it receives the signals to the job.
    return task | {
      'setup': _script(setup),
      'run': _script([on_path, *job.prepare(), f'exec {job.train}']),
    }

  def files(self, job):
    return {job.path('sky.yaml'): to_yaml(self.task(job)) + job.mark}

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


def to_yaml(task: dict[str, Any]) -> str:
  """A task as YAML, its fields in order and its scripts as blocks."""

  class Dumper(yaml.SafeDumper):
    pass

  def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar('tag:yaml.org,2002:str', value, '|' if '\n' in value else None)

  Dumper.add_representer(str, text)
  return yaml.dump(task, Dumper=Dumper, sort_keys=False, width=10**6)


def _script(lines: list[str]) -> str:
  return '\n'.join(['set -euo pipefail', *lines]) + '\n'
