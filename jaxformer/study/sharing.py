"""One study by several processes: each trains what no other is training. Small models leave most of
a machine's cores idle."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import jax

from jaxformer.training.interrupt import Interrupt

MOST = 4  # processes by default: each compiles and holds its own programs
PAUSE = 0.5  # seconds between looks at what other processes do
R = TypeVar('R')


class Interrupted(Exception):
  """A run was interrupted and saved; the same study goes on from there."""


def shared(folder: Path, jobs: Mapping[str, Callable[[], R]], interrupt: Interrupt) -> dict[str, R]:
  """What each job gives, in their order. Of several processes with one folder each does what no
  other is at; a job that another has done is done again, so a job must find what is there. Raises
  `Interrupted` after a signal."""
  found: dict[str, R] = {}
  while waiting := [name for name in jobs if name not in found]:
    for name in waiting:
      with _held(folder / name) as mine:
        if mine:
          found[name] = jobs[name]()
    if all(name not in found for name in waiting):
      if interrupt.signal is not None:
        raise Interrupted
      time.sleep(PAUSE)
  return {name: found[name] for name in jobs}


@contextlib.contextmanager
def _held(file: Path) -> Generator[bool]:
  """Whether this process alone has a file until the end of the block. A process that dies lets
  go."""
  file.parent.mkdir(parents=True, exist_ok=True)
  with file.open('w') as f:
    try:
      fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      mine = False
    else:
      mine = True
    yield mine


def worthwhile(entries: int) -> int:
  """How many processes a study of so many entries keeps busy: one for each core of a CPU, at most
  `MOST`; one where there is an accelerator, which has room for one program."""
  return min(len(os.sched_getaffinity(0)), entries, MOST) if jax.default_backend() == 'cpu' else 1


@contextlib.contextmanager
def running(commands: Sequence[Sequence[str]], folder: Path) -> Generator[None]:
  """Within, the commands run; what they print goes to `folder`/helper-N.log. At a good end they are
  waited for, else they are told to save and stop. One that fails has no consequences: what it did
  not train, the others do."""
  folder.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    processes = []
    for i, command in enumerate(commands, 1):
      log = stack.enter_context((folder / f'helper-{i}.log').open('w'))
      processes.append(
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
      )
    try:
      yield
    except BaseException:
      for p in processes:
        p.terminate()
      raise
    finally:
      for p in processes:
        p.wait()
