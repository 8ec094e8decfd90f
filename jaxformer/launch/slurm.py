"""Slurm: a batch script for `sbatch`, one process per GPU, as JAX expects of `srun`.

https://slurm.schedmd.com/sbatch.html
"""

import pathlib
import re
import shlex

from jaxformer.config import InputError
from jaxformer.exit_codes import PREEMPTED
from jaxformer.launch.engine import Engine, nodes_of_gpus, render
from jaxformer.launch.job import SIGNALLED


class Slurm(Engine):
  """
  Attributes:
    partition, account, qos, time: as in sbatch; None for the cluster's defaults. A run that reaches
      the `time` limit is saved and requeued.
    gpu: the cluster's name of the GPU in `--gres=gpu:NAME:COUNT`; None for the chip's name.
    cpus_per_gpu: cores per GPU; None for the cluster's default.
    save_seconds: how long before the time limit training is told to save.
    max_restarts: restarts after a process was ended by a signal, as when another host died.
      Preemptions do not count.
    setup: shell lines to run before training, such as `module load cuda`.
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
  chips = ('a100', 'h100', 'h100-nvl', 'h200', 'b200')
  sources = ('installed', 'index', 'git', 'wheel')
  # slurm.schedmd.com/slurm.conf.html, max_script_size
  most_bytes = (4 * 1024 * 1024, 'the default limit of a batch script')
  forms = {
    'partition': (r'\w[\w.-]*(,\w[\w.-]*)*', 'names of partitions, with commas between'),
    'account': (r'\w[\w.@+-]*', 'the name of an account'),
    'qos': (r'\w[\w.@+-]*(,\w[\w.@+-]*)*', 'the name of a quality of service'),
    'gpu': (r'\w[\w.-]*', "the cluster's name of a GPU"),
    'time': (
      r'[0-9]+(:[0-9]{1,2}){0,2}|[0-9]+-[0-9]{1,2}(:[0-9]{1,2}){0,2}|UNLIMITED|INFINITE',
      'a time limit: MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, '
      'DAYS-HOURS:MINUTES or DAYS-HOURS:MINUTES:SECONDS',
    ),
  }

  def validate(self):
    super().validate()
    self.require(
      self.setup is None or re.search(r'[\x00\r]|[\ud800-\udfff]', self.setup) is None,
      'setup',
      'shell lines without zero bytes and carriage returns',
    )
    self.require_positive('cpus_per_gpu')
    self.require(0 < self.save_seconds < 65536, 'save_seconds', 'positive and below 65536')
    self.require_not_negative('max_restarts')

  @property
  def shares_disk(self):
    return True

  def storage_problem(self, job):
    return None  # the nodes of a cluster share the folder that jobs are submitted from

  def check(self, job):
    super().check(job)
    if job.spot:
      problem = 'has no effect on Slurm; choose a preemptible --slurm.partition or --slurm.qos'
      raise InputError('--spot', True, problem=problem)

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
      # sbatch replaces %j by the number of the job, and %% by %
      'output': str(job.path('')).replace('%', '%%') + '%j.log',
      'open-mode': 'append',
      'signal': f'USR2@{self.save_seconds}',
    }
    wheel = pathlib.PurePath(job.source.upload or '.')
    folder = f'"$PWD"/{shlex.quote(f"{job.short_name()}-env")}'
    return {
      job.path('sbatch'): render(
        'sbatch.jinja',
        options=options,
        prepare=[
          *(self.setup or '').splitlines(),
          *job.source.install(job.extra, folder, shlex.quote(str(wheel.parent)), job.requirements),
          *job.prepare(),
        ],
        train=job.train,
        preempted=PREEMPTED,
        signalled=SIGNALLED,
        max_restarts=self.max_restarts,
      )
      + job.mark
    }

  def command(self, job):
    return ['sbatch', str(job.path('sbatch'))]

  def after(self, job):
    return 'squeue --me'
