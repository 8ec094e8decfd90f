"""The direction of imports: who may know whom (see CONTRIBUTING.md)."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / 'jaxformer'

# Each room may import the rooms named here, and itself. Rooms are folders, or files of the
# package's top.
MAY_IMPORT = {
  'config': set(),
  'task_type': set(),
  'overrides': {'config'},
  'user_code': {'config'},
  'exit_codes': set(),
  'sharding': {'config'},
  'ops': {'config', 'task_type', 'sharding'},
  'layers': {'config', 'sharding', 'ops'},
  'models': {'config', 'task_type', 'sharding', 'ops', 'layers'},
  'data': {'config', 'task_type'},
  'inference': {
    'config',
    'overrides',
    'user_code',
    'task_type',
    'sharding',
    'ops',
    'layers',
    'models',
  },
  'evaluation': {
    'config',
    'overrides',
    'user_code',
    'task_type',
    'sharding',
    'ops',
    'layers',
    'models',
    'data',
    'inference',
  },
  'planning': {
    'config',
    'overrides',
    'user_code',
    'task_type',
    'sharding',
    'ops',
    'layers',
    'models',
  },
  'interop': {
    'config',
    'overrides',
    'user_code',
    'task_type',
    'sharding',
    'ops',
    'layers',
    'models',
  },
  'training': {
    'config',
    'exit_codes',
    'overrides',
    'user_code',
    'task_type',
    'sharding',
    'ops',
    'layers',
    'models',
    'data',
    'evaluation',
  },
}
TOP = {'study', 'launch', 'testing'}  # may import everything but the command line
FACE = {'cli', '__init__', '__main__'}


def room(path: pathlib.Path) -> str:
  return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imported(path: pathlib.Path) -> set[str]:
  rooms = set()
  for node in ast.walk(ast.parse(path.read_text())):
    names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
    if isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      names = (
        [f'{node.module}.{a.name}' for a in node.names]
        if node.module == 'jaxformer'
        else [node.module]
      )
    for name in names:
      parts = name.split('.')
      if parts[0] == 'jaxformer' and len(parts) > 1:
        rooms.add(parts[1])
      assert parts[0] != 'experiments', f'{path} imports an experiment'
  return rooms


FILES = sorted(PACKAGE.rglob('*.py'))


@pytest.mark.quick
@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_direction(path):
  home = room(path)
  if home in FACE:
    return
  allowed = set(MAY_IMPORT) | TOP if home in TOP else MAY_IMPORT[home]
  assert imported(path) <= allowed | {home}


@pytest.mark.quick
@pytest.mark.parametrize(
  'path',
  [p for p in FILES if room(p) in ('config', 'data')],
  ids=lambda p: str(p.relative_to(ROOT)),
)
def test_config_and_data_need_no_jax(path):
  assert not any(
    line.startswith(('import jax', 'from jax ', 'from jax.', 'from flax'))
    for line in path.read_text().splitlines()
  )


@pytest.mark.quick
def test_files_stay_readable():
  long = {
    str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > 620
  }
  assert not long
