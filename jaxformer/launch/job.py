"""A job: one training run on one target, as shell commands that every engine can run.

- It installs a git commit, a wheel or a folder (`CodeSource`) into a virtual environment.
- It runs `jaxformer train EXPERIMENT overrides --run.name NAME --run.dir DIR`, one process per
  host; on Slurm, one per GPU.

Engines act on the exit code: after `exit_codes.PREEMPTED` they restart the run, which resumes; a
code of `SIGNALLED` and above means that a signal ended the process, as when another host died, and
they restart it a few times; any other code is final."""

import base64
import dataclasses
import hashlib
import pathlib
import re
import shlex
from typing import Final

from jaxformer.config import InputError
from jaxformer.files import user_path
from jaxformer.planning.target import Target

SIGNALLED: Final = 128
PYTHON: Final = '3.12'
LONGEST_NAME: Final = 39  # of a job, in characters

# ---- sources -----------------------------------------------------------------------------------

# kinds of sources -> their form in `--source`
FORMS = {
  'git': 'git+URL@COMMIT',
  'wheel': 'a wheel (a file or a URL)',
  'folder': 'a folder with the pyproject.toml of jaxformer',
  'installed': 'installed',
}


@dataclasses.dataclass(frozen=True)
class CodeSource:
  """What the machines install.

  Attributes:
    kind: 'git' is one commit of a repository: every restart runs the same code. 'wheel' is a local
      file or a URL, 'folder' a local folder with jaxformer's `pyproject.toml`. 'installed' is the
      active environment, where the job's machines share the disk that it is on.
    place: git+URL@COMMIT, or a path or URL.
  """

  kind: str
  place: str = '.'

  @property
  def scheme(self) -> str | None:
    """Where a wheel is: 'file', or the scheme of its URL; None for other sources."""
    if self.kind != 'wheel':
      return None
    return self.place.partition('://')[0] if '://' in self.place else 'file'

  @property
  def upload(self) -> str | None:
    """A local file or folder that the engine copies to the machines."""
    return self.place if self.kind == 'folder' or self.scheme == 'file' else None

  @property
  def folder(self) -> str | None:
    """The local folder in whose copy the machines run; None if they get no local files."""
    return self.place if self.kind in ('folder', 'installed') else None

  def requirement(self, extra: str, uploads: str) -> str:
    """What pip installs, as shell text, with extras such as 'tpu' or 'cuda,storage'; `uploads` is
    the folder that an uploaded file is in, as shell text."""
    if self.kind == 'folder':
      return shlex.quote(f'.[{extra}]')
    if self.scheme in ('file', 'gs'):
      return f'{uploads}/{shlex.quote(f"{pathlib.PurePath(self.place).name}[{extra}]")}'
    return shlex.quote(f'jaxformer[{extra}] @ {self.place}')

  def install(self, extra: str, environment: str, uploads: str = '.') -> list[str]:
    """Commands that install it into a virtual environment and put that first on the path. Cloud
    images come with an older Python; uv brings its own. `environment` and `uploads` are folders, as
    shell text."""
    if self.kind == 'installed':
      return []
    download = [f'gcloud storage cp {shlex.quote(self.place)} {uploads}']  # pip cannot
    return [
      *(download if self.scheme == 'gs' else []),
      'export PATH="$HOME/.local/bin:$PATH"',
      '{ command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh; }',
      f'uv venv --quiet --allow-existing --python {PYTHON} {environment}',
      f'uv pip install --quiet --python {environment} {self.requirement(extra, uploads)}',
      f'export PATH={environment}/bin:$PATH',
    ]


def source_of(text: str) -> CodeSource:
  """The source that `--source` names. Raises `InputError` for a repository without a commit, and
  for missing files."""
  path = user_path(text, '--source')
  if text == 'installed':
    return CodeSource('installed')
  if text.startswith('git+'):
    url, at, commit = text.rpartition('@')
    if not at or '/' in commit or '://' not in url:
      raise InputError('--source', text, 'git+URL@COMMIT, so that every restart runs the same code')
    return CodeSource('git', text)
  if text.endswith('.whl'):
    wheel = CodeSource('wheel', text)
    if wheel.upload and not path.is_file():
      raise InputError('--source', text, problem='no such file')
    return wheel
  if not (path / 'pyproject.toml').is_file():
    raise InputError('--source', text, ' or '.join(FORMS.values()))
  return CodeSource('folder', text)


# ---- the job -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """One run on one target.

  Attributes:
    name: of the run.
    experiment: a preset's name or an experiment file.
    overrides: (path, text), without those of `run`.
    run_dir: the folder of run folders, local or on object storage.
    target: the slices that it runs on.
    spot: whether to use preemptible machines.
    source: what they install.
  """

  name: str
  experiment: str
  overrides: tuple[tuple[str, str], ...]
  run_dir: str
  target: Target
  spot: bool
  source: CodeSource

  @property
  def remote(self) -> bool:
    """Whether the run folder is on object storage, which all machines share and which outlives
    them."""
    return '://' in self.run_dir

  @property
  def tpu(self) -> bool:
    return self.target.topology is not None

  @property
  def extra(self) -> str:
    """The extras that the accelerator and the run folder need."""
    return ('tpu' if self.tpu else 'cuda') + (',storage' if self.remote else '')

  @property
  def file(self) -> pathlib.Path | None:
    """The experiment file; None for a preset."""
    is_file = self.experiment.endswith('.py') or '/' in self.experiment
    return user_path(self.experiment) if is_file else None

  @property
  def words(self) -> list[str]:
    """`jaxformer train ...`, as the machines run it in the folder of the source."""
    given = (*self.overrides, ('run.name', self.name), ('run.dir', self.run_dir))
    options = (f'--{path}={text}' for path, text in given)
    return ['jaxformer', 'train', self._experiment_there(), *options]

  def path(self, end: str) -> pathlib.Path:
    """A file of the job, next to the run folder if that is local."""
    folder = 'runs' if self.remote else self.run_dir
    return user_path(folder, 'run.dir') / f'{self.name}.{end}'

  @property
  def train(self) -> str:
    return shlex.join(self.words)

  def short_name(self) -> str:
    """The name in lower case letters, digits and dashes, as clusters and clouds require; a long one
    is cut and ends in a digest of the complete name."""
    name = re.sub(r'[^a-z0-9]+', '-', self.name.lower()).strip('-')
    name = name if name[:1].isalpha() else f'run-{name}'
    if len(name) <= LONGEST_NAME:
      return name
    digest = hashlib.sha256(self.name.encode()).hexdigest()[:6]
    return f'{name[: LONGEST_NAME - 7].rstrip("-")}-{digest}'

  def write_experiment(self) -> list[str]:
    """The command that writes the experiment file, if the source does not contain it. Base64 is
    one line, whatever the file contains."""
    if self.file is None or self.source.folder is not None:
      return []
    encoded = base64.b64encode(self.file.read_bytes()).decode()
    return [f'echo {encoded} | base64 -d > {shlex.quote(self.file.name)}']

  def _experiment_there(self) -> str:
    if self.file is None:
      return self.experiment
    if self.source.folder is None:
      return self.file.name
    root, file = pathlib.Path(self.source.folder).resolve(), self.file.resolve()
    if not file.is_relative_to(root):
      where = f'in {root}, the folder that the machines get, or --source a commit or a wheel'
      raise InputError('experiment', self.experiment, where)
    return str(file.relative_to(root))
