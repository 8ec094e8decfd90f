"""The interface of engines: an engine turns a job into files, and a command that submits them."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import jinja2

from jaxformer.config import Config, InputError
from jaxformer.installation import installation
from jaxformer.launch.job import FORMS, CodeSource, Job
from jaxformer.launch.source import default_source
from jaxformer.planning.target import Target, parse_target
from jaxformer.training.paths import check_url

# TPU generations by their names on Google Cloud
TPUS = {'v4': 'v4', 'v5e': 'v5litepod', 'v5p': 'v5p', 'v6e': 'v6e', 'v7x': 'tpu7x'}

# what neither a script in one line nor a file in UTF-8 holds: control characters, lone surrogates
CONTROL = re.compile(r'[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]')

# Of Google Cloud: docs.cloud.google.com/resource-manager/docs/creating-managing-projects, and
# docs.cloud.google.com/compute/docs/regions-zones
PROJECT = (r'([a-z0-9.-]+:)?[a-z]([a-z0-9-]{0,28}[a-z0-9])?|[0-9]{1,20}', 'the id of a project')
ZONE = (r'[a-z]+(-[a-z]+)+[0-9]+-[a-z0-9]+', 'a zone such as us-east5-b')


class LaunchError(Exception):
  """A job whose files were written could not be submitted."""


class Engine(Config, abstract=True):
  """Base of the engines; the type selects one.

  Attributes of the class:
    program: executable that submits jobs.
    get: how to install it.
    chips: supported chips.
    sources: supported kinds of sources.
    forms: syntax of fields that are text: a regular expression, and what it stands for.
    most_bytes: how long the text may be that the engine has to carry, and why.
    wheels: supported schemes of wheels; 'file' is a local file.
  """

  program: ClassVar[str]
  get: ClassVar[str]
  chips: ClassVar[tuple[str, ...]]
  sources: ClassVar[tuple[str, ...]] = ('index', 'git', 'wheel', 'folder')
  wheels: ClassVar[tuple[str, ...]] = ('file', 'https')
  forms: ClassVar[Mapping[str, tuple[str, str]]] = {}
  most_bytes: ClassVar[tuple[int, str]]

  def validate(self):
    for field, (form, meaning) in self.forms.items():
      text = getattr(self, field)
      self.require(
        text is None or re.fullmatch(form, text, re.ASCII) is not None, field, f'{meaning}, or none'
      )

  def default_source(self) -> CodeSource:
    """The source without `--source`, the one that runs here. Raises `InputError` if the machines
    cannot get it."""
    return default_source(installation(), self.sources)

  @property
  def infra_of_prices(self) -> str | None:
    """The part of a catalog of prices that is meant, as CLOUD/REGION/ZONE; None for all."""
    return None

  @property
  def shares_disk(self) -> bool:
    """Whether the machines have the disk that jobs are submitted from."""
    return False

  def carried(self, job: Job) -> str:
    """The text that may be `most_bytes` long."""
    return max(self.files(job).values(), key=len)

  @property
  def keeps_disk(self) -> bool:
    """Whether a machine and its disk outlive the job."""
    return False

  def target_problem(self, target: Target) -> str | None:
    """Why this engine cannot rent a target whose chips it supports, or None."""
    return None

  def storage_problem(self, job: Job) -> str | None:
    """Why a run folder on the machines' own disks would be lost or not shared, or None."""
    if job.spot:
      return 'the disk of a spot machine is deleted when it is preempted'
    if job.target.hosts > 1:
      return f'the {job.target.hosts} hosts of {job.target.name} do not share a disk'
    return None if self.keeps_disk else 'the disk is deleted with the machine when the job is over'

  def check(self, job: Job) -> None:
    """Raise `InputError` for a job that this engine does not support."""
    engine, source, target = self.tag.lower(), job.source, job.target
    problem = self.target_problem(target)
    if target.chip.name not in self.chips:
      chips = ', '.join(self.chips)
      problem = f'{engine} does not support {target.chip.name}; must be one of {chips}'
    if problem is not None:
      raise InputError('--target', target.name, problem=problem)
    if source.kind not in self.sources:
      forms = ' or '.join(FORMS[kind] for kind in self.sources)
      problem = f'{engine} does not support {FORMS[source.kind]}; must be {forms}'
      raise InputError('--source', source.place, problem=problem)
    if source.scheme is not None and source.scheme not in self.wheels:
      places = ' or '.join('a file' if w == 'file' else f'at {w}://' for w in self.wheels)
      problem = f'{engine} needs a wheel that is {places}'
      raise InputError('--source', source.place, problem=problem)
    self.check_text(job)
    if job.remote:
      check_url(job.run_dir, 'run.dir')
    elif (problem := self.storage_problem(job)) is not None:
      storage = f'on object storage, such as gs://BUCKET/runs; {problem}'
      raise InputError('run.dir', job.run_dir, storage)

  def check_text(self, job: Job) -> None:
    """Raise `InputError` for text that no job file can hold."""
    given = (('experiment', job.experiment), *job.options, *job.overrides)
    for field, text in (*given, ('run.name', job.name), ('run.dir', job.run_dir)):
      if CONTROL.search(f'{field}{text}'):
        raise InputError(f'--{field}', text, 'text without control characters')
    ends = ('.startup.sh', '.sbatch')  # the longest
    longest = max(len(part.encode()) for part in f'{job.name}{max(ends, key=len)}'.split('/'))
    if longest > 210:  # with what is put around it while it is written, 255
      raise InputError('run.name', job.name, 'a name of at most 199 bytes, for the job files')
    most, why = self.most_bytes
    size = len(self.carried(job).encode())
    if size > most:
      files = ', '.join(job.files.sha256()) or 'the overrides'
      problem = f'{size:,} bytes with {files}; at most {most:,} ({why}): install large code by '
      raise InputError('job', job.name, problem=f'{problem}--source, or import less')

  def files(self, job: Job) -> dict[pathlib.Path, str]:
    """The files of the job: path -> text."""
    raise NotImplementedError

  def command(self, job: Job) -> list[str]:
    """The command that submits the job, once its files are written."""
    raise NotImplementedError

  def after(self, job: Job) -> str:
    """Commands to monitor a submitted job, in one line."""
    raise NotImplementedError


