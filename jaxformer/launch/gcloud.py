"""Cloud TPU without a cluster: queued resources of `gcloud compute tpus`, as a script, and the
script that the machines start with.

The machines run training again when it was preempted, and give themselves back when it is over.
Spot slices that were taken away are asked for again by the first script, which waits.

https://cloud.google.com/tpu/docs/queued-resources
"""

from __future__ import annotations

import shlex

from jaxformer.config import InputError
from jaxformer.exit_codes import PREEMPTED
from jaxformer.launch.engine import Engine, accelerator_type, shape, standard
from jaxformer.launch.job import SIGNALLED, Git, Job, Source, Wheel, environment, write_experiment
from jaxformer.launch.sky import RUNTIMES

_ENVIRONMENT = '/root/jaxformer-env'


class GCloud(Engine):
  """
  Attributes:
    project: of Google Cloud; None for the one that gcloud is set to.
    zone: None for the one that gcloud is set to.
    runtime_version: the machines' image; None for that of the generation.
    service_account: that the machines act as; None for the project's own. It needs to write
      `run.dir` and to delete TPUs.
    valid_for: how long the request waits in the queue, as in 6h; None for as long as it takes.
    keep: machines stay after the run, for a look, and are paid for until they are deleted.
    max_restarts: after a process that a signal ended, as of a host that died. Preemptions do not
      count.
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

  def default_source(self) -> Source:
    raise InputError(
      '--source: needed for gcloud, whose machines begin empty: git+URL@COMMIT, or a wheel at '
      'gs:// or https://'
    )

  @property
  def keeps_disk(self):
    return self.keep

  def check(self, job):
    super().check(job)
    if not standard(job.target) and job.target.chip.name != 'v4':
      raise InputError(
        f'--target {job.target.name} of {shape(job.target)}: gcloud takes topologies of v4 alone, '
        'slices of other '
        'chips by their size; the standard topology, or xpk'
      )

  def create(self, job: Job) -> list[str]:
    """The command as words; the file of the machines is beside the script that has it."""
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
    return {job.path('gcloud.sh'): self.request(job), job.path('startup.sh'): self.startup(job)}

  def request(self, job: Job) -> str:
    """The script that asks for the machines, and for spot ones waits to ask again."""
    words = self.create(job)
    create = ' \\\n    '.join([shlex.join(words[:6]), *map(shlex.quote, words[6:])])
    lines = [
      '#!/usr/bin/env bash',
      'set -euo pipefail',
      'cd "$(dirname "$0")"',
      '',
      'create() {',
      f'  {create}',
      '}',
      '',
    ]
    if not job.spot:
      return '\n'.join([*lines, 'create']) + '\n'
    name, where = shlex.quote(job.short_name()), shlex.join(self._where())
    tool, given = 'gcloud compute tpus queued-resources', f' {where}' if where else ''
    return (
      '\n'.join(
        [
          *lines,
          'state() {',
          f"  {tool} list{given} --filter='name ~ /{job.short_name()}$' "
          "--format='value(state.state)'",
          '}',
          '',
          'remove() {',
          f'  {tool} delete {name}{given} --force --quiet',
          '}',
          '',
          '# The machines delete their resource when the run is over; one that was preempted ends '
          'up suspended.',
          'if [ -z "$(state)" ]; then create; fi',
          'while sleep "${POLL_SECONDS:-60}"; do',
          '  now=$(state) || continue',
          '  case "$now" in',
          f"    '') echo {shlex.quote(f'the run is over: {job.run_dir}/{job.name}')}; exit 0 ;;",
          "    SUSPENDED) echo 'preempted; asking again'; remove; create ;;",
          "    FAILED) echo 'the request failed' >&2; exit 1 ;;",
          '  esac',
          'done',
        ]
      )
      + '\n'
    )

  def startup(self, job: Job) -> str:
    """The script that every machine runs when it starts."""
    name, log = job.short_name(), '/var/log/jaxformer.log'
    kept = shlex.quote(f'{job.run_dir}/{job.name}.worker-')
    wheel = job.source.path if isinstance(job.source, Wheel) else ''
    fetch, requirement = [], shlex.quote(job.source.requirement(job.extra))
    if wheel.startswith('gs://'):
      file = wheel.rpartition('/')[2]
      fetch, requirement = (
        [f'gcloud storage cp {shlex.quote(wheel)} .'],
        shlex.quote(f'./{file}[{job.extra}]'),
      )
    setup = [*fetch, *environment(requirement, _ENVIRONMENT)]
    metadata = "curl -sf -H 'Metadata-Flavor: Google' http://metadata.google.internal/computeMetadata/v1/instance"
    over = (
      ['exit "$code"']
      if self.keep
      else [
        '# The first machine gives all of them back.',
        f'worker=$({metadata}/attributes/agent-worker-number)',
        f'zone=$({metadata}/zone)',
        *(
          [f'gcloud storage cp {log} {kept}"$worker".log']
          if job.run_dir.startswith('gs://')
          else []
        ),
        'if [ "$worker" = 0 ]; then',
        f'  gcloud compute tpus queued-resources delete {shlex.quote(name)} --zone="${{zone##*/}}" '
        f'--force --quiet --async',
        'fi',
        'exit "$code"',
      ]
    )
    return (
      '\n'.join(
        [
          '#!/usr/bin/env bash',
          'set -uo pipefail',
          f'exec > >(tee -a {log}) 2>&1',
          'export HOME=/root',
          'cd /root',
          '',
          'setup() {',
          '  ' + ' &&\n  '.join(setup),
          '}',
          '',
          *write_experiment(job),
          'failures=0',
          'code=1',
          'if setup; then',
          '  while true; do',
          '    code=0',
          f'    {job.train} || code=$?',
          f'    if [ "$code" -eq {PREEMPTED} ]; then',
          "      echo 'saved before an interruption; going on'",
          f'    elif [ "$code" -ge {SIGNALLED} ] && [ "$failures" -lt {self.max_restarts} ]; then',
          '      failures=$((failures + 1))',
          '      sleep 30',
          '    else',
          '      break',
          '    fi',
          '  done',
          'fi',
          '',
          *over,
        ]
      )
      + '\n'
    )

  def command(self, job):
    return ['bash', str(job.path('gcloud.sh'))]

  def after(self, job):
    return shlex.join(['gcloud', 'compute', 'tpus', 'queued-resources', 'list', *self._where()])
