"""Tries odd command lines and configs (`odd_input`), each in a process of its own over a folder of
files.

`python -m tests.e2e.fuzz TEMPLATE WORK SEED FIRST COUNT` tries cases FIRST to FIRST + COUNT of a
seed and prints each that breaks a rule (`problem`) as a line of JSON, then how many ended in which
exit code. Processes are forks of one that has imported the package and started no device, so that a
refused command takes milliseconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jaxformer.api
from jaxformer.cli.main import main
from jaxformer.config import InputError, digest, from_json, text
from jaxformer.training.run import Run
from tests.e2e.odd_input import WRITERS, Case, Cases, dumps, make_sandbox
from tests.e2e.program import contents

SECONDS = 60  # that a case may take; nearly all take less than one
BYTES = 12 * 2**30  # of address space, so that no case takes the machine's memory

# ---- trying a case -----------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
  code: int | None  # None where it had to be ended
  out: str
  err: str
  seconds: float


class _Begun(BaseException):
  """Training would begin: every check has passed, and nothing is written yet."""


def _attempt(case: Case, trains: bool) -> int:
  """Try a case in this process."""
  if not case.words:
    return _attempt_config(case.data)
  if not trains:

    def start(*_: Any) -> None:
      raise _Begun

    Run.start = start  # type: ignore[method-assign]
    if 'study.py' not in case.words:  # the others take a minute to find their sizes
      jaxformer.api.report_study = jaxformer.api.train_study = start
  try:
    return main(case.words)
  except _Begun:
    return 0


def _attempt_config(data: Any) -> int:
  """Decode a config, and read it back from its own text."""
  try:
    config = from_json(data)
  except InputError as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  assert from_json(json.loads(text(config))) == config
  assert digest(config)
  return 0


def problem_of_config(data: Any) -> str:
  """Return which rule a config breaks, tried in this process, or ''."""
  try:
    config = from_json(data)
    return '' if from_json(json.loads(text(config))) == config else 'reads back as another'
  except InputError as e:
    return 'a long message' if len(str(e)) > 4000 else ''
  except Exception as e:
    return f'{type(e).__name__}: {e}'


def attempt(case: Case, sandbox: Path, log: Path, trains: bool = False) -> Outcome:
  """Try a case in a fork of this process."""
  began = time.perf_counter()
  pid = os.fork()
  if pid == 0:
    code = 1
    try:
      os.setsid()
      resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
      resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
      os.chdir(sandbox)
      (log / 'in').write_bytes(case.text.encode('utf-8', 'surrogateescape'))
      for fd, name, flags in ((0, 'in', os.O_RDONLY), (1, 'out', 577), (2, 'err', 577)):
        os.dup2(os.open(log / name, flags, 0o600), fd)
      os.environ |= {'HOME': f'{sandbox}/home', 'TMPDIR': f'{sandbox}/tmp'}
      os.environ |= {'JAXFORMER_CACHE': f'{log}/cache', 'MPLCONFIGDIR': f'{log}/matplotlib'}
      os.environ |= {'HF_HUB_OFFLINE': '1', 'HF_DATASETS_OFFLINE': '1', 'WANDB_MODE': 'offline'}
      sys.stdin = io.TextIOWrapper(io.FileIO(0), 'utf-8', 'strict')
      sys.stdout = io.TextIOWrapper(io.FileIO(1, 'w'), 'utf-8', 'strict')
      sys.stderr = io.TextIOWrapper(io.FileIO(2, 'w'), 'utf-8', 'backslashreplace')
      code = _attempt(case, trains)
      sys.stdout.flush()
    except SystemExit as e:
      code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except BaseException:
      traceback.print_exc()
    finally:
      with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
      os._exit(code & 255)
  status = None
  while status is None and time.perf_counter() - began < SECONDS:
    done, found = os.waitpid(pid, os.WNOHANG)
    status = os.waitstatus_to_exitcode(found) if done else time.sleep(0.004)
  if status is None:
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
  out, err = ((log / n).read_bytes().decode('utf-8', 'replace') for n in ('out', 'err'))
  return Outcome(status, out, err, time.perf_counter() - began)


def problem(case: Case, outcome: Outcome, before: dict[str, str], after: dict[str, str]) -> str:
  """Return which rule a case broke, or ''."""
  code, err = outcome.code, outcome.err
  if code is None:
    return 'it hangs'
  command = case.words[0] if case.words else ''
  if 'Traceback' in err:
    return 'a traceback'
  failed = 'error: out of memory' in err or (command == 'check' and 'error' not in err)
  if code not in (0, 2, 70, 75) and not (code == 1 and failed):
    return f'exit code {code}'
  if code == 2:
    errors = err[err.find('error: ') :]
    if err.count('error: ') < 1:
      return 'no message'
    if len(errors.splitlines()) > 16 or len(errors) > 6000:
      return 'a long message'
    if outcome.out:
      return 'output beside an error'
  changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
  if code == 2:
    return f'changed {changed}' if changed else ''
  if case.words and '--json' in case.words and code == 0 and outcome.out:
    try:
      json.loads(outcome.out, parse_constant=lambda c: 1 / 0)
    except (ValueError, ZeroDivisionError):
      return 'not one JSON value'
  new = command in WRITERS
  wrong = [
    p for p in changed if not ((new and p not in before) or (command == 'train' and 'runs/' in p))
  ]
  return f'changed {wrong}' if wrong else ''


def spoil(sandbox: Path, spoils: Sequence[tuple[str, bytes | str | None]]) -> None:
  for name, content in spoils:
    path = sandbox / name
    with contextlib.suppress(NotADirectoryError, FileExistsError):  # spoiled above it
      path.parent.mkdir(parents=True, exist_ok=True)
      if path.is_dir():
        shutil.rmtree(path)
      else:
        path.unlink(missing_ok=True)
      if isinstance(content, bytes):
        path.write_bytes(content)
      elif content == 'folder':
        path.mkdir()
      elif content == 'fifo':
        os.mkfifo(path)
      elif content == 'link':
        path.symlink_to('nowhere')


def run_cases(
  template: Path, work: Path, seed: int, numbers: Sequence[int]
) -> Iterator[tuple[int, Case, Outcome, str]]:
  cases, sandbox, log = Cases(seed, template), work / 'sandbox', work / 'log'
  shutil.rmtree(log, ignore_errors=True)
  log.mkdir(parents=True)
  make_sandbox(template, sandbox)
  clean = snapshot(sandbox)
  for number in numbers:
    case = cases[number]
    spoil(sandbox, case.spoils)
    before = snapshot(sandbox) if case.spoils else clean
    outcome = attempt(case, sandbox, log, trains=case.words[:1] == ['train'] and number % 16 == 0)
    after = snapshot(sandbox)
    yield number, case, outcome, problem(case, outcome, before, after)
    if after != clean:
      make_sandbox(template, sandbox)
      clean = snapshot(sandbox)


def snapshot(folder: Path) -> dict[str, str]:
  """Return every path below, with a hash of its content."""
  return contents(folder)


def _main() -> None:
  template, work = map(Path, sys.argv[1:3])
  seed, first, count = map(int, sys.argv[3:6])
  only = [int(x) for x in sys.argv[6:]]
  began = time.perf_counter()
  codes: dict[Any, int] = {}
  for number, case, outcome, wrong in run_cases(
    template, work, seed, only or range(first, first + count)
  ):
    codes[outcome.code] = codes.get(outcome.code, 0) + 1
    if wrong or only or outcome.seconds > 20:
      words = [w if len(w) < 200 else f'{w[:60]}...({len(w)})' for w in case.words]
      spoils = [
        (n, s if s is None or len(s) < 80 else repr(s[:60]) + f'...{len(s)}')
        for n, s in case.spoils
      ]
      print(
        json.dumps(
          {
            'number': number,
            'problem': wrong,
            'words': words,
            'data': dumps(case.data)[:300],
            'spoils': repr(spoils)[:400],
            'code': outcome.code,
            'seconds': round(outcome.seconds, 2),
            'err': outcome.err
            if len(outcome.err) < 3000
            else outcome.err[:400] + ' ... ' + outcome.err[-1800:],
          }
        ),
        flush=True,
      )
  print(
    json.dumps(
      {'codes': {str(k): v for k, v in codes.items()}, 'seconds': time.perf_counter() - began}
    )
  )


if __name__ == '__main__':
  _main()