def zone_prices(zone: str | None) -> str:
  """The part of a catalog of prices for a zone, or region, of Google Cloud."""
  if zone is None:
    return 'gcp'
  region = '-'.join(zone.split('-')[:2])
  return f'gcp/{region}' + ('' if zone == region else f'/{zone}')


def render(template: str, **values: Any) -> str:
  """A file from `templates/`; the filter `quote` quotes for the shell."""
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('jaxformer.launch'),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.filters['quote'] = shlex.quote
  return environment.get_template(template).render(values)


def nodes_of_gpus(target: Target) -> tuple[int, int]:
  """(nodes, GPUs per node) of a GPU target."""
  return target.hosts, target.chips * target.slices // target.hosts


def accelerator_type(target: Target) -> str:
  """The name of a TPU slice on Google Cloud, by its size."""
  return f'{TPUS[target.chip.name]}-{target.chips * target.chip.cores}'


def shape(target: Target) -> str:
  """The topology of a TPU slice, such as '4x4'."""
  assert target.topology is not None
  return target.topology.partition(':')[2]


def standard(target: Target) -> bool:
  """Whether a TPU slice has the default topology of its size."""
  usual = parse_target(f'{target.chip.name}-{target.chips * target.chip.cores}')
  return usual.topology == target.topology


def flags(options: dict[str, Any]) -> list[str]:
  """`--name=value` for each option with a value, `--name` for True; none for None and False."""
  return [
    f'--{name}' if value is True else f'--{name}={value}'
    for name, value in options.items()
    if value is not None and value is not False
  ]


def submit(engine: Engine, job: Job) -> None:
  """Run the command that submits a job. Raises `LaunchError` if it is not installed or fails."""
  words = engine.command(job)
  command = shlex.join(words)
  if shutil.which(engine.program) is None:
    raise LaunchError(
      f'{engine.program} is not installed here ({engine.get}); once it is, run {command}'
    )
  code, last = _passed_on(words)
  if code:
    raise LaunchError(f'{command} exited with code {code}' + (f': {last}' if last else ''))


def _passed_on(words: list[str]) -> tuple[int, str]:
  """Run a command, pass on what it prints to stderr as it comes, and return its exit code and the
  last line that it printed."""
  try:
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  except OSError as e:
    raise LaunchError(f'{shlex.join(words)} cannot be run ({e.strerror})') from None
  assert process.stdout is not None
  tail = ''
  with process:
    while piece := os.read(process.stdout.fileno(), 1 << 16).decode(errors='replace'):
      print(piece, end='', file=sys.stderr, flush=True)
      tail = (tail + piece)[-4000:]
  plain = re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', tail)
  lines = [line.strip() for line in re.split(r'[\r\n]+', plain) if line.strip()]
  return process.returncode, lines[-1] if lines else ''


def one_option_per_line(words: list[str], indent: str = '  ') -> str:
  """A command as shell text over several lines."""
  first = next((i for i, word in enumerate(words) if word.startswith('-')), len(words))
  parts = [shlex.join(words[:first]), *map(shlex.quote, words[first:])]
  return f' \\\n{indent}'.join(parts)
