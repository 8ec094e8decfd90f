"""The interface of engines: an engine turns a job into files, and a command that submits them."""

from __future__ import annotations

import pathlib
import shlex
import shutil
import subprocess
from typing import Any, ClassVar

import jinja2

from jaxformer.config import Config, InputError
from jaxformer.launch.job import CodeSource, Git, Job, Wheel, WorkingDirectory
from jaxformer.planning.target import Target, parse_target
from jaxformer.training.paths import check_url


class LaunchError(Exception):
  """A job whose files were written could not be submitted."""


class Engine(Config, abstract=True):
  """Base of the engines; the type selects one.

  Attributes of the class:
    program: executable that submits jobs.
    get: how to install it.
    chips: supported chips -> their names in this engine.
    sources: supported sources.
    wheels: supported schemes of wheels; 'file' is a local file.
  """

  program: ClassVar[str]
  get: ClassVar[str]
  chips: ClassVar[dict[str, str]]
  sources: ClassVar[tuple[type[CodeSource], ...]] = (Git, Wheel, WorkingDirectory)
  wheels: ClassVar[tuple[str, ...]] = ('file', 'https')

  def default_source(self) -> CodeSource:
    """The source without `--source`. Raises `InputError` if there is no sensible default."""
    raise NotImplementedError

  @property
  def keeps_disk(self) -> bool:
    """Whether a machine and its disk outlive the job."""
    return False

  def storage_problem(self, job: Job) -> str | None:
    """Why a run folder on the machines' own disks would be lost or not shared, or None."""
    if job.spot:
      return 'the disk of a spot machine is deleted when it is preempted'
    if job.target.hosts > 1:
      return f'the {job.target.hosts} hosts of {job.target.name} do not share a disk'
    return None if self.keeps_disk else 'the disk is deleted with the machine when the job is over'

  def check(self, job: Job) -> None:
    """Raise `InputError` for a job that this engine does not support."""
    engine, source = self.tag.lower(), job.source
    if job.target.chip.name not in self.chips:
      raise InputError(
        f'--target {job.target.name}: {engine} does not support {job.target.chip.name}; must be '
        f'one of {", ".join(self.chips)}'
      )
    forms = [s.called for s in self.sources]
    if source.called not in forms:
      raise InputError(
        f'--source: {engine} does not support {source.called}; must be {", ".join(forms)}'
      )
    if source.scheme is not None and source.scheme not in self.wheels:
      places = ' or '.join('a file' if w == 'file' else f'at {w}://' for w in self.wheels)
      raise InputError(f'--source: {engine} needs a wheel that is {places}')
    if job.remote:
      check_url(job.run_dir, 'run.dir')
    elif (problem := self.storage_problem(job)) is not None:
      storage = f'on object storage, such as gs://BUCKET/runs; {problem}'
      raise InputError('run.dir', job.run_dir, storage)

  def files(self, job: Job) -> dict[pathlib.Path, str]:
    """The files of the job: path -> text."""
    raise NotImplementedError

  def command(self, job: Job) -> list[str]:
    """The command that submits the job, once its files are written."""
    raise NotImplementedError

  def after(self, job: Job) -> str:
    """Commands to monitor a submitted job, in one line."""
    raise NotImplementedError


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
  name = {'v5e': 'v5litepod', 'v7x': 'tpu7x'}.get(target.chip.name, target.chip.name)
  return f'{name}-{target.chips * target.chip.cores}'


def shape(target: Target) -> str:
  """The topology of a TPU slice, such as '4x4'."""
  assert target.topology is not None
  return target.topology.partition(':')[2]


def standard(target: Target) -> bool:
  """Whether a TPU slice has the default topology of its size."""
  return (
    parse_target(f'{target.chip.name}-{target.chips * target.chip.cores}').topology
    == target.topology
  )


def submit(engine: Engine, job: Job) -> None:
  """Run the command that submits a job. Raises `LaunchError` if it is not installed or fails."""
  if shutil.which(engine.program) is None:
    raise LaunchError(
      f'{engine.program} is not installed here ({engine.get}); once it is, run '
      f'{shlex.join(engine.command(job))}'
    )
  code = subprocess.run(engine.command(job), check=False).returncode
  if code:
    raise LaunchError(f'{shlex.join(engine.command(job))} exited with code {code}')


def command_script(words: list[str]) -> str:
  """A bash script of one command, one option per line."""
  options = [i for i, word in enumerate(words) if word.startswith('-')]
  first = options[0] if options else len(words)
  lines = [shlex.join(words[:first]), *(f'  {shlex.quote(word)}' for word in words[first:])]
  return '#!/usr/bin/env bash\nset -euo pipefail\n' + ' \\\n'.join(lines) + '\n'
