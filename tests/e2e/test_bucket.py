"""Runs in a bucket, against a server that speaks as Google Cloud Storage does."""

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from urllib.parse import quote

import pytest

from tests.e2e.program import SMALL, environment, last, start
from tests.tiers import thorough

emulator = pytest.importorskip(
  'gcp_storage_emulator.server', reason='needs gcp-storage-emulator, which stands in for the store'
)
pytest.importorskip('gcsfs', reason='needs the extra `storage`')

pytestmark = pytest.mark.e2e
RUN = [
  'train',
  'gpt2-tiny',
  *SMALL,
  '--training.checkpoint-every',
  '1',
  '--training.eval-every',
  '100000',
  '--run.dir',
  'gs://bucket/runs',
  '--run.name',
  'one',
]


@pytest.fixture
def store(monkeypatch):
  """A function that asks the server, which has one bucket, about objects; programs started here
  find it."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    host = f'http://127.0.0.1:{s.getsockname()[1]}'
  for name, value in {
    'STORAGE_EMULATOR_HOST': host,
    'TENSORSTORE_GCS_HTTP_URL': host,
    'NO_GCE_CHECK': 'true',
    # the last asks a service that the emulator lacks
    'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
  }.items():
    monkeypatch.setenv(name, value)
  server = emulator.create_server(
    '127.0.0.1', int(host.rpartition(':')[2]), in_memory=True, default_bucket='bucket'
  )
  server.start()

  def ask(query='', method='GET'):
    request = urllib.request.Request(f'{host}/storage/v1/b/bucket/o{query}', method=method)
    return urllib.request.urlopen(request, timeout=10).read().decode()

  yield ask
  server.stop()


def objects(store):
  return [item['name'] for item in json.loads(store())['items']]


@thorough
def test_interrupted_damaged_resumed_and_scored_in_a_bucket(store, tmp_path, cache):
  words = last([*RUN, '--training.steps', '100000'])
  command = [sys.executable, '-m', 'jaxformer', *words]
  program = subprocess.Popen(
    command, cwd=tmp_path, env=environment(cache), stderr=subprocess.PIPE, text=True
  )
  try:
    heard = []
    for line in program.stderr:
      heard.append(line)
      if line.startswith('step 3/'):
        program.send_signal(signal.SIGTERM)
    assert program.wait(timeout=120) == 75, heard
  finally:
    program.kill()
  names = objects(store)
  steps = sorted({int(n.split('/')[3]) for n in names if n.startswith('runs/one/checkpoints/')})
  assert f'saved at step {steps[-1]}' in heard[-1]
  assert len(steps) == 2
  assert {n for n in names if 'checkpoints' not in n} == {
    f'runs/one/{n}'
    for n in (
      'config.json',
      'environment.json',
      'metrics.jsonl',
      'events.jsonl',
      'tokenizer/tokenizer_kind.json',
    )
  }

  store('/' + quote(f'runs/one/checkpoints/{steps[-1]}/meta/data.json', safe=''), method='DELETE')
  end = steps[-1] + 1
  done = start([*RUN, '--training.steps', end, '--json'], tmp_path, cache)
  assert done.returncode == 0, done.stderr
  assert f'resuming gs://bucket/runs/one at step {steps[0]}' in done.stderr
  assert json.loads(done.stdout)['run'] == 'gs://bucket/runs/one'
  names = objects(store)
  assert f'runs/one/corrupt/{steps[-1]}/commit_success.txt' in names
  rows = [
    json.loads(line)
    for line in store('/' + quote('runs/one/metrics.jsonl', safe='') + '?alt=media').splitlines()
  ]
  assert [r['step'] for r in rows if 'train/loss' in r] == list(range(1, end + 1))

  scored = start(
    ['eval', f'gs://bucket/runs/one@{end}', '--batches', '1', '--json'], tmp_path, cache
  )
  assert scored.returncode == 0, scored.stderr
  assert json.loads(scored.stdout)['step'] == end
  assert not list(tmp_path.iterdir())


def test_what_is_not_there_is_said_in_one_line(store, tmp_path, cache):
  for words, message in (
    (
      [*RUN, '--run.dir', 'gs://nowhere/runs'],
      'gs://nowhere/runs/one: there is no bucket gs://nowhere',
    ),
    (['eval', 'gs://bucket/none'], 'gs://bucket/none: not a run folder: there is no config.json'),
  ):
    done = start(words, tmp_path, cache)
    assert done.returncode == 2
    assert done.stdout == ''
    assert done.stderr.splitlines()[-1] == f'error: {message}'
