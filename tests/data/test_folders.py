"""Folders and patterns: every file is read, or an error names it."""

import itertools
import json
import os
import socket
import threading

import pytest

from jaxformer.config import InputError
from jaxformer.data import Files, Text, TokenizerFile, Tsv, open_data
from jaxformer.data import folders as data_folders

pytestmark = pytest.mark.quick


@pytest.fixture
def tree(tmp_path):
  """A folder with a file, a link to a folder elsewhere, to a file, and to its own parent."""
  for name in ('elsewhere/deep/a.txt', 'elsewhere/b.txt', 'corpus/c.txt', 'corpus/sub/d.txt'):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name)
  (tmp_path / 'corpus' / 'linked').symlink_to(tmp_path / 'elsewhere')
  (tmp_path / 'corpus' / 'sub' / 'loop').symlink_to(tmp_path / 'corpus')
  (tmp_path / 'corpus' / 'copy.txt').symlink_to(tmp_path / 'elsewhere' / 'b.txt')
  (tmp_path / 'elsewhere' / 'self').symlink_to('.')
  return tmp_path


ALL = ['c.txt', 'copy.txt', 'linked/b.txt', 'linked/deep/a.txt', 'sub/d.txt']


def names(path) -> list[str]:
  return list(Files(path=str(path)).files())


def test_links_are_followed_and_loops_end(tree):
  assert names(tree / 'corpus') == ALL


@pytest.mark.parametrize('pattern', ['**', '**/*', '**/*.txt', '**/*.t[x]t'])
def test_a_pattern_finds_what_the_folder_holds(tree, pattern):
  assert names(tree / 'corpus' / pattern) == ALL


def test_patterns_of_one_level_and_with_plain_parts(tree, monkeypatch):
  assert names(tree / 'corpus' / '*.txt') == ['c.txt', 'copy.txt']
  assert names(tree / 'corpus' / '*' / '*.txt') == ['linked/b.txt', 'sub/d.txt']
  assert names(tree / '*' / 'deep' / '*.txt') == ['a.txt']
  monkeypatch.chdir(tree)
  assert names('corpus/**/d.txt') == ['d.txt']
  assert names('*/c.txt') == ['c.txt']
  assert names('./corpus/../elsewhere/*.txt') == ['b.txt']


def test_a_folder_has_its_own_name_before_those_of_links(tmp_path):
  (tmp_path / 'b').mkdir()
  (tmp_path / 'b' / 'x.txt').write_text('x')
  (tmp_path / 'a').symlink_to(tmp_path / 'b')
  assert names(tmp_path) == ['b/x.txt']


def test_folders_that_link_to_each_other_take_linear_time(tmp_path):
  for i in range(12):
    (tmp_path / f'{i}').mkdir()
    (tmp_path / f'{i}' / 'x.txt').write_text(f'{i}')
  for i, j in itertools.permutations(range(12), 2):
    (tmp_path / f'{i}' / f'to_{j}').symlink_to(tmp_path / f'{j}')
  assert len(names(tmp_path)) == len(names(tmp_path / '**' / '*.txt')) == 12


def test_hidden_names_are_left_out_unless_a_pattern_names_the_dot(tmp_path):
  for name in ('a.txt', '.b.txt', '.git/c.txt', 'd/.e.txt'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(name)
  assert names(tmp_path) == names(tmp_path / '**') == ['a.txt']
  assert names(tmp_path / '.*.txt') == ['.b.txt']
  assert names(tmp_path / '.git' / '*') == ['c.txt']
  assert names(tmp_path / '**' / '.*.txt') == ['.b.txt', 'd/.e.txt']


def refuse(monkeypatch, folder):
  """Let a folder be unreadable; permissions do not bind the superuser."""
  scandir = os.scandir

  def refusing(path):
    if os.path.basename(path) == folder:
      raise PermissionError(13, 'Permission denied', os.fspath(path))
    return scandir(path)

  monkeypatch.setattr(data_folders.os, 'scandir', refusing)


@pytest.mark.parametrize('pattern', ['.', '**/*.txt', '*/*.txt', 's*/*'])
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch, pattern):
  (tmp_path / 'secret').mkdir()
  (tmp_path / 'a.txt').write_text('a')
  refuse(monkeypatch, 'secret')
  with pytest.raises(
    InputError, match=r'Files\.path = .*secret cannot be read \(Permission denied'
  ):
    names(tmp_path / pattern)


