"""Progress of a run: rows of metrics, trackers, and lines of a log."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

from jaxformer import config
from jaxformer.training.experiment import Experiment
from jaxformer.training.run import Run
from jaxformer.training.trackers import Track, TrackerConfig

Log = Callable[[str], None]
T = TypeVar('T')


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


def print_line(line: str) -> None:
  """Print a line of the log to stderr, if it can be written."""
  with contextlib.suppress(OSError):
    print(line, file=sys.stderr, flush=True)


class Report:
  """Sends metrics to files, trackers and the log.

  Attributes:
    line: logs a line.
    last: the latest value of every metric.
  """

  def __init__(self, run: Run, steps: int, line: Log, tracks: Sequence[Track]):
    self._run, self._steps, self._tracks = run, steps, tracks
    self.line = line
    self.last: dict[str, Any] = {}

  def row(self, row: dict[str, Any]) -> None:
    """Record the metrics of a step: `step`, and numbers. Non-finite ones are written as null."""
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    self.last |= row
    self._run.metrics(row)
    numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != 'step'}
    for track in self._tracks:
      track(numbers, row['step'])
    if 'train/loss' in row:
      self.line(f'step {row["step"]}/{self._steps} | {summary(row)}')


@contextlib.contextmanager
def open_report(run: Run, experiment: Experiment, log: Log, step: int) -> Generator[Report]:
  """Yield the report of a run that goes on from a step, with its trackers open within the block.
  Only process 0 tracks and logs."""
  t, settings = experiment.training, config.to_json(experiment)
  with contextlib.ExitStack() as stack:
    tracks = [
      stack.enter_context(_Tracker(tracker, log)).start(
        folder=run.home, id=run.history.id, name=run.name, step=step, config=settings
      )
      for tracker in (t.trackers if run.writes else ())
    ]
    yield Report(run, t.steps, log if run.writes else lambda line: None, tracks)


class _Tracker:
  """A tracker within a block. If it raises an error, that is a warning, and the run goes on without
  it: `metrics.jsonl` has the same."""

  def __init__(self, tracker: TrackerConfig, log: Log):
    self._tracker, self._log = tracker, log
    self._stack = contextlib.ExitStack()
    self._track: Track | None = None
    self._failed = False

  def start(self, **of_run: Any) -> Track:
    """Open the tracker, and return a function to call with the metrics of a step."""
    self._track = self._tried(lambda: self._stack.enter_context(self._tracker.open(**of_run)))

    def track(metrics: dict[str, float], step: int) -> None:
      if self._track is not None:
        self._tried(self._track, metrics, step)

    return track

  def _tried(self, fn: Callable[..., T], *arguments: Any) -> T | None:
    try:
      return fn(*arguments)
    except Exception as e:  # a service may raise any error
      self._track = None
      if not self._failed:
        self._failed = True
        reason = ' '.join(f'{type(e).__name__}: {e}'.split())[:300]
        self._log(f'warning: {self._tracker.tag}: {reason}; the run goes on without this tracker')
      return None

  def __enter__(self) -> _Tracker:
    return self

  def __exit__(self, *error: Any) -> None:
    self._tried(self._stack.__exit__, *error)


def summary(row: dict[str, Any]) -> str:
  """Return the metrics of a step in short: loss 3.214 | lr 3.0e-04 | gnorm 0.91 | 12.3k tok/s | mfu
  31.2% | 84 ms (predicted 80)."""

  def number(key: str, form: str) -> str:
    return 'not finite' if row[key] is None else format(row[key], form)

  parts = [f'loss {number("train/loss", ".3f")}', f'lr {number("learning_rate", ".1e")}']
  parts.append(f'gnorm {number("train/grad_norm", ".2f")}')
  rate = row['tokens_per_second']
  scale, unit = (1e6, 'M') if rate >= 1e6 else (1e3, 'k') if rate >= 1e3 else (1, '')
  parts.append(f'{rate / scale:.1f}{unit} tok/s')
  if 'mfu' in row:
    parts.append(f'mfu {row["mfu"]:.1%}')
  predicted = row.get('predicted_step_seconds')
  beside = '' if predicted is None else f' (predicted {predicted * 1e3:.0f})'
  parts.append(f'{row["step_seconds"] * 1e3:.0f} ms{beside}')
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
