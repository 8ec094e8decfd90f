"""One run of the training loop: where it stands, and what is due after a step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxformer import config
from jaxformer.data.dataset import Earlier, TrainBatches
from jaxformer.exit_codes import DONE, NOT_FINITE, PREEMPTED
from jaxformer.models.params import Params
from jaxformer.training.checkpoint import Checkpoints, NotFinite, Restored, steps_in
from jaxformer.training.interrupt import Interrupt
from jaxformer.training.paths import AnyPath
from jaxformer.training.processes import broadcast_from_process_0
from jaxformer.training.report import Log, Report, scores
from jaxformer.training.run import Run, read_metrics
from jaxformer.training.setup import Initial, Setup
from jaxformer.training.step import TrainState, init_state

Sample = Callable[[Params, int], Iterable[str]]
"""Text generated from parameters at a step, in pieces between which a run may be stopped."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """Result of a training run.

  Attributes:
    folder: of the run.
    step: number of completed updates.
    metrics: the latest value of each metric.
    exit_code: 0 done, 70 non-finite numbers, 75 preempted and saved.
  """

  folder: AnyPath
  step: int
  metrics: dict[str, Any]
  exit_code: int


def _silent(line: str) -> None:
  """Log nothing."""


class Member:
  """One run of the loop.

  Attributes:
    step: number of completed updates.
    tokens: target tokens seen, padding included.
    code: exit code once the run has ended.
    sample: adds text to `samples.txt` after each evaluation.
    log: receives lines about progress, on process 0.
    report: of the metrics; opened once the run is started.
  """

  def __init__(self, setup: Setup, run: Run, log: Log):
    self.setup, self.run, self.config = setup, run, setup.experiment.training
    self.step, self.tokens, self.code = 0, 0, None
    self.log: Log = log if run.writes else _silent
    self.sample: Sample | None = None
    t = self.config
    self.checkpoints = Checkpoints(
      run.folder / 'checkpoints', t.keep_latest, t.keep_best, t.keep_every, self.log
    )
    self.report: Report
    self._restored: Restored | None = None
    self._given: tuple[str, Params] | None = None
    self._earlier: Earlier = ()
    self._saved = self._evaluated = self._sampled = -1  # the latest step that was
    self._last_row = 0, 0, 0.0  # step, tokens and seconds of training

  # ---- the start, in this order ----------------------------------------------------------------

  def initialize_from(self, source: Initial) -> None:
    """Read the parameters that a run without checkpoints begins with. Raises `InputError`."""
    if not steps_in(self.checkpoints.folder):
      self._given = source.name, self.setup.initial_params(source)

  def restore(self) -> None:
    """Read the latest valid checkpoint, or the one to go back to, without writing. Raises
    `InputError`, also where the data are not those of the checkpoint."""
    run, t = self.run, self.config
    self._restored = r = self.checkpoints.restore(self.setup.abstract_state(), run.back_to)
    if r is not None:
      self.step = self._saved = int(r.state.step)
      old = r.data['batch_size']
      self.setup.dataset.resume_step(r.data, old, t.seed)
      self._earlier = r.data.get('earlier', ())
      if old != t.batch_size:  # a change on purpose: others were refused before
        self._earlier = (*self._earlier, (self.step, old))
    run.resume_at(self.step)

  def begin(self) -> TrainState:
    """Make the folder that of a run at this step, and return the state to train from: that of the
    checkpoint, or the initial one. The run is started, and its report open."""
    run, r, self._restored = self.run, self._restored, None
    self.checkpoints.set_aside([] if r is None else [step for step, _ in r.corrupt])
    if r is None:
      return self._initialize()
    for step, problem in r.corrupt:
      run.event('checkpoint_corrupt', step=step, problem=problem)
    run.rewind(self.step)
    run.event('resume', step=self.step, changed=run.changed)
    changed = f' with {"; ".join(run.changed)}' if run.changed else ''
    self.log(f'resuming {run.folder} at step {self.step}{changed}')
    # on all processes what the first one finds
    found: Any = broadcast_from_process_0(
      lambda: [read_metrics(run.home), run.has_sample(self.step)]
    )
    rows, sampled = found
    self.tokens = r.tokens if r.tokens is not None else self._estimated_tokens(rows)
    self._last_row = self.step, self.tokens, 0.0
    losses = {row['step']: row['eval/loss'] for row in rows if row.get('eval/loss') is not None}
    self.checkpoints.losses |= losses
    self._evaluated = self.step if self.step in losses else -1
    self._sampled = self.step if sampled else -1
    for row in rows:
      self.report.last |= row
    if self.step >= self.config.steps and not self.unevaluated:
      self.log(f'{run.folder} has already completed its {self.config.steps} steps')
      self.code = DONE
    return r.state

  def _estimated_tokens(self, rows: list[dict[str, Any]]) -> int:
    """Return the tokens up to a checkpoint that holds no number of them: between two rows of
    metrics in proportion."""
    counted = [r for r in rows if 'tokens' in r and 0 < r['step'] <= self.step]
    if counted:
      return round(counted[-1]['tokens'] * self.step / counted[-1]['step'])
    return self.step * self.config.batch_size * self.setup.experiment.data.positions

  def _initialize(self) -> TrainState:
    run, s = self.run, self.setup
    source, params = self._given or (None, None)
    self._given = None
    run.rewind(-1)
    run.event('start', init_from=source)
    self.log(
      f'{run.folder}: {s.definition.size:,} parameters, {s.parallel.mesh.size} devices, '
      f'{s.step_config.dtype}, {s.dataset.size}'
    )
    state = init_state(s.definition, s.optimizer, self.config.seed, s.parallel)
    return state if params is None else dataclasses.replace(state, params=params)

  # ---- steps -----------------------------------------------------------------------------------

  def batches(self) -> TrainBatches:
    c, part = self.config, self.setup.placement
    skipped = [range(r.start - 1, r.stop - 1) for r in self.run.skips]  # data count from 0
    return self.setup.dataset.train_batches(
      c.batch_size, c.seed, self.step, part.index, part.count, self._earlier, skipped
    )

  @property
  def skips(self) -> bool:
    """Whether the next step is one to skip."""
    return any(self.step + 1 in r for r in self.run.skips)

  def skip(self) -> None:
    """Pass over the steps to skip that come next."""
    begin = self.step
    while self.skips:
      self.step += 1
    step, *rest = self._last_row
    self._last_row = step + self.step - begin, *rest
    self.run.event('skip', steps=f'{begin + 1}:{self.step + 1}')
    last = f' to {self.step}' if self.step > begin + 1 else ''
    self.log(f'skipping step {begin + 1}{last}')

  @property
  def unevaluated(self) -> bool:
    """Whether the current step is to be followed by an evaluation, or a sample, that has not taken
    place."""
    c = self.config
    due = self.step == c.steps or (0 < self.step < c.steps and not self.step % c.eval_every)
    sampled = self.sample is None or self._sampled == self.step
    return due and not (sampled and self._evaluated == self.step)

  @property
  def unsaved(self) -> bool:
    """Whether the current step is to be followed by a checkpoint that has not been saved."""
    due = self.step == self.config.steps or not self.step % self.config.checkpoint_every
    return due and self._saved != self.step

  def report_step(
    self,
    values: dict[str, Any],
    seconds: float,
    utilization: Mapping[str, float],
    predicted: float | None,
  ) -> None:
    """Report the metrics of the current step, `seconds` of training after the start, with the
    `predicted` seconds of a step; end the run if they are not finite."""
    c, finite = self.config, bool(values.pop('finite'))
    if finite and self.step % c.log_every and self.step not in (1, c.steps):
      return
    step, tokens, then = self._last_row
    steps = max(1, self.step - step)
    step_seconds = (seconds - then) / steps
    rate = (self.tokens - tokens) / steps / max(step_seconds, 1e-9)
    per_device = rate / self.setup.parallel.mesh.size
    self._last_row = self.step, self.tokens, seconds
    row = {'step': self.step, 'tokens': self.tokens, **values}
    row |= {'tokens_per_second': rate, 'step_seconds': step_seconds}
    if predicted is not None:
      row['predicted_step_seconds'] = predicted
    self.report.row(row | {name: per_device * one for name, one in utilization.items()})
    if not finite:
      self._end_not_finite('loss or gradient')

  def _end_not_finite(self, what: str) -> None:
    """End the run, since something of the current step is not finite."""
    self.code = NOT_FINITE
    self.run.event('not_finite', step=self.step, what=what)
    with contextlib.suppress(RuntimeError):  # of two failures report this one
      self.checkpoints.wait()
    kept = steps_in(self.checkpoints.folder)
    step, last = self.step, self.config.steps
    latest = f'the latest checkpoint is of step {kept[-1]}' if kept else 'there is no checkpoint'
    ways = [f'--training.skip-steps {step}:{step + 1} passes over its batch'] if step < last else []
    ways += ['--training.resume-with optimizer.learning-rate=... changes a setting']
    ways += ['--resume-from goes back further'] if len(kept) > 1 else []
    self.log(f'stopped: {what} of step {step} is not finite; {latest}. To go on: {", ".join(ways)}')

  def save(self, state: TrainState) -> None:
    """Save the state, unless it has been; end the run if it is not finite."""
    if self._saved == self.step:
      return
    began, c = time.perf_counter(), self.config
    self.run.sync()  # a checkpoint relies on the metrics up to its step
    record = {
      'data': self.setup.dataset.state(self.step, c.batch_size, c.seed, self._earlier),
      'config': config.digest(self.run.experiment),
      'tokens': self.tokens,
    }
    try:
      self.checkpoints.save(state, record)
    except NotFinite as e:
      self._end_not_finite(f'the state ({e})')
      return
    self._saved = self.step
    self.run.event('checkpoint', step=self.step, seconds=round(time.perf_counter() - began, 3))

  def evaluate(self, params: Params, interrupt: Interrupt) -> None:
    """Evaluate, and add a sample; end the run if the loss is not finite. Raises `Stopped`, upon
    which a resumed run does what is left."""
    step, began = self.step, time.perf_counter()
    if self._evaluated != step:
      found = self.setup.evaluate(params, interrupt.until)
      self.report.row({'step': step, 'tokens': self.tokens, **found})
      self.log(f'step {step}/{self.config.steps} | {scores(found)}')
      self.run.event('eval', step=step, seconds=round(time.perf_counter() - began, 3))
      if not math.isfinite(found['eval/loss']):
        self.checkpoints.discard(step)
        self._end_not_finite('loss of the evaluation')
        return
      self.checkpoints.losses[step] = found['eval/loss']
      self._evaluated = step
    if self.sample is not None and self._sampled != step:
      self.run.samples(step, ''.join(interrupt.until(self.sample(params, step))))
      self._sampled = step
    self.run.sync()

  def end(self, signal: str | None) -> None:
    """End the run at its last step, or at this one after a signal."""
    self.checkpoints.wait(final=True)
    if self.step >= self.config.steps and not self.unevaluated:
      self.code = DONE
      self.run.event('done', step=self.step)
      return
    self.code = PREEMPTED
    self.run.event('interrupted', step=self.step, signal=signal)
    self.log(
      f'interrupted ({signal or "preemption"}): saved at step {self.step}; run the same command to '
      'resume'
    )

  @property
  def result(self) -> TrainResult:
    code = DONE if self.code is None else self.code
    return TrainResult(self.run.folder, self.step, dict(self.report.last), code)
