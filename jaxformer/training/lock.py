"""The lock of a run folder: one process, or one group of processes, trains in it at a time.

The owner writes `lock.json` into the folder and renews it every `RENEWAL` seconds. On a local disk
it also holds an advisory lock of the operating system, which excludes two processes that start at
the same moment; shared disks may not support one, and stores have none.

An owner that has died does not keep the folder. On its own machine its process is looked up. The
lock of another machine is watched: if it is not renewed for `PATIENCE` seconds, its owner is dead,
whatever the clocks say. An owner that was suspended, and whose folder another one has taken, finds
that out before it writes a checkpoint."""

import contextlib
import functools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxformer.config import InputError
from jaxformer.exit_codes import Failure
from jaxformer.files import is_of_storage, locked, write_atomically, write_error
from jaxformer.training.paths import AnyPath, remote_errors

FILE = 'lock.json'
RENEWAL = 15.0
PATIENCE = 60.0  # several renewals, some of which may fail
FORGOTTEN = 3600.0  # age of a lock that is not watched: clocks differ by less
SETTLING = 1.0  # seconds after which a store shows who wrote last

Record = dict[str, Any]


class LostLock(Failure):
  """Another process has taken the run folder."""


class FolderLock:
  """The lock of one folder, held between `acquire` and `release`.

  Args:
    folder: the run folder, which exists; or in a store, where folders need not.
    log: receives a line when the lock of another machine has to be watched.

  Attributes:
    lost: whether a renewal found the lock of another process; `check` raises the error.
  """

  def __init__(self, folder: AnyPath, log: Callable[[str], None]):
    self._folder, self._log = folder, log
    self._record: Record = {}
    self._held = contextlib.ExitStack()
    self._released = threading.Event()
    self.lost = False

  def acquire(self) -> None:
    """Take the folder. Raises `InputError` if another process trains in it, or the lock cannot be
    written."""
    with contextlib.ExitStack() as held:
      self._exclude_this_machine(held)
      found = self._read()
      if found and self._lives(found):
        raise self._taken(found)
      self._take(settle=bool(found) or not isinstance(self._folder, Path))
      held.callback(self._give_back)
      self._held = held.pop_all()
    threading.Thread(target=self._renew, name='run lock', daemon=True).start()

  def _take(self, settle: bool) -> None:
    now = time.time()
    self._record = {
      'id': uuid.uuid4().hex,
      'host': socket.gethostname(),
      'pid': os.getpid(),
      'machine': _machine(),
      'process': _process(os.getpid()),
      'since': time.strftime('%Y-%m-%d %H:%M:%S%z', time.localtime(now)),
      'renewed': now,
    }
    try:
      self._write()
    except OSError as e:
      if is_of_storage(e):
        raise write_error(self._folder, e) from None
      problem = f'the folder {self._folder} cannot be written ({e.strerror})'
      raise InputError('run.dir', str(self._folder.parent), problem=problem) from None
    if settle:  # another may have done the same
      time.sleep(SETTLING)
      if (winner := self._read()) != self._record:
        raise self._taken(winner)

  def check(self) -> None:
    """Raises `LostLock` if another process has taken the folder, and `Failure` if that cannot be
    known."""
    try:
      found = self._read()
    except OSError as e:
      raise Failure(f'{self._folder / FILE}: cannot be read ({e.strerror})') from None
    except InputError as e:
      raise Failure(str(e)) from None
    if found.get('id') != self._record['id']:
      what = f'another process{_owner(found)} has taken over' if found else 'its lock was removed'
      raise LostLock(f'{self._folder}: {what}; stopped without writing to it any more')

  def release(self) -> None:
    """Give the folder back."""
    self._held.close()

  def _exclude_this_machine(self, held: contextlib.ExitStack) -> None:
    if not isinstance(self._folder, Path):
      return
    try:
      alone = held.enter_context(locked(self._folder / 'events.jsonl'))
    except OSError:  # a shared disk without such locks
      alone = True
    if not alone:
      raise self._taken(self._read())

  def _taken(self, found: Record) -> InputError:
    return InputError(
      f'{self._folder}: another process trains in this folder{_owner(found)}; wait until it ends, '
      'or give another --run.name'
    )

  def _lives(self, found: Record) -> bool:
    """Return whether the owner of a lock lives. May take `PATIENCE` seconds."""
    if found.get('machine') == _machine():
      pid = found.get('pid')
      return isinstance(pid, int) and _process(pid) == found.get('process') is not None
    renewed = found.get('renewed')
    if isinstance(renewed, int | float) and time.time() - renewed > FORGOTTEN:
      return False
    self._log(
      f'{self._folder}: locked{_owner(found)}; waiting up to {PATIENCE:.0f} s for a sign of life'
    )
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
      time.sleep(min(1.0, PATIENCE / 20))
      if (now := self._read()) != found:
        return bool(now)
    return False

  def _read(self) -> Record:
    """Return the content of the lock, {} if there is none. Content that is no lock, as a crash of
    the file system may leave, is a lock without an owner."""
    try:
      with remote_errors(self._folder):
        text = (self._folder / FILE).read_bytes()
    except FileNotFoundError:
      return {}
    try:
      found = json.loads(text)
    except (ValueError, RecursionError):
      found = None
    return found if isinstance(found, dict) and found else {'id': repr(text)}

  def _write(self) -> None:
    text = json.dumps(self._record, indent=2) + '\n'
    with remote_errors(self._folder):
      if isinstance(self._folder, Path):
        write_atomically(self._folder / FILE, text)
      else:
        (self._folder / FILE).write_text(text)

  def _renew(self) -> None:
    while not self._released.wait(RENEWAL):
      # A renewal that fails is made up for by the next; `check` finds out if that was too late.
      with contextlib.suppress(OSError, InputError):
        if self._read().get('id') != self._record['id']:
          self.lost = True
          return
        self._record['renewed'] = time.time()
        self._write()

  def _give_back(self) -> None:
    self._released.set()
    with contextlib.suppress(OSError, InputError):
      if self._read().get('id') == self._record['id']:
        (self._folder / FILE).unlink()


def _owner(found: Record) -> str:
  if 'host' not in found:
    return ''
  return f' (process {found.get("pid")} on {found["host"]}, since {found.get("since")})'


@functools.cache
def _machine() -> str:
  """Return what identifies this machine, or container, since it was started."""
  try:
    boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return f'{boot} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return socket.gethostname()


def _process(pid: int) -> str | None:
  """Return what identifies a process of this machine, whose number may be used again; None if there
  is no such process, or it is dead and not yet waited for."""
  try:
    fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    return None if fields[0] in 'ZX' else f'{pid} started {fields[19]}'
  except OSError:
    pass
  if Path('/proc/self/stat').exists():
    return None
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return None
  except PermissionError:
    pass
  return str(pid)
