"""xpk: `xpk workload create` on a GKE cluster, as a script.

https://github.com/AI-Hypercomputer/xpk
"""

import pathlib
import shlex
from typing import Any

from jaxformer.config import InputError
from jaxformer.exit_codes import PREEMPTED
from jaxformer.launch.engine import (
  PROJECT,
  TPUS,
  ZONE,
  Engine,
  accelerator_type,
  flags,
  nodes_of_gpus,
  one_option_per_line,
  shape,
  zone_prices,
)
from jaxformer.launch.job import Job

DEVICES = {'h100': 'h100-80gb-8', 'h200': 'h200-141gb-8', 'b200': 'b200-8'}


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
  chips = (*TPUS, *DEVICES)
  priorities = ('very-low', 'low', 'medium', 'high', 'very-high')

  # Linux's limit of an argument, less what xpk and the container put around the command
  most_bytes = (128 * 1024 - 8192, 'the limit of a command')
  forms = {
    # docs.cloud.google.com/kubernetes-engine/docs/reference/rest/v1/projects.locations.clusters
    'cluster': (r'[a-z]([a-z0-9-]{0,38}[a-z0-9])?', 'the name of a GKE cluster'),
    'project': PROJECT,
    'zone': (f'{ZONE[0]}|[a-z]+(-[a-z]+)+[0-9]+', 'a zone or region such as us-east5-b'),
    # github.com/distribution/reference
    'image': (
      r'([A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]+)?/)?[a-z0-9]+([._/-]+[a-z0-9]+)*'
      r'(:\w[\w.-]{0,127})?(@sha256:[0-9a-f]{64})?',
      'a container image such as python:3.12 or us-docker.pkg.dev/PROJECT/REPOSITORY/NAME:TAG',
    ),
  }

  def validate(self):
    super().validate()
    self.require(
      self.priority in self.priorities, 'priority', f'one of {", ".join(self.priorities)}'
    )
    self.require_not_negative('max_restarts')
    self.require_positive('grace_seconds')

  def target_problem(self, target):
    if target.chip.name == 'v5e' and target.chips < 8:
      return 'xpk has v5e slices of 8 chips and more'
    if target.topology is None and nodes_of_gpus(target)[1] != 8:
      return 'xpk has nodes of 8 GPUs; must be a multiple of 8'
    return None

  def check(self, job):
    super().check(job)
    if self.cluster is None:
      name = 'the name of a GKE cluster, such as --xpk.cluster NAME'
      raise InputError('xpk.cluster', None, name)

  @property
  def infra_of_prices(self):
    return zone_prices(self.zone)

  def carried(self, job):
    return self.container_command(job)

  def arguments(self, job: Job) -> list[str]:
    """The command that creates the workload."""
    target = job.target
    if job.tpu:
      name = accelerator_type(target)
      if shape(target).count('x') == 2:  # a size does not always select the same topology in xpk
        name = f'{TPUS[target.chip.name]}-{shape(target)}'
      machines = {'tpu-type': name, 'num-slices': target.slices}
    else:
      nodes, _ = nodes_of_gpus(target)
      machines = {'device-type': DEVICES[target.chip.name], 'num-nodes': nodes}
    image: dict[str, Any] = {'docker-image': self.image}
    if job.source.upload is not None:
      folder = job.source.folder or pathlib.PurePath(job.source.upload).parent
      image = {'base-docker-image': self.image, 'script-dir': folder}
    options = {
      'workload': job.short_name(),
      'cluster': self.cluster,
      'project': self.project,
      'zone': self.zone,
      **machines,
      'spot': job.spot,
      **image,
      'priority': self.priority,
      'max-restarts': self.max_restarts,
      'restart-on-exit-codes': PREEMPTED,
      'termination-grace-period-seconds': self.grace_seconds,
      'command': self.container_command(job),
    }
    return ['xpk', 'workload', 'create', *flags(options)]

  def container_command(self, job: Job) -> str:
    """The command of the container, in one line since xpk embeds it in YAML. `exec`: training
    replaces the shell, to which xpk sends SIGTERM."""
    more = (f' {shlex.quote(r)}' for r in job.requirements)
    requirement = job.source.requirement(job.extra, '.') + ''.join(more)
    install = f'python -m pip install --quiet {requirement}'
    return ' && '.join([install, *job.prepare(), f'exec {job.train}'])

  def files(self, job):
    create = one_option_per_line(self.arguments(job))
    script = f'#!/usr/bin/env bash\nset -euo pipefail\n{create}\n{job.mark}'
    return {job.path('xpk.sh'): script}

  def command(self, job):
    return ['bash', str(job.path('xpk.sh'))]

  def after(self, job):
    return f'xpk workload list --cluster {self.cluster}'
