"""Cloud TPU without a cluster: queued resources of `gcloud compute tpus`.

One script requests the machines; the other is their start-up script. The machines restart training
after a preemption, and delete themselves when it is over. For spot slices, the first script waits
and requests preempted machines again.

https://cloud.google.com/tpu/docs/queued-resources
"""

from __future__ import annotations

import shlex

from jaxformer.config import InputError
from jaxformer.exit_codes import PREEMPTED
from jaxformer.launch.engine import Engine, accelerator_type, render, shape, standard
from jaxformer.launch.job import SIGNALLED, CodeSource, Git, Job, Wheel
from jaxformer.launch.sky import RUNTIMES

_ENVIRONMENT = '/root/jaxformer-env'


class GCloud(Engine):
  """
  Attributes:
    project: Google Cloud project; None for gcloud's default.
    zone: None for gcloud's default.
    runtime_version: image of the machines; None for the default of the TPU generation.
    service_account: account of the machines, which must be able to write `run.dir` and to delete
      TPUs; None for the project's default.
    valid_for: how long the request stays in the queue, such as 6h; None for no limit.
    keep: keep the machines after the run, for inspection; they are billed until deleted.
    max_restarts: restarts after a process was ended by a signal, as when another host died.
      Preemptions do not count.
  """

  project: str | None = None
  zone: str | None = None
  runtime_version: str | None = None
  service_account: str | None = None
  valid_for: str | None = None
  keep: bool = False
  max_restarts: int = 3

  program = 'gcloud'
  get = 'https://cloud.google.com/sdk/docs/install'
  chips = {'v4': 'v4', 'v5e': 'v5litepod', 'v5p': 'v5p', 'v6e': 'v6e'}
  sources = (Git, Wheel)
  wheels = ('gs', 'https')

  def validate(self):
    self.require(self.max_restarts >= 0, 'max_restarts', 'at least 0')

  def default_source(self) -> CodeSource:
    raise InputError(
      '--source: required for gcloud, whose machines start without jaxformer; must be '
      'git+URL@COMMIT, or a wheel at gs:// or https://'
    )

  @property
  def keeps_disk(self):
    return self.keep

  def check(self, job):
    super().check(job)
    if not standard(job.target) and job.target.chip.name != 'v4':
      raise InputError(
        f'--target {job.target.name} of {shape(job.target)}: gcloud selects slices by their size, '
        'except v4 by topology; use the standard topology, or xpk'
      )

  def create(self, job: Job) -> list[str]:
    """The command that requests the machines; it runs in the folder of the start-up script."""
    name, slices = job.short_name(), job.target.slices
    node = (
      [f'--node-id={name}'] if slices == 1 else [f'--node-count={slices}', f'--node-prefix={name}']
    )
    options = {'service-account': self.service_account, 'valid-until-duration': self.valid_for}
    return [
      'gcloud',
      'compute',
      'tpus',
      'queued-resources',
      'create',
      name,
      *self._where(),
      *node,
      *(
        [f'--accelerator-type={accelerator_type(job.target)}']
        if standard(job.target)
        else [f'--type={job.target.chip.name}', f'--topology={shape(job.target)}']
      ),
      f'--runtime-version={self.runtime_version or RUNTIMES[job.target.chip.name]}',
      *(['--spot'] if job.spot else []),
      *(f'--{option}={value}' for option, value in options.items() if value is not None),
      '--scopes=https://www.googleapis.com/auth/cloud-platform',
      f'--metadata-from-file=startup-script={job.path("startup.sh").name}',
    ]

  def _where(self) -> list[str]:
    return [
      f'--{name}={value}'
      for name, value in (('zone', self.zone), ('project', self.project))
      if value is not None
    ]

  def files(self, job):
    words = self.create(job)
    create = ' \\\n    '.join([shlex.join(words[:6]), *map(shlex.quote, words[6:])])
    where = ''.join(f' {shlex.quote(word)}' for word in self._where())
    request = render(
      'request.sh.jinja',
      create=create,
      name=job.short_name(),
      where=where,
      spot=job.spot,
      over=f'the run is over: {job.run_dir}/{job.name}',
    )
    startup = render(
      'startup.sh.jinja',
      name=job.short_name(),
      install=job.source.install(job.extra, _ENVIRONMENT),
      experiment=job.write_experiment(),
      train=job.train,
      preempted=PREEMPTED,
      signalled=SIGNALLED,
      max_restarts=self.max_restarts,
      keep=self.keep,
      log=f'{job.run_dir}/{job.name}.worker-' if job.run_dir.startswith('gs://') else None,
    )
    return {job.path('gcloud.sh'): request, job.path('startup.sh'): startup}

  def command(self, job):
    return ['bash', str(job.path('gcloud.sh'))]

  def after(self, job):
    return shlex.join(['gcloud', 'compute', 'tpus', 'queued-resources', 'list', *self._where()])
