"""One process trains in a folder at a time, wherever the folder is and whatever became of those
before it."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from jaxformer.config import InputError
from jaxformer.training import lock
from jaxformer.training.lock import FILE, FolderLock, LostLock

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def fast(monkeypatch):
  monkeypatch.setattr(lock, 'PATIENCE', 0.3)
  monkeypatch.setattr(lock, 'SETTLING', 0.01)


@pytest.fixture
def without_flock(monkeypatch):
  """A shared disk that has no advisory locks."""

  def unsupported(file, how):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'flock', unsupported)


def record(folder, **facts):
  """The lock of a process on another machine, which renewed it just now."""
  known = {'id': 'x', 'host': 'node7', 'pid': 12, 'machine': 'another', 'process': '12 started 5'}
  (folder / FILE).write_text(json.dumps(known | {'renewed': time.time()} | facts))


def take(folder):
  said = []
  held = FolderLock(folder, said.append)
  held.acquire()
  return held, said


def test_the_second_is_refused_and_the_folder_is_free_again_after_the_first(tmp_path):
  held, _ = take(tmp_path)
  with pytest.raises(
    InputError, match=r'another process trains .* \(process \d+ on .*, since .*\)'
  ):
    take(tmp_path)
  held.check()
  held.release()
  assert not (tmp_path / FILE).exists()
  take(tmp_path)[0].release()


def test_a_process_of_this_machine_is_looked_up(tmp_path, without_flock):
  """Without advisory locks: alive it keeps the folder, dead it does not, nor does another process
  that got its number."""
  child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)
  own = {'machine': lock._machine(), 'pid': child.pid, 'process': lock._process(child.pid)}
  try:
    record(tmp_path, **own)
    with pytest.raises(InputError, match=f'process {child.pid} on node7'):
      take(tmp_path)
    record(tmp_path, **own | {'process': f'{child.pid} started 1'})
    take(tmp_path)[0].release()
    record(tmp_path, **own)
    child.kill()
    began = time.monotonic()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not waited for
    take(tmp_path)[0].release()
    assert time.monotonic() - began < lock.PATIENCE
  finally:
    child.kill()
    child.wait()


def test_a_silent_owner_on_another_machine_is_dead(tmp_path):
  record(tmp_path)
  held, said = take(tmp_path)
  assert 'node7' in said[0]
  assert json.loads((tmp_path / FILE).read_text())['host'] != 'node7'
  held.release()


def test_an_owner_on_another_machine_that_renews_its_lock_keeps_the_folder(tmp_path):
  record(tmp_path)
  timer = threading.Timer(0.1, record, (tmp_path,), {'renewed': 1e12})  # its clock is wrong
  timer.start()
  with pytest.raises(InputError, match='process 12 on node7'):
    take(tmp_path)
  timer.join()
  assert json.loads((tmp_path / FILE).read_text())['id'] == 'x'


def test_an_old_lock_is_not_watched(tmp_path):
  record(tmp_path, renewed=time.time() - 2 * lock.FORGOTTEN)
  held, said = take(tmp_path)
  assert said == []
  held.release()


@pytest.mark.parametrize('content', [b'', b'{"id": 3', b'[]', b'\x00' * 20, b'[' * 100_000])
def test_what_is_left_of_a_lock_after_a_crash_holds_nothing(tmp_path, content):
  (tmp_path / FILE).write_bytes(content)
  take(tmp_path)[0].release()


def test_an_owner_notices_that_another_has_taken_its_folder(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, 'RENEWAL', 0.02)
  held, _ = take(tmp_path)
  time.sleep(0.1)
  held.check()
  deadline = time.monotonic() + 5
  while not held.lost and time.monotonic() < deadline:
    record(tmp_path)  # again, since a renewal that has begun may replace it
    time.sleep(0.01)
  assert held.lost
  with pytest.raises(LostLock, match='process 12 on node7'):
    held.check()
  held.release()
  assert json.loads((tmp_path / FILE).read_text())['id'] == 'x'  # not its own to remove
