"""Cloud TPU without a cluster: queued resources of `gcloud compute tpus`.

One script requests the machines; the other is their start-up script. The machines restart training
after a preemption, and delete themselves when it is over. For spot slices, the first script waits
and requests preempted machines again.

https://cloud.google.com/tpu/docs/queued-resources
"""

import shlex

from jaxformer.exit_codes import PREEMPTED
from jaxformer.launch.engine import (
  PROJECT,
  ZONE,
  Engine,
  accelerator_type,
  flags,
  one_option_per_line,
  render,
  shape,
  standard,
  zone_prices,
)
from jaxformer.launch.job import SIGNALLED, Job
from jaxformer.launch.sky import RUNTIMES

QUEUED_RESOURCES = ['gcloud', 'compute', 'tpus', 'queued-resources']
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
  chips = tuple(RUNTIMES)
  sources = ('index', 'git', 'wheel')
  wheels = ('gs', 'https')
  # docs.cloud.google.com/compute/docs/metadata/setting-custom-metadata
  most_bytes = (256 * 1024, 'the limit of a value of metadata, which holds the start-up script')
  forms = {
    'project': PROJECT,
    'zone': ZONE,
    'runtime_version': (r'[A-Za-z0-9][A-Za-z0-9._-]*', 'the name of a TPU software version'),
    'service_account': (
      r'[A-Za-z0-9][A-Za-z0-9-]*@[a-z0-9]([a-z0-9.-]*[a-z0-9])?',
      'the e-mail address of a service account',
    ),
    # `gcloud topic datetimes`
    'valid_for': (
      r'(?=[0-9])([0-9]+w)?([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?',
      'a duration such as 6h, 90m or 1d12h',
    ),
  }

  def validate(self):
    super().validate()
    self.require_not_negative('max_restarts')

  @property
  def infra_of_prices(self):
    return zone_prices(self.zone)

  def carried(self, job):
    return self.files(job)[job.path('startup.sh')]

  @property
  def keeps_disk(self):
    return self.keep

  def target_problem(self, target):
    if standard(target) or target.chip.name == 'v4':
      return None
    return (
      f'{shape(target)} is not its standard topology, and gcloud selects slices by their size, '
      'except v4 by topology; use the standard topology, or xpk'
    )

  def create(self, job: Job) -> list[str]:
    """The command that requests the machines; it runs in the folder of the start-up script."""
    name, target = job.short_name(), job.target
    node = {'node-id': name}
    if target.slices > 1:
      node = {'node-count': target.slices, 'node-prefix': name}
    machines = {'accelerator-type': accelerator_type(target)}
    if not standard(target):
      machines = {'type': target.chip.name, 'topology': shape(target)}
    options = {
      'runtime-version': self.runtime_version or RUNTIMES[target.chip.name],
      'spot': job.spot,
      'service-account': self.service_account,
      'valid-until-duration': self.valid_for,
      'scopes': 'https://www.googleapis.com/auth/cloud-platform',
      'metadata-from-file': f'startup-script={job.path("startup.sh").name}',
    }
    where = self._where()
    return [*QUEUED_RESOURCES, 'create', name, *where, *flags(node | machines | options)]

  def _where(self) -> list[str]:
    return flags({'zone': self.zone, 'project': self.project})

  def files(self, job):
    where = ''.join(f' {shlex.quote(word)}' for word in self._where())
    request = render(
      'request.sh.jinja',
      create=one_option_per_line(self.create(job), indent='    '),
      name=job.short_name(),
      where=where,
      spot=job.spot,
      over=f'the run is over: {job.run_dir}/{job.name}',
    )
    startup = render(
      'startup.sh.jinja',
      name=job.short_name(),
      install=[*job.source.install(job.extra, _ENVIRONMENT, more=job.requirements), *job.prepare()],
      train=job.train,
      preempted=PREEMPTED,
      signalled=SIGNALLED,
      max_restarts=self.max_restarts,
      keep=self.keep,
      log=f'{job.run_dir}/{job.name}.worker-' if job.run_dir.startswith('gs://') else None,
    )
    return {job.path('gcloud.sh'): request + job.mark, job.path('startup.sh'): startup + job.mark}

  def command(self, job):
    return ['bash', str(job.path('gcloud.sh'))]

  def after(self, job):
    return shlex.join([*QUEUED_RESOURCES, 'list', *self._where()])
