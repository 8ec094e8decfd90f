"""Many runs of one architecture in one compiled program: seeds and learning rates trained side by
side under `vmap`, divided over the devices. Each is an ordinary run, with its own folder, data
order and checkpoints, and may go on by itself later."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxformer import config
from jaxformer.config import InputError
from jaxformer.data import Dataset, open_data
from jaxformer.models.params import Definition
from jaxformer.training.checkpoint import Checkpoints
from jaxformer.training.experiment import Experiment
from jaxformer.training.host import keep_freed_memory
from jaxformer.training.interrupt import Interrupt
from jaxformer.training.loop import DONE, INTERRUPTED, NOT_FINITE, Setup, TrainResult, begin, check
from jaxformer.training.optimizer import Muon, Optimizer
from jaxformer.training.report import Log, Meter, Report
from jaxformer.training.run import Run, read_metrics
from jaxformer.training.step import StepConfig, TrainState, train_step

VARIED = ('training.seed', 'optimizer.learning_rate', 'run.name', 'run.dir')
"""What the members of a population may differ in."""


def train_population(
  experiments: Sequence[Experiment],
  *,
  dataset: Dataset | None = None,
  devices: Sequence[jax.Device] | None = None,
  log: Log | None = None,
) -> list[TrainResult]:
  """Trains experiments that differ in `VARIED` alone, together; goes on where their runs stopped,
  each from its own step.

  Every member lives on one device; as many devices as divide the members have equal parts of them.
  What a member computes is what `train` computes for its experiment on one device, up to the
  rounding of batched products. A member whose numbers stop being finite ends, and the others go on.

  Args:
    experiments: the members.
    dataset: their data, if open already.
    devices: to run on; all by default.
    log: takes the lines about progress; on stderr by default.

  Returns one result a member, in order. Raises `InputError` for members that differ in more, have
  equal folders, or cannot be run."""
  first = _check(experiments)
  devices = list(jax.devices() if devices is None else devices)
  check(first, devices[:1])
  dataset = dataset or open_data(first.data, log=log)
  if devices[0].platform == 'cpu':
    keep_freed_memory()
  with contextlib.ExitStack() as stack:
    members = [stack.enter_context(_Member(e, dataset, devices[:1])) for e in experiments]
    return _Population(members, dataset, devices, log).go()


def _check(experiments: Sequence[Experiment]) -> Experiment:
  """The first member. Raises `InputError` where the members are none of one population."""
  if not experiments:
    raise InputError('a population needs at least one member')
  if jax.process_count() > 1:
    raise InputError('a population trains in one process; there are several')
  first = experiments[0]
  for e in experiments[1:]:
    other = [
      d
      for d in config.differences(config.to_json(first), config.to_json(e))
      if not d.startswith(VARIED)
    ]
    if other:
      raise InputError(
        f'the members of a population differ in {", ".join(VARIED)} alone; here also in '
        f'{"; ".join(other)}'
      )
  folders = [(e.run.dir, e.run.name) for e in experiments]
  if len(set(folders)) < len(folders):
    raise InputError('two members of a population have one run folder: give each its own run.name')
  if not first.data.one_shape:
    raise InputError(
      f'data = {first.data.tag}: its batches have several shapes, and a population is one program'
    )
  if isinstance(first.optimizer, Muon) and first.optimizer.adam_learning_rate is not None:
    raise InputError(
      'optimizer.adam_learning_rate: must be none in a population, where the learning rate varies '
      'and it would not'
    )
  return first


class _Member:
  """One run of a population. A context manager: entered, its folder is open."""

  def __init__(self, experiment: Experiment, dataset: Dataset, devices: Sequence[jax.Device]):
    self.run = Run(experiment)
    self.setup = Setup.of(experiment, dataset, devices)
    self.digest = config.digest(experiment)
    self.code: int | None = None
    self._stack = contextlib.ExitStack()

  def __enter__(self) -> _Member:
    with contextlib.ExitStack() as stack:
      dataset, t = self.setup.dataset, self.setup.experiment.training
      stack.enter_context(self.run)
      self.run.start(dataset.manifest, dataset.tokenizer)
      self.report = stack.enter_context(Report(self.run, self.setup.experiment, lambda line: None))
      folder = self.run.folder / 'checkpoints'
      self.checkpoints = stack.enter_context(
        Checkpoints(folder, t.keep_latest, t.keep_best, self.report.line)
      )
      self._stack = stack.pop_all()
    return self

  def __exit__(self, *error: Any) -> None:
    self._stack.__exit__(*error)

  def begin(self) -> TrainState:
    state = begin(self.setup, self.run, self.checkpoints, self.report, None, None)
    self.step = self.saved = int(state.step)
    if not self.step:
      self.saved = -1
    if self.step >= self.setup.experiment.training.steps:
      self.code = DONE
      for row in read_metrics(self.run.folder):
        self.report.last |= row
    return state

  def batches(self) -> Any:
    t, feed = self.setup.experiment.training, self.setup.feed
    return self.setup.dataset.train_batches(t.batch_size, t.seed, self.step, feed.index, feed.count)

  @property
  def result(self) -> TrainResult:
    return TrainResult(
      self.run.folder, self.step, dict(self.report.last), DONE if self.code is None else self.code
    )


class _Population:
  """Steps of all members, and what happens between them."""

  def __init__(
    self, members: list[_Member], dataset: Dataset, devices: Sequence[jax.Device], log: Log | None
  ):
    self.members, self.setup = members, members[0].setup
    self.config = self.setup.experiment.training
    self.tokens = self.config.batch_size * self.setup.experiment.data.positions
    self.evaluate = self.setup.validator()
    self.meter = Meter()
    self.log = log or _stderr
    parts = max(n for n in range(1, len(devices) + 1) if len(members) % n == 0)
    self.mesh = Mesh(
      np.asarray(devices[:parts], dtype=object), ('members',), axis_types=(AxisType.Auto,)
    )

  def go(self) -> list[TrainResult]:
    members, s = self.members, self.setup
    states = self._put(_stacked([m.begin() for m in members]))
    rates = self._put(
      np.array([m.setup.experiment.optimizer.learning_rate for m in members], np.float32)
    )
    step = population_step(s.definition, s.optimizer, s.step_config, self.mesh)
    self.log(
      f'{len(members)} runs of {s.definition.size:,} parameters together, on {self.mesh.size} '
      'devices'
    )
    with contextlib.ExitStack() as stack, Interrupt() as interrupt:
      feeds = [stack.enter_context(m.batches()) for m in members]
      batches: list[Any] = [None] * len(members)
      pending: tuple[list[_Member], list[int], Any] | None = None
      compiled = None
      while running := [m for m in members if m.code is None]:
        batches = [
          self._next(m, feed, batch) for m, feed, batch in zip(members, feeds, batches, strict=True)
        ]
        stacked = self._put(_filled(batches))
        active = self._put(np.array([m.code is None for m in members]))
        compiled = compiled or self._compile(step, states, stacked, rates, active)
        states, metrics = compiled(states, stacked, rates, active)
        for m in running:
          m.step += 1
        if pending is not None:
          self._process(*pending)
        pending = (running, [m.step for m in running], metrics)
        stop = interrupt.requested(running[0].step)
        if stop or any(self._due(m) for m in running):
          self._process(*pending)
          pending = None
          self._between(states, stop, interrupt.signal)
    return [m.result for m in members]

  def _next(self, m: _Member, feed: Iterator[Any], last: Any) -> Any:
    """The next batch of a member; one that has ended is given its last again, which changes
    nothing."""
    return next(feed) if m.code is None else last

  def _put(self, tree: Any) -> Any:
    return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec('members')))

  def _compile(self, step: Any, *arguments: Any) -> Any:
    compiled = step.lower(*arguments).compile()
    for m in self.members:
      m.run.event('population', members=len(self.members), devices=self.mesh.size)
    self.meter.go()
    return compiled

  def _due(self, m: _Member) -> bool:
    c = self.config
    return m.step == c.steps or m.step % c.eval_every == 0 or m.step % c.checkpoint_every == 0

  def _process(self, running: list[_Member], steps: list[int], metrics: Any) -> None:
    """Reports a step of each member that took it; the clock's time is that of all of them."""
    host, c = jax.device_get(metrics), self.config
    seconds, losses = None, []
    for i, m in enumerate(self.members):
      if m not in running or m.code is not None:
        continue
      step = steps[running.index(m)]
      values = {name: v[i].item() for name, v in host.items()}
      finite = bool(values.pop('finite'))
      losses.append(values['train/loss'])
      if finite and step % c.log_every and step not in (1, c.steps):
        continue
      seconds = self.meter.lap(step) if seconds is None else seconds
      m.report.row(
        {
          'step': step,
          'tokens': step * self.tokens,
          **values,
          'tokens_per_second': self.tokens / max(seconds, 1e-9),
          'step_seconds': seconds,
        }
      )
      if not finite:
        m.code = NOT_FINITE
        m.run.event('not_finite', step=step)
        self.log(
          f'{m.run.folder.name}: loss or gradient of step {step} is not finite; the others go on'
        )
    if seconds is not None and losses:
      self.log(
        f'step {max(steps)}/{c.steps} | {len(losses)} runs | loss {min(losses):.3f} to '
        f'{max(losses):.3f} | '
        f'{seconds * 1e3:.0f} ms'
      )

  def _between(self, states: TrainState, stop: bool, signal: str | None) -> None:
    """Evaluates and saves those whose time it is; the clock stands still."""
    self.meter.pause()
    c = self.config
    for i, m in enumerate(self.members):
      last = m.step == c.steps
      if m.code is not None or not (stop or self._due(m)):
        continue
      state = jax.device_put(_member(states, i), self.setup.mesh.devices.flat[0])
      loss = None
      if last or m.step % c.eval_every == 0:
        found = self.evaluate(state.params)
        loss = found['eval/loss']
        m.report.row({'step': m.step, 'tokens': m.step * self.tokens, **found})
      if stop or last or m.step % c.checkpoint_every == 0:
        self._save(m, state, loss)
      if last or stop:
        m.checkpoints.wait(final=True)
        m.code = DONE if last else INTERRUPTED
        m.run.event('done', step=m.step) if last else m.run.event(
          'interrupted', step=m.step, signal=signal
        )
    self.meter.go()

  def _save(self, m: _Member, state: TrainState, loss: float | None) -> None:
    if m.saved != m.step:
      m.run.sync()
      t = m.setup.experiment.training
      m.checkpoints.save(
        state, self.setup.dataset.state(m.step, t.batch_size, t.seed), m.digest, loss
      )
      m.saved = m.step
      m.run.event('checkpoint', step=m.step)


