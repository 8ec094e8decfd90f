"""What a job brings of the user's, and what the machine compares before it trains."""

import os
import subprocess
from pathlib import Path

import pytest

from jaxformer.config import InputError
from jaxformer.data.local_paths import paths_of
from jaxformer.installation import Installation, origin_of
from jaxformer.launch import CodeSource, GCloud, Sky, Slurm
from jaxformer.launch.data_paths import check_data_paths
from jaxformer.launch.source import check_version, default_source, described
from jaxformer.launch.user_files import requirements, user_files
from jaxformer.launch.xpk import XPK
from tests.launch.jobs import FOLDER, GIT, INSTALLED, job
from tests.launch.test_files import ENGINES_READY, script_of, there

pytestmark = pytest.mark.quick


def write(folder, **texts):
  for name, text in texts.items():
    file = folder / (name.replace('__', '/') + '.py')
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def home(tmp_path, monkeypatch):
  """A working folder with an experiment in one folder and a layer in another."""
  write(
    tmp_path,
    exps__q='import near\nfrom pack.deep import f\nimport importlib\nimportlib.import_module("late")',
    exps__near='import json, nearer',
    exps__nearer='from near import *',
    exps__late='',
    exps__unused='',
    exps__pack__deep='from . import sibling\nfrom ..near import x',
    exps__pack__sibling='',
    layers__mine='from helper import h',
    layers__helper='',
  )
  (tmp_path / 'exps/pack/__init__.py').write_text('')
  monkeypatch.chdir(tmp_path)
  return tmp_path


# ---- which files -------------------------------------------------------------------------------


def test_all_that_is_imported_beside_goes_along_and_keeps_its_place(home):
  found = user_files('exps/q.py', ['256', 'layers/mine.py:Mine.Config', 'gone.py:X'])
  assert [path for path, _ in found.contents] == [
    'exps/late.py',
    'exps/near.py',
    'exps/nearer.py',
    'exps/pack/__init__.py',
    'exps/pack/deep.py',
    'exps/pack/sibling.py',
    'exps/q.py',
    'layers/helper.py',
    'layers/mine.py',
  ]
  assert found.there('exps/q.py', 'F') == 'F/exps/q.py'
  assert found.there('layers/mine.py:Mine.Config', 'F') == 'F/layers/mine.py:Mine.Config'
  assert found.there('gone.py:X', 'F') == 'gone.py:X'
  assert found.imports == ()


def test_a_file_that_is_reached_from_two_folders_is_followed_in_both(home):
  write(home, top='import exps.q')
  found = user_files('top.py', ['exps/q.py:X'])
  assert 'exps/nearer.py' in found.sha256()


def test_a_package_goes_along_from_the_folder_that_holds_it(home):
  write(home, whole__part='', beside='')
  (home / 'whole/__init__.py').write_text('import whole.part, beside')
  found = user_files('whole/__init__.py:X', [])
  assert [path for path, _ in found.contents] == ['beside.py', 'whole/__init__.py', 'whole/part.py']
  assert found.there('whole/__init__.py:X', 'F') == 'F/whole/__init__.py:X'


def test_names_of_presets_and_families_are_no_files(home):
  write(home, mamba='')
  assert user_files('mamba', ['Muon', 'exps/q.py']).contents == ()


@pytest.mark.parametrize(('text', 'problem'), [(None, 'No such file'), ('def', 'is no Python')])
def test_a_file_that_cannot_be_read_is_one_line(text, problem, home):
  if text is not None:
    write(home, wrong=text)
  with pytest.raises(InputError, match=problem) as e:
    user_files('wrong.py:X', [])
  assert '\n' not in str(e.value)


def test_what_files_import_from_elsewhere_is_installed_by_its_version():
  import pytest_timeout  # noqa: F401

  (found,) = requirements(['numpy', 'jax', 'pytest_timeout', 'jaxformer'])
  assert found.startswith('pytest-timeout==')
  with pytest.raises(InputError, match="import = 'no_such_module'"):
    requirements(['no_such_module'])


# ---- what the machine compares -----------------------------------------------------------------


@pytest.fixture
def machine(tmp_path):
  """Runs the script of a job where jaxformer is of a version; the exit code and stderr."""

  def run(engine, one, version='1.2', spoil=None):
    bin_, at = tmp_path / 'bin', tmp_path / 'machine'
    bin_.mkdir(exist_ok=True)
    at.mkdir(exist_ok=True)
    answer = f'echo jaxformer {version}' if version else 'exit 127'
    scripts = dict.fromkeys(('uv', 'python', 'curl', 'gcloud', 'sleep'), 'exit 0')
    scripts |= {'jaxformer': f'if [ "$1" = --version ]; then {answer}; else touch trained; fi'}
    scripts |= {'srun': 'exec "$@"'}
    if spoil:  # the disk changes a file after it was written
      scripts['tar'] = f'PATH=/usr/bin:/bin tar "$@" || exit; cd "${{@: -1}}" && {spoil}'
    for name, body in scripts.items():
      (bin_ / name).write_text(f'#!/bin/bash\n{body}\n')
      (bin_ / name).chmod(0o755)
    done = subprocess.run(
      ['bash', '-c', there(script_of(engine, one))],
      cwd=at,
      env={'PATH': f'{bin_}:/usr/bin:/bin', 'HOME': str(at)},
      capture_output=True,
      text=True,
      check=False,
    )
    said = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith('error')]
    return done.returncode, said, (at / 'trained').exists()

  return run


