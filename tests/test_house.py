"""Rules of the house that can be read off the source: who may import whom, how code is written."""

import ast
import collections
import functools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / 'jaxformer'
FILES = sorted(PACKAGE.rglob('*.py'))

pytestmark = pytest.mark.quick

# Packages, or modules at the top, in layers: each may import those above it and its own.
BASE = {
  'local_files',
  'code_record',
  'config',
  'overrides',
  'user_code',
  'user_modules',
  'task_type',
  'exit_codes',
  'files',
  'json_data',
  'installation',
}
MODELS = BASE | {'hardware', 'memory', 'sharding', 'ops', 'layers', 'models'}
MAY_IMPORT = {
  'local_files': set(),
  'code_record': {'local_files'},
  'config': {'code_record', 'json_data', 'local_files'},
  'task_type': set(),
  'exit_codes': set(),
  'files': {'config', 'exit_codes'},
  'json_data': set(),
  'installation': set(),
  'memory': {'config'},
  'hardware': {'config', 'files', 'json_data'},
  'overrides': {'config', 'json_data', 'user_code'},
  'user_modules': {'code_record', 'local_files'},
  'user_code': {'code_record', 'config', 'files', 'local_files', 'user_modules'},
  'data': BASE,
  'sharding_rules': BASE,
  'sharding': BASE | {'sharding_rules'},
  'ops': BASE | {'hardware', 'sharding'},
  'layers': BASE | {'sharding', 'ops'},
  'models': BASE | {'memory', 'sharding', 'ops', 'layers'},
  'inference': MODELS,
  'planning': MODELS,
  'interop': MODELS,
  'testing': MODELS,
  'evaluation': MODELS | {'data', 'inference'},
  'training': MODELS | {'data', 'evaluation'},
}
BELOW_API = {*MAY_IMPORT, 'sharding'}
MAY_IMPORT['study'] = BELOW_API
MAY_IMPORT['launch'] = BELOW_API
MAY_IMPORT['workflows'] = BELOW_API | {'study', 'launch'}
MAY_IMPORT['api'] = MAY_IMPORT['workflows'] | {'workflows'}
MAY_IMPORT['__init__'] = MAY_IMPORT['api'] | {'api'}
MAY_IMPORT['cli'] = {
  'config',
  'exit_codes',
  'files',
  'installation',
  'json_data',
  'training',
  '__init__',
}
MAY_IMPORT['__main__'] = {'cli'}
LAZY = {'jaxformer/cli/main.py', 'jaxformer/__init__.py'}


@functools.cache
def trees() -> dict[pathlib.Path, ast.Module]:
  return {path: ast.parse(path.read_text()) for path in FILES}


def name_of(path: pathlib.Path) -> str:
  return str(path.relative_to(ROOT))


def package_of(path: pathlib.Path) -> str:
  return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def module_of(path: pathlib.Path) -> str:
  return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


def imports(tree: ast.AST, *, at_top_level: bool = False) -> list[tuple[ast.stmt, str]]:
  """Statement and dotted name of every import of the package; without TYPE_CHECKING blocks if only
  those that run when the module is imported are asked for."""
  found = []
  for node in tree.body if at_top_level else ast.walk(tree):
    if isinstance(node, ast.Import):
      found += [(node, a.name) for a in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, 'imports are absolute'
      found += [(node, f'{node.module}.{a.name}') for a in node.names]
  return [(n, name) for n, name in found if name.split('.')[0] in ('jaxformer', 'experiments')]


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_a_package_imports_only_what_stands_below_it(path):
  home = package_of(path)
  for _, name in imports(trees()[path]):
    assert not name.startswith('experiments'), name
    package = name.split('.')[1] if '.' in name else '__init__'  # `import jaxformer as jf`
    assert package in MAY_IMPORT[home] | {home}, name


def test_data_and_configs_need_no_jax():
  for path in FILES:
    if package_of(path) in BASE | {'data'}:
      names = {
        n.split('.')[0]
        for node in ast.walk(trees()[path])
        for n in (
          [a.name for a in node.names]
          if isinstance(node, ast.Import)
          else [node.module or '']
          if isinstance(node, ast.ImportFrom)
          else []
        )
      }
      assert not names & {'jax', 'flax'}, name_of(path)


def test_imports_stand_at_the_top_of_a_file():
  local = [
    f'{name_of(path)}:{node.lineno}'
    for path in FILES
    if name_of(path) not in LAZY
    for function in ast.walk(trees()[path])
    if isinstance(function, ast.FunctionDef)
    for node, _ in imports(function)
  ]
  assert not local


def test_no_modules_import_each_other():
  known = {module_of(p) for p in FILES}
  graph = collections.defaultdict(set)
  for path in FILES:
    for _, name in imports(trees()[path], at_top_level=True):
      target = name if name in known else name.rpartition('.')[0]
      graph[module_of(path)].add(target)
  state: dict[str, int] = {}

  def visit(module: str, path: tuple[str, ...]) -> None:
    assert state.get(module) != 1, ' -> '.join((*path, module))
    if module not in state:
      state[module] = 1
      for other in sorted(graph[module] - {module}):
        visit(other, (*path, module))
      state[module] = 2

  for module in sorted(known):
    visit(module, ())


def test_no_class_name_stands_for_two_things():
  names = collections.Counter(
    node.name
    for tree in trees().values()
    for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef) and node.name != 'Config'
  )
  assert not {n: c for n, c in names.items() if c > 1}


