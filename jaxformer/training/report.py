"""What a run says while it goes: rows of metrics, trackers, and lines or a bar on stderr. Only
process 0 says anything."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxformer import config
from jaxformer.training.experiment import Experiment
from jaxformer.training.run import Run

Log = Callable[[str], None]


class Meter:
  """Seconds spent training: the clock stands still during evaluations and saves."""

  def __init__(self) -> None:
    self._seconds, self._since, self.step = 0.0, time.perf_counter(), 0

  def pause(self) -> None:
    self._seconds += time.perf_counter() - self._since

  def go(self) -> None:
    self._since = time.perf_counter()

  def lap(self, step: int) -> float:
    """Seconds a step since the last lap."""
    self.pause()
    seconds, steps = self._seconds, step - self.step
    self._seconds, self.step = 0.0, step
    self.go()
    return seconds / max(1, steps)


class Report:
  """Takes metrics to where they are read. A context manager.

  Attributes:
    last: the newest value of every metric.
  """

  def __init__(self, run: Run, experiment: Experiment, log: Log | None):
    self._run, self._steps = run, experiment.training.steps
    self.last: dict[str, Any] = {}
    self._trackers = [t.build() for t in experiment.training.trackers] if run.writes else []
    self._experiment = experiment
    self._bar = self._task = None
    if not run.writes:
      self._log: Log = lambda line: None
    elif log is not None:
      self._log = log
    elif sys.stderr.isatty():
      self._log = self._start_bar()
    else:
      self._log = lambda line: print(line, file=sys.stderr, flush=True)

  def _start_bar(self) -> Log:
    from rich.console import Console
    from rich.progress import (
      BarColumn,
      MofNCompleteColumn,
      Progress,
      TextColumn,
      TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
      TextColumn('{task.description}'),
      BarColumn(),
      MofNCompleteColumn(),
      TimeRemainingColumn(),
    )
    self._bar = Progress(*columns, console=console)
    self._task = self._bar.add_task('starting', total=self._steps)
    self._bar.start()
    return lambda line: console.print(line, markup=False, highlight=False)

  def line(self, text: str) -> None:
    """Says something."""
    self._log(text)

  def row(self, row: dict[str, Any]) -> None:
    """Metrics of a step: `step`, and numbers. Those that are not finite are written as null."""
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    self.last |= row
    self._run.metrics(row)
    for t in self._trackers:
      t.log(row['step'], row)

    if 'train/loss' in row:
      self._progress(row)

  def _progress(self, row: dict[str, Any]) -> None:
    text = summary(row)
    if self._bar is None or self._task is None:
      self._log(f'step {row["step"]}/{self._steps} | {text}')
    else:
      self._bar.update(self._task, completed=row['step'], description=text)

  def __enter__(self) -> Report:
    name = self._run.folder.name
    for t in self._trackers:
      t.start(self._run.home, name, config.to_json(self._experiment))
    return self

  def __exit__(self, *_: object) -> None:
    if self._bar is not None:
      self._bar.stop()
    for t in self._trackers:
      t.finish()


def summary(row: dict[str, Any]) -> str:
  """loss 3.214 | lr 3.0e-04 | gnorm 0.91 | 12.3k tok/s | mfu 31.2% | 84 ms"""

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
  """eval loss 1.3862 | 2.0000 bits per byte | corpus validation; of a task | accuracy 50.00% |"""
  of_text = found.get('eval/bits_per_byte')
  score = (
    f'{of_text:.4f} bits per byte'
    if of_text is not None
    else f'accuracy {found["eval/accuracy"]:.2%}'
  )
  return f'eval loss {found["eval/loss"]:.4f} | {score} | {found["eval/source"]}'


def to_host(metrics: dict[str, jax.Array]) -> dict[str, float]:
  """The values of a step's metrics; waits for the step."""
  return {name: v.item() for name, v in jax.device_get(metrics).items()}
