"""The training loop: restore or initialize; then step, report, save and evaluate.

One loop trains one run, or a population: runs of one architecture that differ in seed and learning
rate, trained side by side in one compiled program with a leading member axis on every array. Each
member is an ordinary run with its own folder, data order and checkpoints, and may be resumed
alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxformer import config
from jaxformer.config import InputError
from jaxformer.data import Dataset, open_data
from jaxformer.models.params import Params, options_for_one_call
from jaxformer.sharding import use_mesh
from jaxformer.training.experiment import Experiment, check_complete
from jaxformer.training.interrupt import Interrupt, Stopped
from jaxformer.training.malloc import keep_freed_memory
from jaxformer.training.member import Member, Sample, TrainResult
from jaxformer.training.paths import AnyPath
from jaxformer.training.processes import announced, check_equal
from jaxformer.training.report import Clock, Log, open_report, print_line
from jaxformer.training.run import Run
from jaxformer.training.setup import Initial, Setup, check
from jaxformer.training.step import TrainState, compiled_train_step, population_step

VARIED = ('training.seed', 'optimizer.learning_rate', 'run.name', 'run.dir')
"""Fields in which the members of a population may differ."""

Predict = Callable[[jax.stages.Compiled, Mesh], float | None]


def train(
  experiment: Experiment,
  *,
  init_from: str | AnyPath | Params | Initial | None = None,
  dataset: Dataset | None = None,
  devices: Sequence[jax.Device] | None = None,
  utilization: Mapping[str, float] | None = None,
  predict: Predict | None = None,
  sample: Sample | None = None,
  resume_from: int | None = None,
  log: Log = print_line,
) -> TrainResult:
  """Train an experiment in its run folder; resume if the run there has stopped.

  Args:
    experiment: what to train. A run is resumed with the settings that it had, but for those that
      `training.resume_with` changes (see `stages`).
    init_from: where a new run takes its parameters from: a checkpoint (see `checkpoint.find`), or
      parameters by name, which are copied. A run started from parameters is resumed; one started
      from random weights is an error.
    dataset: the data of the experiment, if already open.
    devices: to run on; all by default.
    utilization: metrics (`mfu`) by name, as they would be on one device at one token per second.
    predict: from a compiled step and its mesh, the seconds that it is predicted to take; they are
      reported beside those that it takes.
    sample: its text, in pieces, is added to `samples.txt` after each evaluation.
    resume_from: resume from the checkpoint of this step. Later checkpoints and metrics are moved to
      `undone/` in the run folder. The same call again, with the same `resume_with` and
      `skip_steps`, resumes from the latest checkpoint, so that a preempted run does not go back
      again.
    log: receives lines about progress.

  Raises `InputError` before anything is written if the experiment cannot be run, or the folder
  holds another one."""
  source = Initial.of(init_from)
  with (
    announced(),
    _opened([experiment], devices, dataset, log, source, resume_from) as members,
    use_mesh(members[0].setup.parallel),
  ):
    return _Loop(members, utilization=utilization, predict=predict, sample=sample).run()[0]


def train_population(
  experiments: Sequence[Experiment],
  *,
  dataset: Dataset | None = None,
  devices: Sequence[jax.Device] | None = None,
  log: Log = print_line,
) -> list[TrainResult]:
  """Train experiments that differ in `VARIED` only, in one program; resume each from its own step.

  Every member lives on one device; the members are sharded evenly over as many devices as divide
  their number. A member computes what `train` computes for its experiment on one device, up to the
  rounding of batched products. If the numbers of a member stop being finite it ends, and the others
  continue.

  Args:
    experiments: the members.
    dataset, devices: as in `train`.
    log: receives lines about progress, each with the name of its run.

  Returns one result per member, in order. Raises `InputError` for members that differ in more, have
  equal folders, or cannot be run."""
  _check_population(experiments)
  devices = list(jax.devices() if devices is None else devices)
  parts = max(n for n in range(1, len(devices) + 1) if len(experiments) % n == 0)
  mesh = Mesh(np.asarray(devices[:parts], dtype=object), ('members',), axis_types=(AxisType.Auto,))
  with _opened(experiments, devices[:1], dataset, log) as members:
    return _Loop(members, mesh).run()


def _check_population(experiments: Sequence[Experiment]) -> None:
  """Raises `InputError` if the experiments do not form a population."""
  if not experiments:
    raise InputError('a population needs at least one member')
  if jax.process_count() > 1:
    raise InputError('a population trains in one process; there are several')
  first, *others = experiments
  for e in others:
    differ = config.differences(config.to_json(first), config.to_json(e))
    if other := [d for d in differ if not d.startswith(VARIED)]:
      raise InputError(
        f'members of a population may differ only in {", ".join(VARIED)}; these also differ in '
        f'{"; ".join(other)}'
      )
  if len({(e.run.dir, e.run.name) for e in experiments}) < len(experiments):
    raise InputError('two members of a population have one run folder: give each its own run.name')
  if not first.data.one_shape:
    raise InputError(
      f'data = {first.data.tag}: its batches have several shapes; a population needs a single one'
    )


@contextlib.contextmanager
def _opened(
  experiments: Sequence[Experiment],
  devices: Sequence[jax.Device] | None,
  dataset: Dataset | None,
  log: Log,
  init_from: Initial | None = None,
  resume_from: int | None = None,
) -> Generator[list[Member]]:
  """Open the run folders of experiments; nothing is written before all are known to be usable."""
  runs = [Run(e, resume_from, init_from and init_from.name) for e in experiments]
  experiments = [run.experiment for run in runs]
  check_complete(experiments[0])
  check(experiments[0], devices)
  data = dataset or open_data(experiments[0].data, log=log)
  check_equal({'data': data.identity})
  setups = [Setup.of(e, data, devices, r.schedule) for e, r in zip(experiments, runs, strict=True)]
  if len({run.schedule for run in runs}) > 1:
    raise InputError('schedule.warmup', None, problem='the members began with different warm-ups')
  if setups[0].parallel.platform == 'cpu':
    keep_freed_memory()
  with contextlib.ExitStack() as stack:
    members = [
      Member(s, r, log if len(runs) == 1 else functools.partial(_prefix, log, r))
      for s, r in zip(setups, runs, strict=True)
    ]
    if init_from is not None:
      for m in members:
        m.initialize_from(init_from)
    for m in sorted(members, key=lambda m: m.run.fresh):  # new folders once nothing can fail
      stack.enter_context(m.run)
      m.run.lock(m.log)
      stack.enter_context(m.checkpoints)
      m.restore()
    for m in members:
      m.run.start(data.manifest, data.tokenizer)
      m.report = stack.enter_context(open_report(m.run, m.setup.experiment, m.log, m.step))
    yield members


def _prefix(log: Log, run: Run, line: str) -> None:
  log(f'{run.name} | {line}')


class _Loop:
  """Steps of all members, and what happens between them.

  `mesh` is that of a population: every array has a leading axis of members, sharded over the mesh's
  axis `members`. It is None for a single run, whose arrays have no such axis."""

  def __init__(
    self,
    members: list[Member],
    mesh: Mesh | None = None,
    utilization: Mapping[str, float] | None = None,
    predict: Predict | None = None,
    sample: Sample | None = None,
  ):
    self.members, self.mesh = members, mesh
    for m in members:
      m.sample = sample
    self.setup, self.clock = members[0].setup, Clock()
    self.utilization, self.predict = utilization or {}, predict
    self.predicted: float | None = None  # seconds of the latest step that was compiled
    self.compiled: dict[Any, Any] = {}  # steps, by the shapes of a batch
    self.has_evaluated = False
    self.batches: list[Any] = [None] * len(members)  # the latest of each member

  def run(self) -> list[TrainResult]:
    members = self.members
    states = [m.begin() for m in members]
    state = states[0]
    if self.mesh is not None:
      state = self._put(_for_one_call(_stacked, states[0])(*states))
    del states
    rates = [m.setup.experiment.optimizer.learning_rate for m in members]
    learning_rates = None if self.mesh is None else self._put(np.array(rates, np.float32))
    pending: Any = None
    with (
      contextlib.ExitStack() as stack,
      Interrupt() as interrupt,
      _profiler(
        members[0].config.profile, members[0].run.home / 'profile', members[0].log
      ) as profile,
    ):
      if any(m.code is None and m.unevaluated for m in members):  # as when they were stopped
        self._between(state, interrupt)
      feeds = [stack.enter_context(m.batches()) if m.code is None else iter(()) for m in members]
      while running := [m for m in members if m.code is None]:
        if any(m.skips for m in running):
          self._report(pending)
          pending, state = None, self._skipped(state)
          continue
        batch = self._next_batch(feeds)
        active = [m.code is None for m in members]
        more = () if self.mesh is None else (learning_rates, self._put(np.array(active)))
        step = self._compiled(state, batch, *more)
        profile(members[0].step)
        with jax.transfer_guard('disallow'):
          state, metrics = step(state, batch, *more)
        # The previous step has finished by the time that this one is dispatched, so reading its
        # metrics leaves no gap.
        self._report(pending)
        running = [m for m in running if m.code is None]
        for m in running:
          m.step += 1
          m.tokens += batch.targets_BT.size // len(members)
        stop = interrupt.requested()
        pending = metrics
        if stop or any(m.unsaved or m.unevaluated for m in running):
          self._report(pending)
          pending = None
          self._between(state, interrupt, stop)
    return [m.result for m in members]

  def _skipped(self, state: TrainState) -> TrainState:
    """Pass over the steps to skip."""
    for m in self.members:
      if m.code is None and m.skips:
        m.skip()
    steps = [m.step for m in self.members]
    if self.mesh is not None:
      return dataclasses.replace(state, step=self._put(np.array(steps, np.int32)))
    step = jax.jit(lambda: jnp.int32(steps[0]), out_shardings=state.step.sharding)()
    return dataclasses.replace(state, step=step)

  def _put(self, tree: Any) -> Any:
    """Shard arrays with a member axis over the devices."""
    assert self.mesh is not None
    return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec('members')))

  def _next_batch(self, feeds: list[Iterator[Any]]) -> Any:
    """Return the next batch of every member on the devices. A member that has ended gets its
    previous batch, or that of another member, which has no effect."""
    old = self.batches
    self.batches = [
      next(feed) if m.code is None else batch
      for m, feed, batch in zip(self.members, feeds, old, strict=True)
    ]
    if self.mesh is None:
      return self.setup.placement(self.batches[0])
    some = next(b for b in self.batches if b is not None)
    filled = [some if b is None else b for b in self.batches]
    return self._put(jax.tree.map(lambda *x: np.stack(x), *filled))

  def _compiled(self, state: TrainState, batch: Any, *more: Any) -> Any:
    """Return the step for the shapes of this batch, compiled ahead of time so that no measurement
    includes its compilation."""
    shapes = tuple(x.shape for x in jax.tree.leaves(batch))
    if shapes not in self.compiled:
      with self.clock.paused():
        s, began = self.setup, time.perf_counter()
        if self.mesh is None:
          step = compiled_train_step(s.definition, s.optimizer, s.step_config, s.parallel)
        else:
          step = population_step(s.definition, s.optimizer, s.step_config, self.mesh)
        self.members[0].log('compiling the step')
        self.compiled[shapes] = step.lower(state, batch, *more).compile()
        seconds = time.perf_counter() - began
        self.predicted = self._prediction(self.compiled[shapes])
        for m in self.members:
          m.run.event(
            'compile',
            seconds=round(seconds, 3),
            shapes=shapes,
            members=len(self.members),
            options=s.step_config.compiler_options,
            predicted_step_seconds=self.predicted,
          )
        self.members[0].log(f'compiled the step in {seconds:.1f} s')
    return self.compiled[shapes]

  def _prediction(self, step: jax.stages.Compiled) -> float | None:
    """Return the seconds that a step is predicted to take, None if nothing predicts it."""
    if self.predict is None:
      return None
    mesh = self.mesh or self.setup.parallel.mesh
    assert isinstance(mesh, Mesh)  # of devices
    try:
      return self.predict(step, mesh)
    except Exception as e:  # a text that the clock cannot read must not end a training
      self.members[0].log(f'warning: no predicted time of a step: {type(e).__name__}: {e}')
      return None

  def _report(self, metrics: Any) -> None:
    """Report the metrics of the latest step, which it waits for."""
    if metrics is None:
      return
    values, seconds = jax.device_get(metrics), self.clock.seconds
    for i, m in enumerate(self.members):
      if m.code is None:
        one = {n: (v if self.mesh is None else v[i]).item() for n, v in values.items()}
        m.report_step(one, seconds, self.utilization, self.predicted)

  def _between(self, state: TrainState, interrupt: Interrupt, stop: bool = False) -> None:
    """Save and evaluate the members that are due; to stop, save all and end. The clock is
    paused."""

    def each(wanted: Callable[[Member], bool]) -> Iterator[tuple[Member, TrainState]]:
      for i, m in enumerate(self.members):
        if m.code is None and wanted(m):
          yield m, self._member_state(state, i)

    with self.clock.paused():
      for m, one in each(lambda m: stop or m.unsaved):
        m.save(one)
      if not stop:
        self._announce_evaluation()
      try:
        for m, one in each(lambda m: m.unevaluated and not stop):
          m.evaluate(one.params, interrupt)
      except Stopped:
        stop = True
        for m, one in each(lambda m: True):
          m.save(one)
      for m in self.members:
        if m.code is None and (stop or m.step >= m.config.steps):
          m.end(interrupt.signal)

  def _announce_evaluation(self) -> None:
    """Say that the first evaluation, if it is due, is compiled."""
    first = self.members[0]
    if not self.has_evaluated and any(m.code is None and m.unevaluated for m in self.members):
      self.has_evaluated = True
      first.log('compiling the evaluation' + (' and the sample' if first.sample else ''))

  def _member_state(self, state: TrainState, i: int) -> TrainState:
    if self.mesh is None:
      return state
    one = _for_one_call(_member, state)(state, i)
    return jax.device_put(one, self.setup.parallel.mesh.devices.flat[0])


def _stacked(*states: TrainState) -> TrainState:
  """States of several runs as one with a member axis."""
  return jax.tree.map(lambda *x: jnp.stack(x), *states)


def _member(states: TrainState, i: int) -> TrainState:
  """One of the states."""
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), states)


@functools.lru_cache
def _jitted(function: Callable[..., TrainState], device: jax.Device) -> jax.stages.Wrapped:
  return jax.jit(function, compiler_options=options_for_one_call(device))


def _for_one_call(function: Callable[..., TrainState], state: TrainState) -> jax.stages.Wrapped:
  """The function of states as a single program, where there would be one per shape of an array."""
  return _jitted(function, next(iter(state.step.devices())))


@contextlib.contextmanager
def _profiler(
  window: tuple[int, int] | None, folder: Path, log: Log
) -> Generator[Callable[[int], None]]:
  """Yield a function to call with each step before it is dispatched, which records the steps of the
  window with the profiler. One that fails is a warning."""
  running = False

  def switch() -> None:
    nonlocal running
    running = not running
    try:
      jax.profiler.start_trace(str(folder)) if running else jax.profiler.stop_trace()
    except Exception as e:  # of the profiler, as for a full disk
      running = False
      log(f'warning: {folder} has no complete profile ({" ".join(str(e).split())[:300]})')

  def at(step: int) -> None:
    if window is not None and step in window and running == (step == window[1]):
      switch()

  try:
    yield at
  finally:
    if running:
      switch()
