"""Every test has a cache of its own."""

import json
from pathlib import Path

import pytest
from hypothesis import settings

# Failing examples belong into the report, not into a database beside the tests.
settings.register_profile('jaxformer', database=None)
settings.load_profile('jaxformer')


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  """The cache folder, empty."""
  folder = tmp_path / 'cache'
  monkeypatch.setenv('JAXFORMER_CACHE', str(folder))
  return folder


@pytest.fixture
def corpus(tmp_path: Path):
  """Writes documents as a JSON lines file and gives its path."""

  def write(texts, name='corpus.jsonl') -> str:
    path = tmp_path / name
    path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
    return str(path)

  return write
