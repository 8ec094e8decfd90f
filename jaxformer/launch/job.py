"""What every engine starts: one training run on one target, as shell commands.

    what is installed   a git commit, a wheel or a folder (`Source`), into an environment of its own
    what runs           `jaxformer train EXPERIMENT overrides --run.name NAME --run.dir DIR`, one
    process a host; on Slurm, a GPU

The exit code tells an engine what to do: 75 is preempted and saved (start again, the run goes on),
  a code of 128 and more is a
process that a signal ended, as of a host whose peer died (start again, a few times), any other one
is final."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import re
import shlex
from typing import ClassVar, Final

from jaxformer.config import Config, InputError
from jaxformer.planning.target import Target

SIGNALLED: Final = 128
PYTHON: Final = '3.12'

# ---- where the code comes from -----------------------------------------------------------------


class Source(Config, abstract=True):
  """What the machines install. `called` is how `--source` names it."""

  called: ClassVar[str]

  def requirement(self, extra: str) -> str:
    """As pip takes it, with extras ('tpu', 'cuda,storage')."""
    raise NotImplementedError


class Git(Source):
  """One commit of a repository: every restart runs the same code."""

  called = 'git+URL@COMMIT'

  url: str
  commit: str

  def requirement(self, extra):
    return f'jaxformer[{extra}] @ git+{self.url}@{self.commit}'


class Wheel(Source):
  """A wheel, here or at a URL."""

  called = 'a wheel (a file or a URL)'

  path: str

  @property
  def local(self) -> bool:
    return self.scheme == 'file'

  @property
  def scheme(self) -> str:
    """Of the URL; 'file' for a file here."""
    return self.path.partition('://')[0] if '://' in self.path else 'file'

  def requirement(self, extra):
    return f'{self.path}[{extra}]' if self.local else f'jaxformer[{extra}] @ {self.path}'


class WorkingDirectory(Source):
  """A folder with jaxformer's `pyproject.toml`, which the engine copies to the machines."""

  called = 'a folder with the pyproject.toml of jaxformer'

  path: str = '.'

  def requirement(self, extra):
    return f'.[{extra}]'


class Installed(Source):
  """The environment that is active where the job is submitted, which its machines share."""

  called = 'installed'


def source_of(text: str) -> Source:
  """What `--source` names. Raises `InputError` for a repository without a commit, and for files
  that are not there."""
  if text == 'installed':
    return Installed()
  if text.startswith('git+'):
    url, at, commit = text.removeprefix('git+').rpartition('@')
    if not at or '/' in commit or '://' not in url:
      raise InputError(
        f'--source {text}: must be git+URL@COMMIT, so that every restart runs the same code'
      )
    return Git(url=url, commit=commit)
  path = pathlib.Path(text)
  if text.endswith('.whl'):
    wheel = Wheel(path=text)
    if wheel.local and not path.is_file():
      raise InputError(f'--source {text}: no such file')
    return wheel
  if not (path / 'pyproject.toml').is_file():
    raise InputError(
      f'--source {text}: must be {", ".join(s.called for s in (Git, Wheel, WorkingDirectory))}, or '
      'installed'
    )
  return WorkingDirectory(path=text)


# ---- the job -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """One run on one target.

  Attributes:
    name: of the run.
    experiment: a preset's name or an experiment file.
    overrides: (path, text), without those of `run`.
    run_dir: where the run folder is.
    folder: where the files of the job are, here.
    target: what it runs on.
    spot: on machines that may be taken away.
    source: what they install.
  """

  name: str
  experiment: str
  overrides: tuple[tuple[str, str], ...]
  run_dir: str
  folder: pathlib.Path
  target: Target
  spot: bool
  source: Source

  @property
  def remote(self) -> bool:
    """Whether the run folder is on storage that all machines share and that outlives them."""
    return '://' in self.run_dir

  @property
  def tpu(self) -> bool:
    return self.target.topology is not None

  @property
  def extra(self) -> str:
    """The optional dependencies that the accelerator and the run folder need."""
    return ('tpu' if self.tpu else 'cuda') + (',storage' if self.remote else '')

  @property
  def file(self) -> pathlib.Path | None:
    """The experiment file, None for a preset."""
    return (
      pathlib.Path(self.experiment)
      if self.experiment.endswith('.py') or '/' in self.experiment
      else None
    )

  @property
  def carried(self) -> str | None:
    """The text of an experiment file that the source does not bring along."""
    return (
      self.file.read_text()
      if self.file is not None and isinstance(self.source, Git | Wheel)
      else None
    )

  @property
  def words(self) -> list[str]:
    """`jaxformer train ...` as the machines run it, in the folder of the source."""
    given = (*self.overrides, ('run.name', self.name), ('run.dir', self.run_dir))
    return [
      'jaxformer',
      'train',
      self._experiment_there(),
      *(f'--{path}={text}' for path, text in given),
    ]

  def path(self, end: str) -> pathlib.Path:
    """A file of the job, beside the run folder where that is here."""
    return self.folder / f'{self.name}.{end}'

  @property
  def train(self) -> str:
    return shlex.join(self.words)

  def short_name(self, longest: int = 39) -> str:
    """The name in lower case letters, digits and dashes, as clusters and clouds want it; a long one
    is cut and told apart by a digest of the whole."""
    name = re.sub(r'[^a-z0-9]+', '-', self.name.lower()).strip('-')
    name = name if name[:1].isalpha() else f'run-{name}'
    if len(name) <= longest:
      return name
    return f'{name[: longest - 7].rstrip("-")}-{hashlib.sha256(self.name.encode()).hexdigest()[:6]}'

  def _experiment_there(self) -> str:
    if self.file is None:
      return self.experiment
    if isinstance(self.source, Git | Wheel):
      return self.file.name
    root = pathlib.Path(
      self.source.path if isinstance(self.source, WorkingDirectory) else '.'
    ).resolve()
    if not self.file.resolve().is_relative_to(root):
      raise InputError(
        f'{self.experiment}: must be in the folder {root} that the machines have, or --source a '
        'commit or a wheel'
      )
    return str(self.file.resolve().relative_to(root))


# ---- commands ----------------------------------------------------------------------------------


def environment(requirement: str, folder: str) -> list[str]:
  """Commands that make a virtual environment and put it first on the path. Images of clouds come
  with an older Python; uv brings its own. Both arguments are shell text."""
  return [
    'export PATH="$HOME/.local/bin:$PATH"',
    '{ command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh; }',
    f'uv venv --quiet --allow-existing --python {PYTHON} {folder}',
    f'uv pip install --quiet --python {folder} {requirement}',
    f'export PATH={folder}/bin:$PATH',
  ]


def write_experiment(job: Job) -> list[str]:
  """Commands that write the experiment file, where the source does not bring it."""
  if job.carried is None or job.file is None:
    return []
  end = 'EXPERIMENT'
  while end in job.carried.splitlines():
    end += '_'
  return [f"cat > {shlex.quote(job.file.name)} <<'{end}'", *job.carried.splitlines(), end]
