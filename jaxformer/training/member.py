"""One run of the training loop: where it stands, and what is due after a step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxformer import config
from jaxformer.exit_codes import DONE, NOT_FINITE, PREEMPTED
from jaxformer.models.params import Params
from jaxformer.training.checkpoint import Checkpoints, NotFinite, steps_in
from jaxformer.training.interrupt import Interrupt
from jaxformer.training.paths import AnyPath
from jaxformer.training.report import Report, scores
from jaxformer.training.run import Run, read_metrics
from jaxformer.training.setup import Setup
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


class Member:
  """One run of the loop.

  Attributes:
    step: number of completed updates.
    tokens: target tokens seen, padding included.
    code: exit code once the run has ended.
    sample: adds text to `samples.txt` after each evaluation.
  """

  def __init__(
    self,
    setup: Setup,
    run: Run,
    report: Report,
    checkpoints: Checkpoints,
    given: tuple[str, Params] | None,
  ):
    self.setup, self.run, self.report, self.checkpoints = setup, run, report, checkpoints
    self.config = setup.experiment.training
    self.step, self.tokens, self.code = 0, 0, None
    self.sample: Sample | None = None
    self._given = given
    self._saved = self._evaluated = self._sampled = -1  # the latest step that was
    self._last_row = 0, 0, 0.0  # step, tokens and seconds of training

  def restore(self) -> TrainState:
    """Restore the state from the latest valid checkpoint, or initialize it."""
    run, t, steps = self.run, self.config, self.config.steps
    restored = self.checkpoints.restore(self.setup.abstract_state())
    if restored is None:
      return self._initialize()
    state, position, corrupt = restored
    self.step = self._saved = int(state.step)
    self.setup.dataset.resume_step(position, t.batch_size, t.seed)
    for step, problem in corrupt:
      run.event('checkpoint_corrupt', step=step, problem=problem)
    run.rewind(self.step)
    run.event('resume', step=self.step, changed=run.changed)
    changed = f' with {"; ".join(run.changed)}' if run.changed else ''
    self.report.line(f'resuming {run.folder} at step {self.step}{changed}')
    rows = read_metrics(run.folder)
    counted = [r for r in rows if 'tokens' in r and 0 < r['step'] <= self.step]
    # between two rows of metrics, in proportion
    self.tokens = (
      round(counted[-1]['tokens'] * self.step / counted[-1]['step'])
      if counted
      else self.step * t.batch_size * self.setup.experiment.data.positions
    )
    self._last_row = self.step, self.tokens, 0.0
    losses = {r['step']: r['eval/loss'] for r in rows if r.get('eval/loss') is not None}
    self.checkpoints.losses |= losses
    self._evaluated = self.step if self.step in losses else -1
    self._sampled = self.step if run.has_sample(self.step) else -1
    for row in rows:
      self.report.last |= row
    if self.step >= steps and not self.unevaluated:
      self.report.line(f'{run.folder} has already completed its {steps} steps')
      self.code = DONE
    return state

  def _initialize(self) -> TrainState:
    run, s = self.run, self.setup
    source, params = self._given or (None, None)
    run.rewind(-1)
    run.event('start', init_from=source)
    self.report.line(
      f'{run.folder}: {s.definition.size:,} parameters, {s.parallel.mesh.size} devices, '
      f'{s.step_config.dtype}, {s.dataset.size}'
    )
    state = init_state(s.definition, s.optimizer, self.config.seed, s.parallel)
    return state if params is None else dataclasses.replace(state, params=params)

  def batches(self) -> Any:
    c, part = self.config, self.setup.placement
    return self.setup.dataset.train_batches(c.batch_size, c.seed, self.step, part.index, part.count)

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
    self, values: dict[str, Any], seconds: float, utilization: Mapping[str, float]
  ) -> None:
    """Report the metrics of the current step, `seconds` of training after the start; end the run if
    they are not finite."""
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
    latest = f'the latest checkpoint is of step {kept[-1]}' if kept else 'there is no checkpoint'
    self.report.line(f'stopped: {what} of step {self.step} is not finite; {latest}')

  def save(self, state: TrainState) -> None:
    """Save the state, unless it has been; end the run if it is not finite."""
    if self._saved == self.step:
      return
    began, c = time.perf_counter(), self.config
    self.run.sync()  # a checkpoint relies on the metrics up to its step
    data = self.setup.dataset.state(self.step, c.batch_size, c.seed)
    try:
      self.checkpoints.save(state, data, config.digest(self.setup.experiment))
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
      self.report.line(f'step {step}/{self.config.steps} | {scores(found)}')
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
    self.report.line(
      f'interrupted ({signal or "preemption"}): saved at step {self.step}; run the same command to '
      'resume'
    )

  @property
  def result(self) -> TrainResult:
    code = DONE if self.code is None else self.code
    return TrainResult(self.run.folder, self.step, dict(self.report.last), code)
