"""Slurm: a batch script for `sbatch`, one process a GPU, as JAX expects of `srun`.

https://slurm.schedmd.com/sbatch.html
"""

from __future__ import annotations

import shlex

from jaxformer.config import InputError
from jaxformer.exit_codes import PREEMPTED
from jaxformer.launch.engine import Engine, nodes_of_gpus
from jaxformer.launch.job import (
  SIGNALLED,
  Git,
  Installed,
  Job,
  Wheel,
  environment,
  write_experiment,
)


class Slurm(Engine):
  """
  Attributes:
    partition: None for the cluster's own choice, as the next three.
    account: that pays.
    qos: quality of service.
    time: limit of one start of the job, as sbatch takes it (2-00:00:00). What is not done by then
      goes on in the next.
    gpu: what the cluster calls the GPU in `--gres=gpu:NAME:COUNT`; None for the name of the target.
    cpus_per_gpu: cores a GPU.
    save_seconds: before the limit of time, training is told to save.
    max_restarts: after a process that a signal ended, as of a host that died. Preemptions do not
      count.
    setup: shell lines before training, such as `module load cuda`.
  """

  partition: str | None = None
  account: str | None = None
  qos: str | None = None
  time: str | None = None
  gpu: str | None = None
  cpus_per_gpu: int | None = None
  save_seconds: int = 120
  max_restarts: int = 3
  setup: str | None = None

  program = 'sbatch'
  get = 'submit from a login node of the cluster'
  chips = {name: name for name in ('a100', 'h100', 'h100-nvl', 'h200', 'b200')}
  sources = (Installed, Git, Wheel)

  def validate(self):
    self.require(self.cpus_per_gpu is None or self.cpus_per_gpu > 0, 'cpus_per_gpu', 'positive')
    self.require(0 < self.save_seconds < 65536, 'save_seconds', 'positive and below 65536')
    self.require(self.max_restarts >= 0, 'max_restarts', 'at least 0')

  def default_source(self):
    return Installed()

  def loses(self, job):
    return None  # the nodes of a cluster share the folder that jobs are submitted from

  def check(self, job):
    super().check(job)
    if job.spot:
      raise InputError(
        '--spot: Slurm has partitions and qualities of service that may be preempted; give '
        '--slurm.partition or '
        '--slurm.qos'
      )

  def files(self, job):
    nodes, gpus = nodes_of_gpus(job.target)
    options = {
      'job-name': job.short_name(),
      'partition': self.partition,
      'account': self.account,
      'qos': self.qos,
      'time': self.time,
      'nodes': nodes,
      'ntasks-per-node': gpus,
      'gres': f'gpu:{self.gpu or job.target.chip.name.partition("-")[0]}:{gpus}',
      'cpus-per-task': self.cpus_per_gpu,
      'output': job.path('%j.log'),
      'open-mode': 'append',
      'signal': f'USR2@{self.save_seconds}',
    }
    lines = [
      f'#SBATCH --{name}={shlex.quote(str(value))}'
      for name, value in options.items()
      if value is not None
    ]
    return {
      job.path('sbatch'): '\n'.join(
        [
          '#!/usr/bin/env bash',
          *lines,
          '#SBATCH --requeue',
          '',
          'set -euo pipefail',
          *self._prepare(job),
          '',
          '# Every process is told by signal to save; the highest of their exit codes is that of '
          'srun.',
          'code=0',
          f'srun {job.train} || code=$?',
          f'if [ "$code" -eq {PREEMPTED} ] || {{ [ "$code" -ge {SIGNALLED} ] && '
          f'[ "${{SLURM_RESTART_COUNT:-0}}" -lt {self.max_restarts} ]; }}; then',
          '  scontrol requeue "$SLURM_JOB_ID"',
          'fi',
          'exit "$code"',
        ]
      )
      + '\n'
    }

  def _prepare(self, job: Job) -> list[str]:
    own = [] if self.setup is None else self.setup.splitlines()
    if isinstance(job.source, Installed):
      return own
    requirement = job.source.requirement(job.extra)
    if isinstance(job.source, Wheel) and job.source.local:
      requirement = f'{job.source.path}[{job.extra}]'
    folder = f'"$PWD"/{shlex.quote(f"{job.short_name()}-env")}'
    return [*own, *environment(shlex.quote(requirement), folder), *write_experiment(job)]

  def command(self, job):
    return ['sbatch', str(job.path('sbatch'))]

  def after(self, job):
    return 'squeue --me'
