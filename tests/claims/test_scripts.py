"""Experiments that take long to run still fit the package: each can be imported, and its entries of
studies are made as any."""

import importlib.util
import inspect
import pathlib
import re
import sys

import pytest

from jaxformer.study.study import Entry
from tests.helpers import temporary_types

EXPERIMENTS = pathlib.Path(__file__).parents[2] / 'experiments'
SCRIPTS = sorted(
  str(p.relative_to(EXPERIMENTS))
  for p in (*EXPERIMENTS.glob('*.py'), *EXPERIMENTS.glob('claims/*.py'))
)


@pytest.mark.quick
@pytest.mark.parametrize('script', SCRIPTS)
def test_it_can_be_imported(script, monkeypatch):
  path = EXPERIMENTS / script
  if 'import torch' in path.read_text():
    pytest.importorskip('torch', reason='compares with torch')
  monkeypatch.syspath_prepend(str(path.parent))
  spec = importlib.util.spec_from_file_location(f'experiment_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  monkeypatch.setitem(sys.modules, spec.name, module)
  with temporary_types():
    spec.loader.exec_module(module)
  for kind in vars(module).values():
    if inspect.isclass(kind) and issubclass(kind, Entry) and kind.__module__ == spec.name:
      assert list(inspect.signature(kind.model).parameters) == list(
        inspect.signature(Entry.model).parameters
      ), kind


@pytest.mark.quick
@pytest.mark.parametrize(
  'result',
  sorted((EXPERIMENTS / 'claims').glob('results/*/result.json')),
  ids=lambda p: p.parent.name,
)
def test_results_name_files_by_their_path_in_the_repository(result):
  named = re.findall(r'"file": "([^"]*)"', result.read_text())
  assert all((EXPERIMENTS.parent / name).is_file() and not name.startswith('/') for name in named)
