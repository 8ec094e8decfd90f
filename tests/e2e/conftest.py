"""One tiny run, trained once by the command line, that the tests here share and leave as it is."""

import json

import pytest

from tests.e2e.program import SMALL, start

FIRST = ['train', 'gpt2-tiny', *SMALL, '--run.name', 'first']


@pytest.fixture(scope='session')
def cache(tmp_path_factory):
  # where JAXFORMER_CACHE points in every test
  return tmp_path_factory.getbasetemp() / 'jaxformer-cache'


@pytest.fixture(scope='session')
def first(tmp_path_factory, cache):
  """The folder above `runs/first`, and what training said."""
  home = tmp_path_factory.mktemp('home')
  done = start([*FIRST, '--json'], home, cache)
  assert done.returncode == 0, done.stderr
  return home, json.loads(done.stdout), done


@pytest.fixture
def home(first, monkeypatch):
  """As the working folder."""
  monkeypatch.chdir(first[0])
  return first[0]


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch):
  """Training in this process, over 8 devices that share the cores, writes a few tokens only."""
  monkeypatch.setattr('jaxformer.workflows.samples.TOKENS', 4)
