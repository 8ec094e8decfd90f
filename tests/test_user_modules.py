"""What a user's Python file may import beside itself, and what identifies it."""

import json
import os
import sys
import textwrap

import pytest

from jaxformer import config
from jaxformer.code_record import RECORD, code_of, code_records, contents
from jaxformer.config import Config, InputError
from jaxformer.local_files import local_files
from jaxformer.user_code import files_record, load_file, load_recorded, object_in_file
from tests.helpers import temporary_types

pytestmark = pytest.mark.quick

PART = """
from jaxformer.config import Config
class Part(Config):
  size: int = {}
"""


@pytest.fixture(autouse=True)
def types():
  with temporary_types():
    yield


def path_of(name):
  """The path that a keyword stands for: `pack__init` is pack/__init__.py, `pack__a` pack/a.py."""
  return name.replace('__', '/').replace('/init', '/__init__') + '.py'


def write(folder, **texts):
  for name, text in texts.items():
    file = folder / path_of(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(text))


def test_two_files_that_import_modules_of_one_name_get_their_own(tmp_path, monkeypatch):
  for name, value in (('one', 1), ('two', 2)):
    write(
      tmp_path / name,
      mine='import blocks\nfrom pack.inner import value as inner\nVALUE = blocks.VALUE, inner',
      blocks=f'VALUE = {value}',
      pack__inner='from .deep import value\nimport blocks\nvalue += 10 * blocks.VALUE',
      pack__deep=f'value = {100 * value}',
    )
  monkeypatch.chdir(tmp_path / 'one')
  path, names = list(sys.path), {'blocks', 'pack', 'mine'}
  assert load_file('mine.py').VALUE == (1, 110)
  assert load_file('../two/mine.py').VALUE == (2, 220)
  assert sys.path == path
  assert not names & set(sys.modules)
  assert not [p for p in tmp_path.rglob('*') if p.name == '__pycache__']


def test_imports_inside_functions_and_circles_find_the_same_modules(tmp_path):
  write(
    tmp_path,
    mine="""
      import other
      def late():
        import blocks.inner as inner, blocks
        from blocks import inner as again
        assert inner is again is blocks.inner
        return inner.VALUE, other.back()
      NAME = 'mine'
    """,
    other="""
      import mine
      def back():
        return mine.NAME
    """,
    blocks__init='',
    blocks__inner='VALUE = 5',
  )
  assert load_file(tmp_path / 'mine.py').late() == (5, 'mine')
  assert load_file(tmp_path / 'other.py').mine is load_file(tmp_path / 'mine.py')


def test_the_package_and_installed_packages_are_never_those_beside(tmp_path):
  write(
    tmp_path,
    mine='import jaxformer, numpy, random\nOWN = random.OWN\nfrom jaxformer.config import Config',
    jaxformer__init='raise SystemExit',
    numpy__other='',  # a folder that is no package
    random='OWN = True',  # as Python where it runs the file
  )
  assert load_file(tmp_path / 'mine.py').OWN
  found = local_files(tmp_path / 'mine.py')
  assert [p.name for p in found.contents] == ['mine.py', 'random.py']
  assert found.outside == {'jaxformer', 'numpy'}


def test_what_is_missing_beside_is_named_as_the_user_names_it(tmp_path):
  write(tmp_path, mine='import pack.gone', pack__init='')
  with pytest.raises(InputError, match=r"No module named 'pack\.gone'"):
    load_file(tmp_path / 'mine.py')
  write(tmp_path, mine='import near', near='1 / 0')
  with pytest.raises(InputError, match='ZeroDivisionError'):
    load_file(tmp_path / 'mine.py')
  write(tmp_path, near='VALUE = 1')
  assert load_file(tmp_path / 'mine.py').near.VALUE == 1


@pytest.mark.parametrize('changed', ['near', 'pack__deep'])
def test_a_file_is_loaded_again_after_an_edit_of_what_it_imports(changed, tmp_path):
  write(
    tmp_path,
    mine='from near import f\nfrom pack import deep\nVALUE = f(), deep.VALUE',
    near='def f(): return 1',
    pack__init='',
    pack__deep='VALUE = 1',
  )
  first = load_file(tmp_path / 'mine.py')
  assert load_file(tmp_path / 'mine.py') is first
  file = tmp_path / path_of(changed)
  times = file.stat()
  file.write_text(file.read_text().replace('1', '2'))  # of one size
  os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
  expected = (2, 1) if changed == 'near' else (1, 2)
  assert expected == load_file(tmp_path / 'mine.py').VALUE
  assert contents(files_record(tmp_path / 'mine.py')) != contents(vars(first)[RECORD][1])


