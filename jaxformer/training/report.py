"""Progress of a run: rows of metrics, trackers, and lines or a progress bar on stderr. Only process
0 reports."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Generator
from typing import Any

from jaxformer import config
from jaxformer.training.experiment import Experiment
from jaxformer.training.run import Run
from jaxformer.training.trackers import Track

Log = Callable[[str], None]


class Clock:
  """Seconds spent training. It is paused until the first step and during compilation, evaluation
  and saves."""

  def __init__(self) -> None:
    self._seconds, self._since = 0.0, None

  @property
  def seconds(self) -> float:
    now = time.perf_counter()
    return self._seconds + (0.0 if self._since is None else now - self._since)

  @contextlib.contextmanager
  def paused(self) -> Generator[None]:
    """Pause within the block; the clock runs after it."""
    self._seconds, self._since = self.seconds, None
    yield
    self._since = time.perf_counter()


class Report:
  """Sends metrics to files, trackers and the terminal. A context manager.

  Attributes:
    last: the latest value of every metric.
    line: logs a line.
  """

  def __init__(self, run: Run, experiment: Experiment, log: Log | None):
    self._run, self._experiment = run, experiment
    self._steps = experiment.training.steps
    self.last: dict[str, Any] = {}
    self._track: list[Track] = []
    self._stack = contextlib.ExitStack()
    self._bar = self._task = None
    if not run.writes:
      self.line: Log = lambda line: None
    elif log is not None:
      self.line = log
    elif sys.stderr.isatty():
      self.line = self._start_bar()
    else:
      self.line = lambda line: print(line, file=sys.stderr, flush=True)

  def _start_bar(self) -> Log:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    self._bar = Progress(console=console)
    self._task = self._bar.add_task('starting', total=self._steps)
    return lambda line: console.print(line, markup=False, highlight=False)

  def row(self, row: dict[str, Any]) -> None:
    """Record the metrics of a step: `step`, and numbers. Non-finite ones are written as null."""
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    self.last |= row
    self._run.metrics(row)
    numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != 'step'}
    for track in self._track:
      track(numbers, row['step'])
    if 'train/loss' in row:
      self._progress(row)

  def _progress(self, row: dict[str, Any]) -> None:
    text = summary(row)
    if self._bar is None or self._task is None:
      self.line(f'step {row["step"]}/{self._steps} | {text}')
    else:
      self._bar.update(self._task, completed=row['step'], description=text)

  def __enter__(self) -> Report:
    name, settings = self._run.folder.name, config.to_json(self._experiment)
    with contextlib.ExitStack() as stack:
      if self._bar is not None:
        stack.enter_context(self._bar)
      for t in self._experiment.training.trackers if self._run.writes else ():
        self._track.append(stack.enter_context(t.open(self._run.home, name, settings)))
      self._stack = stack.pop_all()
    return self

  def __exit__(self, *_: object) -> None:
    self._stack.close()


def summary(row: dict[str, Any]) -> str:
  """Return the metrics of a step in short: loss 3.214 | lr 3.0e-04 | gnorm 0.91 | 12.3k tok/s | mfu
  31.2% | 84 ms."""

  def number(key: str, form: str) -> str:
    return 'not finite' if row[key] is None else format(row[key], form)

  parts = [f'loss {number("train/loss", ".3f")}', f'lr {number("learning_rate", ".1e")}']
  parts.append(f'gnorm {number("train/grad_norm", ".2f")}')
  rate = row['tokens_per_second']
  scale, unit = (1e6, 'M') if rate >= 1e6 else (1e3, 'k') if rate >= 1e3 else (1, '')
  parts.append(f'{rate / scale:.1f}{unit} tok/s')
  if 'mfu' in row:
    parts.append(f'mfu {row["mfu"]:.1%}')
  parts.append(f'{row["step_seconds"] * 1e3:.0f} ms')
  return ' | '.join(parts)


def scores(found: dict[str, Any]) -> str:
  """Return the scores of an evaluation in short: eval loss 1.3862 | 2.0000 bits per byte | corpus
  validation. Tasks have an accuracy instead of bits per byte."""
  of_text = found.get('eval/bits_per_byte')
  score = (
    f'{of_text:.4f} bits per byte'
    if of_text is not None
    else f'accuracy {found["eval/accuracy"]:.2%}'
  )
  return f'eval loss {found["eval/loss"]:.4f} | {score} | {found["eval/source"]}'