def make_pipe(path):
  os.mkfifo(path)


def make_socket(path):
  with socket.socket(socket.AF_UNIX) as s:
    s.bind(os.fspath(path))


def make_broken_link(path):
  path.symlink_to('gone')


def make_looping_link(path):
  path.symlink_to(path.name)


@pytest.mark.parametrize('pattern', ['', '**', '*'])
@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (make_pipe, 'x is neither a file nor a folder'),
    (make_socket, 'x is neither a file nor a folder'),
    (make_broken_link, 'x is a link to gone, which does not exist'),
    (make_looping_link, r'x cannot be read \(Too many levels of symbolic links\)'),
  ],
)
def test_what_is_no_file_is_an_error(tmp_path, monkeypatch, make, message, pattern):
  monkeypatch.chdir(tmp_path)  # names of sockets are short
  (tmp_path / 'a.txt').write_text('a')
  make(tmp_path / 'x') if make is not make_socket else make('x')
  with pytest.raises(InputError, match=message):
    names(tmp_path / pattern if pattern else tmp_path)


@pytest.mark.parametrize('pattern', ['**/*.txt', '*/*.txt'])
def test_a_link_that_might_have_been_a_folder_is_an_error(tmp_path, pattern):
  (tmp_path / 'a').mkdir()
  (tmp_path / 'a' / 'b.txt').write_text('b')
  (tmp_path / 'linked').symlink_to('/not/mounted')
  with pytest.raises(InputError, match='linked is a link to /not/mounted, which does not exist'):
    names(tmp_path / pattern)
  assert names(tmp_path / 'a*' / '*.txt') == ['b.txt']


def test_a_named_pipe_is_not_waited_for(tmp_path):
  pipe = tmp_path / 'pipe'
  os.mkfifo(pipe)
  errors = []

  def attempt(build):
    try:
      build()
    except InputError as e:
      errors.append(str(e))

  for build in (
    lambda: names(pipe),
    lambda: TokenizerFile(path=str(pipe)).train(()),
    lambda: list(Tsv(path=str(pipe)).rows()),
  ):
    thread = threading.Thread(target=attempt, args=(build,), daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
  assert len(errors) == 3
  assert all(str(pipe) in e for e in errors)


@pytest.mark.parametrize('path', ['x' * 300, '~nobody-of-this-name/x', 'a\0b'])
@pytest.mark.parametrize('kind', [Files, Tsv, TokenizerFile])
def test_paths_that_cannot_be(path, kind):

  def use():
    config = kind(path=path)
    return config.train(()) if kind is TokenizerFile else config.fingerprint()

  with pytest.raises(InputError, match='path'):
    use()


def test_a_link_to_a_folder_is_data(tmp_path, corpus):
  """The documents of a linked folder are trained on, by folder and by pattern."""
  (tmp_path / 'far').mkdir()
  (tmp_path / 'near').mkdir()
  for folder, count in (('far', 80), ('near', 5)):
    rows = (json.dumps({'text': f'{folder} {i} ' * 9}) + '\n' for i in range(count))
    (tmp_path / folder / 'a.jsonl').write_text(''.join(rows))
  (tmp_path / 'near' / 'linked').symlink_to('../far')
  for path in ('near', 'near/**/*.jsonl'):
    data = open_data(Text(corpus=Files(path=str(tmp_path / path)), sequence_length=32))
    sides = data.manifest['train'], data.manifest['validation']
    assert sum(side['documents'] for side in sides) == 85


def test_a_cache_within_a_linked_folder(tmp_path):
  (tmp_path / 'far').mkdir()
  (tmp_path / 'near').mkdir()
  (tmp_path / 'near' / 'a.txt').write_text('some text ' * 99)
  (tmp_path / 'near' / 'linked').symlink_to('../far')
  for path in ('near', 'near/**'):
    data = Text(corpus=Files(path=str(tmp_path / path)), sequence_length=16)
    with pytest.raises(InputError, match='contains the cache folder'):
      open_data(data, cache_dir=tmp_path / 'far' / 'cache')
