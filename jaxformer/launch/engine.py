"""What an engine is: it turns a job into files and the command that submits them."""

from __future__ import annotations

import pathlib
import shlex
import shutil
import subprocess
from typing import ClassVar

from jaxformer.config import Config, InputError
from jaxformer.launch.job import Git, Job, Source, Wheel, WorkingDirectory
from jaxformer.planning.target import Target, parse_target
from jaxformer.training.folder import scheme_of


class LaunchError(Exception):
  """A job could not be submitted; its files are there."""


class Engine(Config, abstract=True):
  """Base of the engines; the type selects one.

  Attributes of the class:
    program: what must be on the path to submit.
    get: how to get it.
    chips: chips that it serves, and what it calls them.
    sources: what it can bring to the machines.
    wheels: where a wheel may be.
  """

  program: ClassVar[str]
  get: ClassVar[str]
  chips: ClassVar[dict[str, str]]
  sources: ClassVar[tuple[type[Source], ...]] = (Git, Wheel, WorkingDirectory)
  wheels: ClassVar[tuple[str, ...]] = ('file', 'https')

  def default_source(self) -> Source:
    """What the machines install when the user does not say. Raises `InputError` where there is
    nothing to assume."""
    raise NotImplementedError

  @property
  def keeps_disk(self) -> bool:
    """Whether a machine is still there when the job is over."""
    return False

  def loses(self, job: Job) -> str | None:
    """Why a run folder on the machines' own disks is lost or cannot be shared; None where it is
    safe."""
    if job.spot:
      return 'the disks of spot machines go with them'
    if job.target.hosts > 1:
      return f'the {job.target.hosts} hosts of {job.target.name} do not share a disk'
    return None if self.keeps_disk else 'the disk goes with the machine when the job is over'

  def check(self, job: Job) -> None:
    """Raises `InputError` for a job that this engine cannot serve."""
    self.serves(job.target)
    if not isinstance(job.source, self.sources):
      raise InputError(
        f'--source: {self.tag.lower()} does not take {job.source.called}; must be '
        f'{", ".join(s.called for s in self.sources)}'
      )
    if isinstance(job.source, Wheel) and job.source.scheme not in self.wheels:
      places = ' or '.join('a file' if w == 'file' else f'at {w}://' for w in self.wheels)
      raise InputError(
        f'--source {job.source.path}: {self.tag.lower()} takes a wheel that is {places}'
      )
    if job.remote:
      scheme_of(job.run_dir, 'run.dir')
    why = None if job.remote else self.loses(job)
    if why is not None:
      raise InputError(
        f'run.dir = {job.run_dir!r}: must be on object storage, as in --run.dir gs://BUCKET/runs; '
        f'{why}'
      )

  def serves(self, target: Target) -> None:
    """Raises `InputError` for a target whose chips this engine does not have."""
    if target.chip.name not in self.chips:
      raise InputError(
        f'--target {target.name}: {self.tag.lower()} does not serve {target.chip.name}; it serves '
        f'{", ".join(self.chips)}'
      )

  def files(self, job: Job) -> dict[pathlib.Path, str]:
    """File -> text."""
    raise NotImplementedError

  def command(self, job: Job) -> list[str]:
    """What submits the job, once its files are written."""
    raise NotImplementedError

  def after(self, job: Job) -> str:
    """How to look after a job that was submitted, in a line."""
    raise NotImplementedError


def nodes_of_gpus(target: Target) -> tuple[int, int]:
  """(nodes, GPUs a node) of a GPU target."""
  return target.hosts, target.chips * target.slices // target.hosts


def accelerator_type(target: Target) -> str:
  """A TPU slice as Google Cloud names it by its size."""
  name = {'v5e': 'v5litepod', 'v7x': 'tpu7x'}.get(target.chip.name, target.chip.name)
  return f'{name}-{target.chips * target.chip.cores}'


def shape(target: Target) -> str:
  """The topology of a TPU slice, '4x4'."""
  assert target.topology is not None
  return target.topology.partition(':')[2]


def standard(target: Target) -> bool:
  """Whether the size of a TPU slice alone says what its topology is."""
  return (
    parse_target(f'{target.chip.name}-{target.chips * target.chip.cores}').topology
    == target.topology
  )


def submit(engine: Engine, job: Job) -> None:
  """Calls the tool. Raises `LaunchError` where it is not installed, or fails."""
  if shutil.which(engine.program) is None:
    raise LaunchError(
      f'{engine.program} is not installed here ({engine.get}); then '
      f'{shlex.join(engine.command(job))}'
    )
  code = subprocess.run(engine.command(job), check=False).returncode
  if code:
    raise LaunchError(f'{shlex.join(engine.command(job))} ended with code {code}')


def command_script(words: list[str]) -> str:
  """A bash script of one command, an option a line."""
  options = [i for i, word in enumerate(words) if word.startswith('-')]
  first = options[0] if options else len(words)
  lines = [shlex.join(words[:first]), *(f'  {shlex.quote(word)}' for word in words[first:])]
  return '#!/usr/bin/env bash\nset -euo pipefail\n' + ' \\\n'.join(lines) + '\n'