def planned(name, **more):
  files = user_files('exps/q.py', ())
  target = 'h100:8' if name == 'slurm' else 'v6e-8'
  return job(target, GIT, experiment='exps/q.py', files=files, version='1.2', **more)


@pytest.mark.parametrize('name', ENGINES_READY)
def test_a_job_trains_with_what_was_planned(name, home, machine):
  assert machine(ENGINES_READY[name], planned(name)) == (0, [], True)


@pytest.mark.parametrize('name', ENGINES_READY)
@pytest.mark.parametrize('spoil', ['echo >> near.py', 'rm near.py'])
@pytest.mark.usefixtures('home')
def test_a_file_that_differs_is_one_line_and_no_training(name, spoil, machine):
  code, said, trained = machine(ENGINES_READY[name], planned(name), spoil=spoil)
  assert code != 0
  assert not trained
  (line,) = said
  assert 'near.py' in line
  assert 'q.py' not in line


@pytest.mark.parametrize('name', ENGINES_READY)
@pytest.mark.parametrize('version', ['1.3', ''])
@pytest.mark.usefixtures('home')
def test_another_version_is_one_line_and_no_training(name, version, machine):
  code, said, trained = machine(ENGINES_READY[name], planned(name), version=version)
  assert code != 0
  assert not trained
  assert len(said) == 1
  assert 'planned with 1.2' in said[0]


@pytest.mark.parametrize('name', ENGINES_READY)
@pytest.mark.usefixtures('home')
def test_requirements_are_installed_with_jaxformer(name):
  text = script_of(ENGINES_READY[name], planned(name, requirements=('einops==0.8.1',)))
  assert 'jaxformer[' in text
  assert ' einops==0.8.1' in text


def test_files_beyond_the_limit_of_an_engine_are_refused(tmp_path):
  file = tmp_path / 'q.py'
  file.write_text('x = 1\n' * 30_000)
  small = job('v6e-8', GIT, experiment=str(file), files=user_files(str(file), ()))
  XPK(cluster='c').check(small)
  file.write_text('# ' + os.urandom(150_000).hex())
  one = job('v6e-8', GIT, experiment=str(file), files=user_files(str(file), ()))
  Sky().check(one)
  GCloud().check(one)
  with pytest.raises(InputError, match=r'q\.py; at most 122,880'):
    XPK(cluster='c').check(one)
  file.write_text('# ' + os.urandom(250_000).hex())
  one = job('v6e-8', GIT, experiment=str(file), files=user_files(str(file), ()))
  with pytest.raises(InputError, match='at most 262,144'):
    GCloud().check(one)


# ---- the source that runs here -----------------------------------------------------------------


def test_the_source_is_what_runs_here(tmp_path):
  kinds = Sky.sources
  (tmp_path / 'jaxformer-1.2-py3-none-any.whl').write_text('')
  wheel = f'{tmp_path}/jaxformer-1.2-py3-none-any.whl'
  assert default_source(Installation('1.2'), kinds) == CodeSource('index', 'jaxformer==1.2')
  assert default_source(Installation('1.2', tmp_path), kinds) == CodeSource('folder', str(tmp_path))
  assert default_source(Installation('1.2', origin=wheel), kinds) == CodeSource('wheel', wheel)
  commit = 'git+https://h/r@0123abc'
  assert default_source(Installation('1.2', origin=commit), kinds) == CodeSource('git', commit)
  assert default_source(Installation('1.2', tmp_path), Slurm.sources) == INSTALLED
  for gone in (Installation('1.2', origin='/gone.whl'), Installation('not installed')):
    with pytest.raises(InputError, match='--source = None'):
      default_source(gone, kinds)
  with pytest.raises(InputError, match='without local changes'):
    default_source(Installation('1.2', tmp_path), GCloud.sources)


@pytest.mark.parametrize(
  ('record', 'origin'),
  [
    (
      '{"url": "https://h/r", "vcs_info": {"vcs": "git", "commit_id": "0123"}}',
      'git+https://h/r@0123',
    ),
    ('{"url": "file:///a%20b/j.whl", "archive_info": {}}', '/a b/j.whl'),
    ('{"url": "https://h/j.whl", "archive_info": {}}', 'https://h/j.whl'),
  ],
)
def test_origins_are_read_from_the_record_of_pip(record, origin):
  assert origin_of(record) == origin


def git(folder, *words):
  name = ['-c', 'user.name=n', '-c', 'user.email=e@e']
  subprocess.run(['git', '-C', str(folder), *name, *words], check=True, capture_output=True)


