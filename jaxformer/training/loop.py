"""The training loop: restore or begin; then step, report, evaluate, save; short and linear.

Exit codes, which a job's launcher acts on: 0 done, 70 stopped on numbers that are not finite, 75
interrupted and saved (run again)."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxformer import config
from jaxformer.config import InputError
from jaxformer.data import Dataset, open_data
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import Definition, Params, define
from jaxformer.sharding import Rules, make_mesh, use_mesh
from jaxformer.training.checkpoint import Checkpoints, load_params
from jaxformer.training.experiment import Experiment, check_fit
from jaxformer.training.feed import Feed
from jaxformer.training.folder import Place
from jaxformer.training.host import keep_freed_memory
from jaxformer.training.interrupt import Interrupt
from jaxformer.training.lowering import abstract_train_state, step_config
from jaxformer.training.optimizer import Optimizer
from jaxformer.training.report import Log, Meter, Report, scores, to_host
from jaxformer.training.run import Run, read_metrics
from jaxformer.training.step import StepConfig, TrainState, compiled_train_step, init_state
from jaxformer.training.validation import Evaluate, validator

DONE, NOT_FINITE, INTERRUPTED = 0, 70, 75

FlopsPerToken = Callable[[ModelConfig, int, bool], float]
"""Training FLOPs a token of a model at a sequence length, attention counted causally or in full."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """What came of a training.

  Attributes:
    folder: of the run.
    step: updates done.
    metrics: the newest value of each metric.
    exit_code: 0 done, 70 numbers that are not finite, 75 interrupted and saved.
  """

  folder: Place
  step: int
  metrics: dict[str, Any]
  exit_code: int


@dataclasses.dataclass(frozen=True)
class Setup:
  """The parts that an experiment names, made and checked against each other."""

  experiment: Experiment
  definition: Definition
  dataset: Dataset
  optimizer: Optimizer
  mesh: Mesh
  step_config: StepConfig
  feed: Feed

  @property
  def rules(self) -> Rules | str:
    return self.experiment.mesh.rules

  @classmethod
  def of(
    cls, experiment: Experiment, dataset: Dataset, devices: Sequence[jax.Device] | None = None
  ) -> Setup:
    """Raises `InputError` for parts that do not fit."""
    t, model = experiment.training, experiment.model
    definition, mesh = check(experiment, devices)
    rules = experiment.mesh.rules
    check_fit(model, experiment.data, dataset.vocab_size, dataset.source_vocab_size)
    return cls(
      experiment,
      definition,
      dataset,
      Optimizer.of(experiment.optimizer, experiment.schedule, t.steps, definition),
      mesh,
      step_config(experiment, mesh),
      Feed(mesh, rules, t.batch_size, experiment.data.positions),
    )

  def abstract(self) -> TrainState:
    """Shapes and shardings of the state, without arrays."""
    return abstract_train_state(self.definition, self.optimizer, self.mesh, self.rules)

  def validator(self) -> Evaluate:
    t = self.experiment.training
    rows = t.batch_size // t.accumulate
    return validator(
      self.definition,
      self.dataset,
      self.mesh,
      self.rules,
      self.step_config.dtype,
      rows,
      t.eval_batches,
    )


def check(
  experiment: Experiment, devices: Sequence[jax.Device] | None = None
) -> tuple[Definition, Mesh]:
  """The model and the mesh of an experiment, checked against each other: what can be known before
  the data are read.

  Raises `InputError` for parts that do not fit.
  """
  t, rules = experiment.training, experiment.mesh.rules
  check_fit(experiment.model, experiment.data)
  definition, mesh = define(experiment.model), make_mesh(experiment.mesh, devices)
  # each microbatch is divided over the mesh
  Feed(mesh, rules, t.batch_size // t.accumulate, experiment.data.positions)
  definition.shardings(mesh, rules)
  return definition, mesh


def train(
  experiment: Experiment,
  *,
  init_from: str | Place | Params | None = None,
  dataset: Dataset | None = None,
  devices: Sequence[jax.Device] | None = None,
  flops_per_token: FlopsPerToken | None = None,
  peak_flops_per_second: float | None = None,
  sample: Callable[[Params, int], str] | None = None,
  log: Log | None = None,
) -> TrainResult:
  """Trains an experiment in its run folder; goes on where the run there stopped.

  Args:
    experiment: what to do.
    init_from: what the run begins with: a checkpoint (see `checkpoint.find`), or parameters by
      name, which are copied. A run that began so already goes on; one that began otherwise is an
      error.
    dataset: the data of the experiment, if it is open already.
    devices: to run on; all by default.
    flops_per_token, peak_flops_per_second: of the model and of one device; with both, `mfu` is
      reported.
    sample: text generated from parameters at a step, kept in `samples.txt` after each evaluation.
    log: takes the lines about progress; on stderr by default.

  Raises `InputError` before anything is written if the experiment cannot be run, or the folder
  holds another one."""
  run = Run(experiment)
  if init_from is not None:
    run.check_beginning()
  check(experiment, devices)
  dataset = dataset or open_data(experiment.data, log=log)
  setup = Setup.of(experiment, dataset, devices)
  if setup.mesh.devices.flat[0].platform == 'cpu':
    keep_freed_memory()
  with contextlib.ExitStack() as stack:
    stack.enter_context(use_mesh(setup.mesh, setup.rules))
    # a wrong path fails before writing
    first = _initial_params(setup, init_from) if run.fresh and init_from is not None else None
    stack.enter_context(run)
    run.start(dataset.manifest, dataset.tokenizer)
    report = stack.enter_context(Report(run, experiment, log))
    t = experiment.training
    checkpoints = stack.enter_context(
      Checkpoints(run.folder / 'checkpoints', t.keep_latest, t.keep_best, report.line)
    )
    state = begin(setup, run, checkpoints, report, init_from, first)
    del first
    costs = _costs(setup, flops_per_token, peak_flops_per_second)
    return _Loop(setup, run, checkpoints, report, costs, sample).go(state)


def _initial_params(setup: Setup, source: str | Place | Params) -> Params:
  d = setup.definition
  if not isinstance(source, Mapping):
    return load_params(source, d, setup.mesh, setup.rules)[0]
  lines = [f'{n}: not given' for n in d.info if n not in source] + [
    f'{n}: not of this model' for n in source if n not in d.info
  ]
  found = {n: tuple(source[n].shape) for n in d.info if n in source}
  lines += [
    f'{n}: {shape} given, {d.info[n].shape} here'
    for n, shape in found.items()
    if shape != d.info[n].shape
  ]
  if lines:
    shown = '\n  '.join(lines[:12] + ([f'and {len(lines) - 12} more'] if len(lines) > 12 else []))
    raise InputError(f'init_from: the parameters given are not those of this model:\n  {shown}')
  where = d.shardings(setup.mesh, setup.rules)
  # Copies: the step takes the memory of its arguments for its results.
  return {n: jnp.array(jax.device_put(source[n], where[n]), i.dtype) for n, i in d.info.items()}


def begin(
  setup: Setup,
  run: Run,
  checkpoints: Checkpoints,
  report: Report,
  init_from: str | Place | Params | None,
  first: Params | None,
) -> TrainState:
  """The state to go on with: that of the newest checkpoint that is whole, or a new one."""
  restored = checkpoints.restore(setup.abstract())
  if restored is not None:
    t, step = setup.experiment.training, int(restored.state.step)
    setup.dataset.resume_step(restored.data, t.batch_size, t.seed)
    for damaged, problem in restored.damaged:
      run.event('checkpoint_damaged', step=damaged, problem=problem)
    run.rewind(step)
    run.event('resume', step=step, changed=run.changed)
    report.line(
      f'resuming {run.folder} at step {step}'
      + (f' with {"; ".join(run.changed)}' if run.changed else '')
    )
    return restored.state
  if init_from is not None and first is None:
    first = _initial_params(setup, init_from)
  run.rewind(-1)
  source = f'{len(init_from)} arrays given' if isinstance(init_from, Mapping) else init_from
  run.event('start', init_from=None if source is None else str(source))
  d, dtype = setup.definition, setup.step_config.dtype
  report.line(
    f'{run.folder}: {d.size:,} parameters, {setup.mesh.size} devices, {dtype}, {setup.dataset.size}'
  )
  state = init_state(d, setup.optimizer, setup.experiment.training.seed, setup.mesh, setup.rules)
  return state if first is None else dataclasses.replace(state, params=first)


def _costs(
  setup: Setup, flops_per_token: FlopsPerToken | None, peak: float | None
) -> dict[str, float]:
  """Utilisation at one token a second, by convention: `mfu` counts what causal attention needs,
  `mfu_full` all pairs."""
  if flops_per_token is None or peak is None:
    return {}
  e = setup.experiment
  needs = {
    name: flops_per_token(e.model, e.data.positions, causal)
    for name, causal in (('mfu', True), ('mfu_full', False))
  }
  return {name: flops / (peak * setup.mesh.size) for name, flops in needs.items()}


class _Loop:
  """Steps, and what happens between them."""

  def __init__(
    self,
    setup: Setup,
    run: Run,
    checkpoints: Checkpoints,
    report: Report,
    costs: dict[str, float],
    sample: Callable[[Params, int], str] | None,
  ):
    self.setup, self.run, self.checkpoints, self.report, self.costs, self.sample = (
      setup,
      run,
      checkpoints,
      report,
      costs,
      sample,
    )
    self.config = setup.experiment.training
    self.meter, self.saved = Meter(), -1
    self.steps: dict[Any, Any] = {}  # compiled, by the shapes of a batch
    self.tokens = self.lapped = 0  # seen so far, and up to the last lap
    self.digest = config.digest(setup.experiment)
    self.evaluate = setup.validator()

  def go(self, state: TrainState) -> TrainResult:
    c, start = self.config, int(state.step)
    if start >= c.steps:
      self.report.line(f'{self.run.folder} has its {c.steps} steps already')
      last: dict[str, Any] = {}
      for row in read_metrics(self.run.folder):
        last |= row
      return TrainResult(self.run.folder, start, last, DONE)
    self.saved, self.meter.step = start if start else -1, start
    self.tokens = self.lapped = self._tokens_before(start)
    pending: tuple[int, int, Any] | None = None
    with (
      self._batches(start) as batches,
      Interrupt() as interrupt,
      _profiler(c.profile, self.run.home) as profile,
    ):
      for done in range(start + 1, c.steps + 1):
        batch = self.setup.feed(next(batches))
        train_step = self._compiled(state, batch)
        profile(done - 1)
        with jax.transfer_guard('disallow'):
          state, metrics = train_step(state, batch)
        # The step before is over by the time that this one is dispatched, so reading its metrics
        # leaves no gap.
        if pending and not self._process(*pending):
          return self._not_finite(pending[0])
        self.tokens += batch.targets_BT.size
        pending = (done, self.tokens, metrics)
        last_step, stop = done == c.steps, interrupt.requested(done)
        evaluate, save = (
          last_step or done % c.eval_every == 0,
          last_step or done % c.checkpoint_every == 0,
        )
        if evaluate or save or stop:
          if not self._process(*pending):
            return self._not_finite(done)
          pending = None
          self._between(state, done, evaluate, save or stop)
        if stop and not last_step:
          return self._interrupted(done, interrupt.signal)
    self.checkpoints.wait(final=True)
    self.run.event('done', step=c.steps)
    return self._result(c.steps, DONE)

  def _batches(self, start: int) -> Any:
    c, feed = self.config, self.setup.feed
    return self.setup.dataset.train_batches(c.batch_size, c.seed, start, feed.index, feed.count)

  def _compiled(self, state: TrainState, batch: Any) -> Any:
    """The step for the shapes of this batch, compiled ahead of its first run, so that its
    compilation is in no measurement."""
    shapes = tuple(x.shape for x in jax.tree.leaves(batch))
    if shapes not in self.steps:
      if self.steps:
        self.meter.pause()
      s, began = self.setup, time.perf_counter()
      step = (
        compiled_train_step(s.definition, s.optimizer, s.step_config, s.mesh, s.rules)
        .lower(state, batch)
        .compile()
      )
      self.steps[shapes], seconds = step, time.perf_counter() - began
      self.run.event('compile', seconds=round(seconds, 3), shapes=shapes)
      self.report.line(f'compiled the step in {seconds:.1f} s')
      self.meter.go()
    return self.steps[shapes]

  def _tokens_before(self, step: int) -> int:
    """Tokens of the targets, padding counted, that the run has seen up to a step; between rows of
    metrics, in proportion."""
    rows = (
      [r for r in read_metrics(self.run.folder) if 'tokens' in r and 0 < r['step'] <= step]
      if step
      else []
    )
    if rows:
      return round(rows[-1]['tokens'] * step / rows[-1]['step'])
    return step * self.config.batch_size * self.setup.experiment.data.positions

  def _process(self, step: int, tokens: int, metrics: Any) -> bool:
    """Reports a step, which it waits for; whether its numbers are finite."""
    values = to_host(metrics)
    finite = bool(values.pop('finite'))
    c = self.config
    if finite and step % c.log_every and step not in (1, c.steps):
      return True
    steps = max(1, step - self.meter.step)
    seconds = self.meter.lap(step)
    rate, self.lapped = (tokens - self.lapped) / steps / max(seconds, 1e-9), tokens
    row = {
      'step': step,
      'tokens': tokens,
      **values,
      'tokens_per_second': rate,
      'step_seconds': seconds,
    }
    row |= {name: rate * cost for name, cost in self.costs.items()}
    self.report.row(row)
    return finite

  def _between(self, state: TrainState, step: int, evaluate: bool, save: bool) -> None:
    """Evaluates and saves; the clock stands still."""
    self.meter.pause()
    loss = None
    if evaluate:
      began = time.perf_counter()
      found = self.evaluate(state.params)
      loss = found['eval/loss']
      self.report.row({'step': step, 'tokens': self.tokens, **found})
      self.report.line(f'step {step}/{self.config.steps} | {scores(found)}')
      self.run.event('eval', step=step, seconds=round(time.perf_counter() - began, 3))
      if self.sample is not None:
        self.run.samples(step, self.sample(state.params, step))
      self.run.sync()
    if save:
      self._save(state, step, loss)
    self.meter.go()

  def _save(self, state: TrainState, step: int, loss: float | None) -> None:
    if self.saved == step:
      return
    began = time.perf_counter()
    self.run.sync()  # a checkpoint counts on the metrics up to its step
    data = self.setup.dataset.state(step, self.config.batch_size, self.config.seed)
    self.checkpoints.save(state, data, self.digest, loss)
    self.saved = step
    self.run.event('checkpoint', step=step, seconds=round(time.perf_counter() - began, 3))

  def _not_finite(self, step: int) -> TrainResult:
    self.run.event('not_finite', step=step)
    with contextlib.suppress(RuntimeError):  # of two failures this is the one to report
      self.checkpoints.wait()
    self.report.line(
      f'stopped: loss or gradient of step {step} is not finite; the checkpoints before it are kept'
    )
    return self._result(step, NOT_FINITE)

  def _interrupted(self, step: int, signal: str | None) -> TrainResult:
    self.checkpoints.wait(final=True)
    self.run.event('interrupted', step=step, signal=signal)
    self.report.line(
      f'interrupted ({signal or "preemption"}): saved at step {step}; the same command goes on '
      'from there'
    )
    return self._result(step, INTERRUPTED)

  def _result(self, step: int, code: int) -> TrainResult:
    return TrainResult(self.run.folder, step, dict(self.report.last), code)


@contextlib.contextmanager
def _profiler(window: tuple[int, int] | None, folder: Path) -> Generator[Callable[[int], None]]:
  """Within, the function given is told each step before it is dispatched, and records those of the
  window."""
  running = False

  def at(step: int) -> None:
    nonlocal running
    if window is not None and step in window and running == (step == window[1]):
      jax.profiler.stop_trace() if running else jax.profiler.start_trace(str(folder / 'profile'))
      running = not running

  try:
    yield at
  finally:
    if running:
      jax.profiler.stop_trace()
