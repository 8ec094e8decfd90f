"""A job: one training run on one target, as shell commands that every engine can run.

- It installs a version, a git commit, a wheel or a folder (`CodeSource`) into a virtual
  environment.
- It writes the user's files, and compares their hashes, and the version of jaxformer, with those
  that were planned.
- It runs `jaxformer train EXPERIMENT overrides --run.name NAME --run.dir DIR`, one process per
  host; on Slurm, one per GPU.

Engines act on the exit code: after `exit_codes.PREEMPTED` they restart the run, which resumes; a
code of `SIGNALLED` and above means that a signal ended the process, as when another host died, and
they restart it a few times; any other code is final."""

import dataclasses
import hashlib
import pathlib
import re
import shlex
from collections.abc import Sequence
from typing import Final

from jaxformer.files import user_path
from jaxformer.launch.user_files import NO_FILES, UserFiles
from jaxformer.planning.target import Target

SIGNALLED: Final = 128
PYTHON: Final = '3.12'
LONGEST_NAME: Final = 39  # of a job, in characters

# ---- sources -----------------------------------------------------------------------------------

# kinds of sources -> their form in `--source`
FORMS = {
  'index': 'jaxformer==VERSION',
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
      file or a URL, 'folder' a local folder with jaxformer's `pyproject.toml`. 'index' is a version
      from the package index. 'installed' is the active environment, where the job's machines share
      the disk that it is on.
    place: git+URL@COMMIT, jaxformer==VERSION, or a path or URL.
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
    """The local folder in whose copy the machines run; None if they run in no copy of one."""
    return self.place if self.kind == 'folder' else None

  def requirement(self, extra: str, uploads: str) -> str:
    """What pip installs, as shell text, with extras such as 'tpu' or 'cuda,storage'; `uploads` is
    the folder that an uploaded file is in, as shell text."""
    if self.kind == 'folder':
      return shlex.quote(f'.[{extra}]')
    if self.scheme in ('file', 'gs'):
      return f'{uploads}/{shlex.quote(f"{pathlib.PurePath(self.place).name}[{extra}]")}'
    if self.kind == 'index':
      return shlex.quote(self.place.replace('==', f'[{extra}]==', 1))
    return shlex.quote(f'jaxformer[{extra}] @ {self.place}')

  def install(
    self, extra: str, environment: str, uploads: str = '.', more: Sequence[str] = ()
  ) -> list[str]:
    """Commands that install it, and `more` requirements, into a virtual environment and put that
    first on the path. Cloud images come with an older Python; uv brings its own. `environment` and
    `uploads` are folders, as shell text."""
    if self.kind == 'installed':
      return []
    wanted = ' '.join([self.requirement(extra, uploads), *map(shlex.quote, more)])
    download = [f'gcloud storage cp {shlex.quote(self.place)} {uploads}']  # pip cannot
    return [
      *(download if self.scheme == 'gs' else []),
      'export PATH="$HOME/.local/bin:$PATH"',
      '{ command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh; }',
      f'uv venv --quiet --allow-existing --python {PYTHON} {environment}',
      f'uv pip install --quiet --python {environment} {wanted}',
      f'export PATH={environment}/bin:$PATH',
    ]


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
    version: of jaxformer, which planned the job and must run it; None for any.
    files: those of the user.
    requirements: what else is installed, as pip takes it.
    options: (name, text) of the other options of `train`.
  """

  name: str
  experiment: str
  overrides: tuple[tuple[str, str], ...]
  run_dir: str
  target: Target
  spot: bool
  source: CodeSource
  version: str | None = None
  files: UserFiles = NO_FILES
  requirements: tuple[str, ...] = ()
  options: tuple[tuple[str, str], ...] = ()

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
  def words(self) -> list[str]:
    """`jaxformer train ...`, as the machines run it in the folder of the source."""

    def there(text: str) -> str:
      return self.files.there(text, self.files_folder)

    given = (*self.options, *self.overrides, ('run.name', self.name), ('run.dir', self.run_dir))
    options = (f'--{path}={there(text)}' for path, text in given)
    return ['jaxformer', 'train', there(self.experiment), *options]

  @property
  def files_folder(self) -> str:
    """The folder of the user's files on the machines, where training starts. Named by their
    content: jobs that share a disk leave each other's files alone."""
    return f'jaxformer-files-{self.files.digest()}'

  @property
  def mark(self) -> str:
    """The last line of every job file, by which it is known as a file of this job."""
    return f'# job file of jaxformer launch for the run {self.name}\n'

  def path(self, end: str) -> pathlib.Path:
    """A file of the job, next to the run folder if that is local."""
    folder = 'runs' if self.remote else self.run_dir
    return user_path(folder, 'run.dir') / user_path(f'{self.name}.{end}', 'run.name')

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

  def prepare(self) -> list[str]:
    """Commands, each one line, that write the user's files, and that fail with one line where a
    file, or the installed version, is not what was planned."""
    commands = self.files.commands(self.files_folder)
    if self.version is not None:
      wanted = shlex.quote(f'jaxformer {self.version}')
      commands.append(
        f'{{ version=$(jaxformer --version) && [ "$version" = {wanted} ] || {{ '
        f'echo "error: planned with {self.version}, here is: $version" >&2; false; }}; }}'
      )
    return commands