def test_a_record_has_the_hash_of_every_file_and_no_place_in_what_is_equal(tmp_path):
  for name in ('here', 'there'):
    write(
      tmp_path / name,
      mine='import near\n' + PART.format(1),
      near='from pack import inner',
      pack__inner='',
      unused='',
    )
  here, there = (object_in_file(f'{tmp_path}/{n}/mine.py:Part') for n in ('here', 'there'))
  record = code_of(type(here))
  assert record['file'] == str(tmp_path / 'here/mine.py')
  assert list(record['files']) == ['near.py', 'pack/inner.py']
  assert config.digest(here) == config.digest(there)
  before = config.digest(here)
  write(tmp_path / 'here', pack__inner='# other')
  assert config.digest(object_in_file(f'{tmp_path}/here/mine.py:Part')) != before
  # without imports beside it a record is that of the file alone
  write(tmp_path / 'alone', mine=PART.format(1))
  alone = code_of(type(object_in_file(f'{tmp_path}/alone/mine.py:Part')))
  assert 'files' not in alone
  assert contents(alone) == alone['sha256']


def stored(tmp_path):
  """JSON data of a type that a package beside the user's file defines."""
  write(
    tmp_path,
    mine='from pack.parts import Part\nPART = Part(size=3)',
    pack__init='',
    pack__parts='from . import near\nimport helper\n' + PART.format(1),
    pack__near='',
    helper='',
  )
  return config.to_json(load_file(tmp_path / 'mine.py').PART)


@pytest.fixture
def forget_modules(monkeypatch):
  """Forgets all files of users, as a new process; at the end of the test they are there again."""

  def forget():
    for name in [n for n in sys.modules if n.startswith('user_')]:
      monkeypatch.delitem(sys.modules, name)

  return forget


def test_a_type_of_a_package_beside_is_loaded_again_from_its_record(tmp_path, forget_modules):
  data = stored(tmp_path)
  assert sorted(data['code']['files']) == ['helper.py', 'pack/__init__.py', 'pack/near.py']
  assert data['code']['module'] == 'pack.parts'
  forget_modules()
  assert load_recorded(json.loads(json.dumps(data))) == []
  assert config.from_json(data).size == 3


@pytest.mark.parametrize('changed', ['pack__near', 'helper', 'pack__init', 'pack__parts'])
def test_code_of_which_any_file_changed_runs_only_if_it_is_named(changed, tmp_path, forget_modules):
  data = stored(tmp_path)
  forget_modules()
  file = tmp_path / path_of(changed)
  old = file.read_text()
  file.write_text(old + '\n# edited\n')
  with pytest.raises(InputError) as refused:
    load_recorded(data)
  assert f'{file}: sha256 ' in str(refused.value)
  assert '\n' not in str(refused.value)
  (remark,) = load_recorded(data, [tmp_path / 'mine.py'])  # which imports it
  assert str(file) in remark
  assert config.from_json(data).size == 3


def test_a_missing_neighbour_is_one_line(tmp_path, forget_modules):
  data = stored(tmp_path)
  forget_modules()
  (tmp_path / 'helper.py').unlink()
  with pytest.raises(InputError, match=r'helper\.py.* -> none'):
    load_recorded(data)


def test_odd_records_are_one_line():
  for code in ({'module': 1}, {'module': 'm', 'files': 1}, {'module': 'm', 'files': {'a': 1}}, {}):
    with pytest.raises(InputError, match='a record'):
      load_recorded({'type': 'X', 'code': code})
    with pytest.raises(InputError, match='a record'):
      config.from_json({'type': 'X', 'code': code}, '', Config)
  far = {'module': '.'.join('a' * 50), 'file': '/gone.py', 'sha256': 'x'}
  with pytest.raises(InputError, match='is needed and not here'):
    load_recorded({'type': 'X', 'code': far})
  assert code_records([{'type': 'X', 'code': far}] * 2) == [far]