def test_a_clean_commit_that_is_pushed_is_a_source_and_changes_are_said(tmp_path):
  (tmp_path / 'pyproject.toml').write_text('[project]\nname = "jaxformer"\nversion = "1.2"')
  git(tmp_path, 'init', '-q')
  git(tmp_path, 'add', '.')
  git(tmp_path, 'commit', '-qm', 'x')
  here = Installation('1.2', tmp_path)
  with pytest.raises(InputError, match='pushed to an https remote'):
    default_source(here, GCloud.sources)
  git(tmp_path, 'remote', 'add', 'origin', 'https://h/r')
  git(tmp_path, 'update-ref', 'refs/remotes/origin/main', 'HEAD')
  found = default_source(here, GCloud.sources)
  assert found.place.startswith('git+https://h/r@')
  folder = CodeSource('folder', str(tmp_path))
  assert described(folder).endswith('without changes)')
  (tmp_path / 'new.py').write_text('')
  assert described(folder).endswith('with 1 changed files)')
  with pytest.raises(InputError, match='without local changes'):
    default_source(here, GCloud.sources)
  check_version(folder, '1.2')
  with pytest.raises(InputError, match=r'is version 1\.2, and 1\.3 plans'):
    check_version(folder, '1.3')


@pytest.mark.parametrize(
  'source',
  [
    CodeSource('index', 'jaxformer==1.3'),
    CodeSource('wheel', 'd/jaxformer-1.3-py3-none-any.whl'),
    CodeSource('wheel', 'd/other-1.2-py3-none-any.whl'),
  ],
)
def test_a_source_of_another_version_is_refused(source):
  with pytest.raises(InputError, match='--source'):
    check_version(source, '1.2')


# ---- paths of data -----------------------------------------------------------------------------


class Data:
  """JSON data of a config."""

  def __init__(self, **fields):
    self.fields = fields


def test_paths_are_found_in_any_config(home):
  (home / 'corpus').mkdir()
  data = {
    'type': 'Text',
    'corpus': {'type': 'Mixture', 'corpora': [{'type': 'Files', 'path': 'gone.txt'}]},
    'tokenizer': {'type': 'TokenizerFile', 'path': '/t.json'},
    'hub': {'type': 'HuggingFace', 'name': 'corpus', 'data_files': ['./exps/*.py', 'x/*.json']},
    'named': {'type': 'HuggingFace', 'name': 'user/set', 'split': 'train'},
    'mine': {'type': 'Mine', 'code': {'file': '/home/a.py'}, 'source_path': 'gs://b/x'},
    'url': {'type': 'Files', 'path': 'gs://b/x'},
  }
  assert dict(paths_of(data, 'data')) == {
    'data.corpus.corpora.0.path': 'gone.txt',
    'data.tokenizer.path': '/t.json',
    'data.hub.name': 'corpus',
    'data.hub.data_files.0': './exps/*.py',
    'data.url.path': 'gs://b/x',
  }


def text_of(path):
  from jaxformer.data import Files, Text

  return Text(corpus=Files(path=str(path)))


def test_paths_that_the_machines_do_not_have_are_refused(home):
  (home / 'corpus').mkdir()
  for source in (GIT, CodeSource('folder', 'exps')):
    for path in ('corpus', home / 'corpus', 'gone', 'gs://b/corpus'):
      with pytest.raises(InputError, match=r'^data\.corpus\.path = .*--source'):
        check_data_paths(Sky(), job('v6e-8', source), text_of(path))
  check_data_paths(Sky(), job('v6e-8', FOLDER), text_of('corpus'))
  for path in ('corpus', home / 'corpus', 'exps/*.py'):
    check_data_paths(Slurm(), job('h100:8', INSTALLED), text_of(path))
  with pytest.raises(InputError, match='a path that exists here'):
    check_data_paths(Slurm(), job('h100:8', INSTALLED), text_of('gone'))
  git(home, 'init', '-q')
  (home / '.gitignore').write_text('corpus\n')
  with pytest.raises(InputError, match='not ignored by git'):
    check_data_paths(Sky(), job('v6e-8', FOLDER), text_of('corpus'))


def test_weights_to_begin_from_are_where_the_machines_read_them(home):
  (home / 'runs/a').mkdir(parents=True)
  data = text_of(home / 'exps')

  def check(engine, text, target='h100:8'):
    check_data_paths(engine, job(target, GIT, options=(('init-from', text),)), data)

  for text in ('a', 'runs/a', 'runs/a@100', 'gs://b/r/a@100'):
    check(Slurm(), text)
  with pytest.raises(InputError, match="--init-from = 'b'"):
    check(Slurm(), 'b')


def test_a_job_file_ends_in_its_mark():
  for name, engine in ENGINES_READY.items():
    one = job('h100:8' if name == 'slurm' else 'v6e-8', GIT)
    assert all(text.endswith(one.mark) for text in engine.files(one).values())
    assert all(isinstance(path, Path) for path in engine.files(one))
