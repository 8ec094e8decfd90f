"""One study trained by several processes, each on entries that no other is training. Small models
leave most cores of a machine idle."""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import jax

from jaxformer.files import locked
from jaxformer.study.study import file_name
from jaxformer.training.interrupt import Interrupt

MAX_PROCESSES = 4  # by default: each compiles and holds its own programs
POLL_SECONDS = 0.5  # between checks of what other processes have finished
R = TypeVar('R')


class Interrupted(Exception):
  """A run is not finished: it was interrupted and saved. The same study resumes there."""


def shared(
  folder: Path, jobs: Mapping[tuple[str, str], Callable[[], R]], interrupt: Interrupt
) -> dict[tuple[str, str], R]:
  """Return the result of each job, in their order. Of several processes with the same folder each
  takes an unlocked job. A job that another process has finished is called again, so it must find
  the earlier result. Raises `Interrupted` after a signal."""
  found: dict[tuple[str, str], R] = {}
  while waiting := [name for name in jobs if name not in found]:
    for name in waiting:
      with locked(folder / file_name('-'.join(name))) as held:
        if held:
          found[name] = jobs[name]()
    if all(name not in found for name in waiting):
      if interrupt.signal is not None:
        raise Interrupted
      time.sleep(POLL_SECONDS)
  return {name: found[name] for name in jobs}


def worthwhile(entries: int) -> int:
  """Return how many processes to run for this many entries: one per core of a CPU, at most
  `MAX_PROCESSES`; one on an accelerator, whose memory fits one program."""
  cores = len(os.sched_getaffinity(0))
  return min(cores, entries, MAX_PROCESSES) if jax.default_backend() == 'cpu' else 1


@contextlib.contextmanager
def running(commands: Sequence[Sequence[str]], folder: Path) -> Generator[None]:
  """Run commands during the block, with their output in `folder`/helper-N.log. Wait for them at the
  end; after an exception, tell them to save and stop first. Failures are ignored: the other
  processes train what a failed one did not."""
  folder.mkdir(parents=True, exist_ok=True)
  processes = []
  for i, command in enumerate(commands, 1):
    with (folder / f'helper-{i}.log').open('w') as log:
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
