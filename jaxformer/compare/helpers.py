"""Processes that train a study beside the one that reports it: small models leave most of a machine's cores idle."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Generator, Sequence
from pathlib import Path

import jax

MOST = 4   # processes by default: each compiles and holds its own programs


def worthwhile(entries: int) -> int:
  """How many processes a study of so many entries keeps busy: one for each core of a CPU, at most `MOST`; one where there is an
  accelerator, which has room for one program."""
  return min(len(os.sched_getaffinity(0)), entries, MOST) if jax.default_backend() == 'cpu' else 1


@contextlib.contextmanager
def running(commands: Sequence[Sequence[str]], folder: Path) -> Generator[None]:
  """Within, the commands run; what they print goes to `folder`/helper-N.log. At a good end they are waited for, else they are told
  to save and stop. One that fails has no consequences: what it did not train, the others do."""
  folder.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    processes = []
    for i, command in enumerate(commands, 1):
      log = stack.enter_context((folder / f'helper-{i}.log').open('w'))
      processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT))
    try:
      yield
    except BaseException:
      for p in processes:
        p.terminate()
      raise
    finally:
      for p in processes:
        p.wait()
