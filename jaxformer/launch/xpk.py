"""xpk: `xpk workload create` on a GKE cluster, as a script.

https://github.com/AI-Hypercomputer/xpk
"""

from __future__ import annotations

import base64
import pathlib
import shlex

from jaxformer.config import InputError
from jaxformer.exit_codes import PREEMPTED
from jaxformer.launch.engine import Engine, accelerator_type, command_script, nodes_of_gpus, shape
from jaxformer.launch.job import Job, WorkingDirectory


class XPK(Engine):
  """
  Attributes:
    cluster: GKE cluster, created by `xpk cluster create`.
    project: Google Cloud project; None for gcloud's default.
    zone: of the cluster; None for gcloud's default.
    image: container image with bash, Python 3.11 or later and pip.
    priority: in the cluster's queue.
    max_restarts: restarts after a preemption, or after a process was ended by a signal; any other
      failure is final.
    grace_seconds: time for saving before a machine is preempted.
  """

  cluster: str | None = None
  project: str | None = None
  zone: str | None = None
  image: str = 'python:3.12'
  priority: str = 'medium'
  max_restarts: int = 100
  grace_seconds: int = 120

  program = 'xpk'
  get = "`pip install 'xpk>=1.16,<2'`, in a separate environment"
  chips = {
    'v4': 'v4',
    'v5e': 'v5litepod',
    'v5p': 'v5p',
    'v6e': 'v6e',
    'v7x': 'tpu7x',
    'h100': 'h100-80gb-8',
    'h200': 'h200-141gb-8',
    'b200': 'b200-8',
  }
  priorities = ('very-low', 'low', 'medium', 'high', 'very-high')

  def validate(self):
    self.require(
      self.priority in self.priorities, 'priority', f'one of {", ".join(self.priorities)}'
    )
    self.require(self.max_restarts >= 0, 'max_restarts', 'at least 0')
    self.require(self.grace_seconds > 0, 'grace_seconds', 'positive')

  def default_source(self):
    return WorkingDirectory()

  def check(self, job):
    super().check(job)
    if self.cluster is None:
      name = 'the name of a GKE cluster, such as --xpk.cluster NAME'
      raise InputError('xpk.cluster', None, name)
    if job.target.chip.name == 'v5e' and job.target.chips < 8:
      raise InputError(f'--target {job.target.name}: xpk has v5e slices of 8 chips and more')
    if not job.tpu and nodes_of_gpus(job.target)[1] != 8:
      raise InputError(
        f'--target {job.target.name}: xpk has nodes of 8 GPUs; must be a multiple of 8'
      )

  def arguments(self, job: Job) -> list[str]:
    """The command that creates the workload."""
    if job.tpu:
      # A size does not always select the same 3-D topology in xpk.
      solid = shape(job.target).count('x') == 2
      name = (
        f'{self.chips[job.target.chip.name]}-{shape(job.target)}'
        if solid
        else accelerator_type(job.target)
      )
      what = [f'--tpu-type={name}', f'--num-slices={job.target.slices}']
    else:
      what = [
        f'--device-type={self.chips[job.target.chip.name]}',
        f'--num-nodes={nodes_of_gpus(job.target)[0]}',
      ]
    if job.source.upload is None:
      image = [f'--docker-image={self.image}']
    else:
      folder = job.source.folder or pathlib.PurePath(job.source.upload).parent
      image = [f'--base-docker-image={self.image}', f'--script-dir={folder}']
    where = [
      f'--{name}={value}'
      for name, value in (('project', self.project), ('zone', self.zone))
      if value is not None
    ]
    return [
      'xpk',
      'workload',
      'create',
      f'--workload={job.short_name()}',
      f'--cluster={self.cluster}',
      *where,
      *what,
      *(['--spot'] if job.spot else []),
      *image,
      f'--priority={self.priority}',
      f'--max-restarts={self.max_restarts}',
      f'--restart-on-exit-codes={PREEMPTED}',
      f'--termination-grace-period-seconds={self.grace_seconds}',
      f'--command={self.container_command(job)}',
    ]

  def container_command(self, job: Job) -> str:
    """The command of the container, in one line since xpk embeds it in YAML. `exec`: training
    replaces the shell, to which xpk sends SIGTERM."""
    requirement = job.source.requirement(job.extra, '.')
    lines = [f'python -m pip install --quiet {requirement}', f'exec {job.train}']
    if job.embedded_experiment is not None and job.file is not None:
      encoded = base64.b64encode(job.embedded_experiment.encode()).decode()
      lines.insert(0, f'echo {encoded} | base64 -d > {shlex.quote(job.file.name)}')
    return ' && '.join(lines)

  def files(self, job):
    return {job.path('xpk.sh'): command_script(self.arguments(job))}

  def command(self, job):
    return ['bash', str(job.path('xpk.sh'))]

  def after(self, job):
    return f'xpk workload list --cluster {self.cluster}'