def population_step(
  definition: Definition, optimizer: Optimizer, settings: StepConfig, mesh: Mesh
) -> jax.stages.Wrapped:
  """`train_step` of many states, batches and peak learning rates on a leading axis, divided over
  `mesh`'s axis `members`; a member that is not `active` stays as it is. The states are donated."""

  def one(state: TrainState, batch: Any, rate: Array, active: Array) -> tuple[TrainState, Any]:
    after, metrics = train_step(
      definition, dataclasses.replace(optimizer, peak=rate), settings, state, batch
    )
    kept = {
      name: jax.tree.map(
        lambda new, old: jnp.where(active, new, old), getattr(after, name), getattr(state, name)
      )
      for name in ('step', 'params', 'opt_state')
    }
    return TrainState(**kept, key=state.key), metrics

  part = PartitionSpec('members')
  every = jax.shard_map(jax.vmap(one), mesh=mesh, in_specs=part, out_specs=part, check_vma=False)
  return jax.jit(every, donate_argnums=0)


def _stacked(states: list[TrainState]) -> TrainState:
  return jax.tree.map(lambda *x: jnp.stack(x), *states)


@jax.jit
def _member(states: TrainState, i: int) -> TrainState:
  """One of them; one program, where indexing array by array would be one for each shape."""
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), states)


def _filled(batches: list[Any]) -> Any:
  """Batches on a leading axis; a member that had ended before its first one is given another's,
  which changes nothing."""
  some = next(b for b in batches if b is not None)
  return jax.tree.map(lambda *x: np.stack(x), *(some if b is None else b for b in batches))


def _stderr(line: str) -> None:
  print(line, file=sys.stderr, flush=True)