def config_classes() -> dict[str, str]:
  """Every name by which a config class is known -> the file that defines it."""
  classes = [
    (name_of(path), node, f'{getattr(parent, "name", "")}.{node.name}'.removeprefix('.'))
    for path, tree in trees().items()
    for parent in ast.walk(tree)
    for node in ast.iter_child_nodes(parent)
    if isinstance(node, ast.ClassDef)
  ]
  bases = {'Config'}
  found: dict[str, str] = {}
  while True:
    before = len(found)
    for path, node, name in classes:
      if bases & {getattr(b, 'attr', getattr(b, 'id', '')) for b in node.bases}:
        found[name] = path
        if node.name != 'Config':
          bases.add(node.name)
    if len(found) == before:
      return found


def test_no_type_of_config_is_asked_for_outside_its_file():
  """Ask the config by a method of its base class instead."""
  wrong, configs = [], config_classes()
  for path, tree in trees().items():
    for node in ast.walk(tree):
      if not (
        isinstance(node, ast.Call) and getattr(node.func, 'id', '') in ('isinstance', 'issubclass')
      ):
        continue
      for part in ast.walk(node.args[1]):
        text = ast.unparse(part) if isinstance(part, ast.Name | ast.Attribute) else ''
        name = '.'.join(text.split('.')[-2:])
        if configs.get(name, configs.get(text, name_of(path))) != name_of(path):
          wrong.append(f'{name_of(path)}:{node.lineno} {text}')
  assert not wrong


# Who may ask for the type of a value that a user defined or passed (`user_code.is_a`).
MAY_ASK = {'jaxformer/user_code.py', 'jaxformer/workflows/names.py', 'jaxformer/workflows/sizes.py'}


def test_only_values_of_users_are_asked_for_their_type():
  """`is_a` is `isinstance` for what a user passes; elsewhere configs are asked by their methods."""
  asking = {
    name_of(path)
    for path, tree in trees().items()
    for node in ast.walk(tree)
    if isinstance(node, ast.ImportFrom | ast.Import | ast.Attribute)
    and 'is_a' in {getattr(node, 'attr', ''), *(a.name for a in getattr(node, 'names', ()))}
  }
  assert not asking - MAY_ASK


def test_nobody_probes_for_attributes_of_configs():
  """`getattr(config, 'name', default)` asks what something is by what it lacks."""
  names = {'config', 'model', 'data', 'experiment', 'layer', 'dataset', 'task', 'entry', 'study'}
  wrong = [
    f'{name_of(path)}:{node.lineno} {ast.unparse(node)}'
    for path, tree in trees().items()
    for node in ast.walk(tree)
    if isinstance(node, ast.Call)
    and getattr(node.func, 'id', '') in ('getattr', 'hasattr')
    and len(node.args) > 1
    and isinstance(node.args[1], ast.Constant)
    and ast.unparse(node.args[0]).split('.')[-1].strip('_') in names
  ]
  assert not wrong


def test_files_stay_readable():
  lines = {name_of(p): p.read_text().splitlines() for p in FILES}
  assert not {name: len(found) for name, found in lines.items() if len(found) > 570}
  assert not [
    f'{name}:{i}' for name, found in lines.items() for i, x in enumerate(found, 1) if len(x) > 100
  ]


def test_functions_stay_readable():
  long = [
    f'{name_of(path)}:{node.lineno} {node.name}'
    for path, tree in trees().items()
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno > 100
  ]
  assert not long


def test_importing_the_package_imports_no_array_library():
  code = 'import sys, jaxformer; sys.exit(bool({"jax", "flax", "numpy"} & set(sys.modules)))'
  assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0
