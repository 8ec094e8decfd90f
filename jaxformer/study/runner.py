"""Run a study: tune every entry equally, then train its seeds. Every run is an ordinary run folder,
so an interrupted study resumes, and several processes share the work by file locks."""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxformer.config import InputError
from jaxformer.data import Dataset, DatasetConfig
from jaxformer.exit_codes import PREEMPTED
from jaxformer.models.model import ModelConfig
from jaxformer.planning.cost import flops_per_token
from jaxformer.study.sharing import Interrupted, shared
from jaxformer.study.sizing import measure
from jaxformer.study.study import Entry, Log, Study
from jaxformer.task_type import TRANSLATION
from jaxformer.training import Experiment, read_metrics, train, train_population
from jaxformer.training.experiment import check_fit
from jaxformer.training.interrupt import Interrupt
from jaxformer.training.rows import read_events
from jaxformer.training.run import is_of, run_folder


@dataclasses.dataclass(frozen=True)
class Planned:
  """An entry at one size and number of tokens, before training.

  Attributes:
    study: the study of this size alone.
    entry, task, model: what is trained on what.
    size: the model's value of `study.match`.
    label: names the size in progress lines.
    flops: training FLOPs of the budget; None outside a scaling study.
    flops_per_token: training FLOPs per token, counted in a scaling study.
    held_out: whether the budget is excluded from the fit.
    passes: how often the training text is read; None where the data do not repeat.
  """

  study: Study
  entry: Entry
  task: DatasetConfig
  model: ModelConfig
  size: float
  label: str
  flops: float | None = None
  flops_per_token: float = 0.0
  held_out: bool = False
  passes: float | None = None


@dataclasses.dataclass(frozen=True)
class Trial:
  """One finished run of a study.

  Attributes:
    rate, seed: of the run.
    folder: its run folder.
    loss: held-out loss, nats per target; infinite for a run that diverged.
    metrics: latest value of each metric.
  """

  rate: float
  seed: int
  folder: str
  loss: float
  metrics: dict[str, Any]

  @property
  def finite_loss(self) -> float | None:
    """None for a run that diverged."""
    return self.loss if math.isfinite(self.loss) else None


@dataclasses.dataclass(frozen=True)
class Tuned:
  """Result of one entry at one size on one task.

  Attributes:
    planned: what was trained.
    trials: runs of the tuning seed, in ascending order of learning rates; empty for a single rate.
    rate: the best rate.
    at_edge: whether it lies at an end of the grid, so that a better one may lie beyond.
    runs: one per seed, at the best rate.
  """

  planned: Planned
  trials: tuple[Trial, ...]
  rate: float
  at_edge: bool
  runs: tuple[Trial, ...]

  @property
  def title(self) -> str:
    return self.planned.entry.title

  @property
  def model(self) -> ModelConfig:
    return self.planned.model

  @property
  def folder_names(self) -> tuple[str, ...]:
    """Names of the run folders."""
    return tuple(Path(r.folder).name for r in self.runs)


Trained = dict[str, tuple[Tuned, ...]]
"""Task title -> results of all entries, in the order of the study; in a scaling study, of all their
sizes."""


def run_study(
  study: Study,
  log: Log,
  interrupt: Interrupt,
  each: Callable[[str, Dataset, Tuned], None] = lambda title, dataset, tuned: None,
) -> Trained:
  """Train what is not trained yet and return all results. Raises `Interrupted` after a signal, when
  the current run is saved.

  Several processes may run the same study at once, on one machine or on machines that share its
  folder: each trains entries that no other is training, and all wait for the last. The results do
  not depend on interruptions or on the number of processes.

  Args:
    each: called with the task's title, its dataset and the result of an entry, while no other
      process works on that entry.
  """
  datasets = study.open_tasks(log)
  plans = {  # before any training: an unreachable size is an error at once
    (title, entry.title): _plan(study, entry, title, dataset, log)
    for title, dataset in datasets.items()
    for entry in study.entries
  }

  def job(title: str, name: str) -> tuple[Tuned, ...]:
    dataset = datasets[title]
    found = Runner(dataset, interrupt, log).all_tuned(study, plans[title, name])
    for tuned in found:
      each(title, dataset, tuned)
    return found

  jobs = {key: functools.partial(job, *key) for key in plans}
  done = shared(study.folder / 'locks', jobs, interrupt)
  return {
    title: tuple(t for entry in study.entries for t in done[title, entry.title])
    for title in datasets
  }


def _plan(
  study: Study, entry: Entry, title: str, dataset: Dataset, log: Log
) -> tuple[Planned, ...]:
  if dataset.vocab_size is None:
    raise InputError('Study.tasks', title, 'a task of tokens')
  if study.scaling is not None:
    planned = tuple(_plan_budgets(study, entry, dataset))
    for p in planned:
      held_out = ' held out' if p.held_out else ''
      log(f'{entry.title} | {p.label}{held_out} x {p.study.tokens:,} tokens')
    return planned
  p = _planned(study, entry, title, dataset)
  error = p.size / study.target - 1
  log(f'{title} | {entry.title} | {p.size:,.0f} {study.match} ({error:+.2%})')
  return (p,)


def _planned(study: Study, entry: Entry, label: str, dataset: Dataset) -> Planned:
  task, sizes = dataset.config, (dataset.vocab_size, dataset.source_vocab_size)
  assert sizes[0] is not None
  model = entry.model(study, sizes[0], task.max_len, sizes[1])
  check_fit(model, task, *sizes)
  return Planned(study, entry, task, model, measure(model, study.match), label)


def _plan_budgets(study: Study, entry: Entry, dataset: Dataset) -> Iterator[Planned]:
  """Yield every size at every budget. Raises `InputError` for budgets that cannot be trained, and
  where two sizes of a budget round to the same model."""
  scaling, task = study.scaling, dataset.config
  assert scaling is not None
  if task.task == TRANSLATION:
    raise InputError(
      'Study.tasks', task.tag, 'no source-target pairs with scaling: their FLOPs per token vary'
    )
  batch, seen = study.batch_size * task.positions, dict[tuple[float, ModelConfig], float]()
  for budget in (*scaling.budgets, *scaling.held_out):
    for target in budget.params:
      p = _planned(study.at(target, batch), entry, '', dataset)
      per_token = flops_per_token(p.model, task.positions)
      tokens = round(budget.flops / per_token / batch) * batch
      if not tokens:
        raise InputError(
          'ScalingGrid.budgets',
          f'{budget.flops:g} FLOPs',
          f'at least {per_token * batch:.3g}, one batch of {entry.title} at {target:g} '
          f'{study.match}; or use a smaller size or batch',
        )
      if (budget.flops, p.model) in seen:
        raise InputError(
          'ScalingGrid.budgets',
          f'sizes {seen[budget.flops, p.model]:g} and {target:g} at {budget.flops:g} FLOPs',
          f'further apart: both round to the same {entry.title} of {p.size:,.0f}',
        )
      seen[budget.flops, p.model] = target
      yield dataclasses.replace(
        p,
        study=study.at(target, tokens),
        label=f'{budget.flops:.3g} FLOPs, {p.size:,.0f} {study.match}',
        flops=budget.flops,
        flops_per_token=per_token,
        held_out=budget.flops > scaling.budgets[-1].flops,
        passes=None if dataset.train_tokens is None else tokens / dataset.train_tokens,
      )


def _quiet(line: str) -> None:
  """Print nothing."""


def finished_part(study: Study) -> Study:
  """Return the study with only those entries whose runs are all finished. Raises `InputError` if
  there are none."""
  datasets = study.open_tasks()

  def is_done(entry: Entry) -> bool:
    try:
      for title, dataset in datasets.items():
        runner = Runner(dataset, Interrupt(), _quiet, may_train=False)
        runner.all_tuned(study, _plan(study, entry, title, dataset, _quiet))
    except Interrupted:
      return False
    return True

  entries = tuple(e for e in study.entries if is_done(e))
  if not entries:
    raise InputError(
      f'{study.folder}: no architecture of the study has finished all its runs; `jaxformer '
      'compare` trains them'
    )
  return study.replace(entries=entries)


@dataclasses.dataclass(frozen=True)
class Runner:
  """Trains what is not trained yet on one dataset. With `may_train` False it raises `Interrupted`
  where a run is missing."""

  dataset: Dataset
  interrupt: Interrupt
  log: Log
  may_train: bool = True

  def all_tuned(self, study: Study, planned: Sequence[Planned]) -> tuple[Tuned, ...]:
    """Tune and train an entry at all its sizes."""
    if study.scaling is None or study.scaling.rate_exponent is None:
      return tuple(self.tuned(p, study.learning_rates) for p in planned)
    # the best rate at the middle size of the smallest budget holds for the others too
    smallest = [p for p in planned if p.flops == planned[0].flops]
    start = smallest[len(smallest) // 2]
    best = self.tuned(start, study.learning_rates)
    found = []
    for p in planned:
      growth = (p.flops or 0.0) / (start.flops or 1.0)
      rate = best.rate if growth == 1 else study.scaling.rate(best.rate, growth)
      found.append(best if p is start else self.tuned(p, (rate,)))
    return tuple(found)

  def tuned(self, p: Planned, rates: Sequence[float]) -> Tuned:
    """Choose the best learning rate by the tuning seed, then train the seeds."""

    def run(rates: Sequence[float], seeds: Sequence[int]) -> tuple[Trial, ...]:
      pairs = itertools.product(rates, seeds)
      return self.trained(
        p, [p.study.experiment(p.entry, p.model, self.dataset, *pair) for pair in pairs]
      )

    trials, best, beyond = [], rates[0], rates if len(rates) > 1 else ()
    for _ in range(1 + p.study.max_grid_extensions):
      trials = sorted([*trials, *run(beyond, (p.study.tuning_seed,))], key=lambda t: t.rate)
      if trials:
        best = min(trials, key=lambda t: t.loss).rate
      beyond = _beyond([t.rate for t in trials], best)
    at_edge = bool(trials) and best in (trials[0].rate, trials[-1].rate)
    return Tuned(p, tuple(trials), best, at_edge, run((best,), p.study.seeds))

  def trained(self, p: Planned, experiments: Sequence[Experiment]) -> tuple[Trial, ...]:
    """Run experiments with one model, `runs_per_program` at a time."""
    found: list[Trial] = []
    size = p.study.runs_per_program if self.dataset.config.one_shape else 1
    for i in range(0, len(experiments), size):
      group, spent = experiments[i : i + size], 'finished before'
      # Finished members are run again too: in a population of another size sums round otherwise.
      if any(finished(e) is None for e in group):
        if not self.may_train or self.interrupt.signal is not None:
          raise Interrupted
        runs = f'{len(group)} runs in one program' if len(group) > 1 else '1 run'
        self.log(f'{p.label} | {p.entry.title} | compiling, then training {runs}')
        began = time.perf_counter()
        self._train(group)
        spent = f'{time.perf_counter() - began:.1f} s' + (
          f' for {len(group)} runs in one program' if len(group) > 1 else ''
        )
      for t in map(_trial, group):
        self.log(
          f'{p.label} | {p.entry.title} | rate {t.rate:g} | seed {t.seed} | '
          f'{score_text(t.metrics)} | {spent}'
        )
        found.append(t)
    return tuple(found)

  def _train(self, group: Sequence[Experiment]) -> None:
    results = (
      [train(group[0], dataset=self.dataset, log=_quiet)]
      if len(group) == 1
      else train_population(group, dataset=self.dataset, log=_quiet)
    )
    if self.interrupt.signal is not None or any(r.exit_code == PREEMPTED for r in results):
      raise Interrupted


def finished(experiment: Experiment) -> Trial | None:
  """Return the run of an experiment if it is finished or has diverged, else None."""
  folder = run_folder(experiment)
  if not is_of(folder, experiment):
    return None
  ends = [
    row['event']
    for row in read_events(folder)
    if row['event'] in ('start', 'resume', 'done', 'not_finite')
  ]
  return _trial(experiment) if ends and ends[-1] in ('done', 'not_finite') else None


def _trial(experiment: Experiment) -> Trial:
  folder, last = run_folder(experiment), {}
  for row in read_metrics(folder):
    last |= row
  loss = last.get('eval/loss')
  return Trial(
    experiment.optimizer.learning_rate,
    experiment.training.seed,
    str(folder),
    math.inf if loss is None else float(loss),
    last,
  )


def score_text(metrics: dict[str, Any]) -> str:
  """Format the score of a run."""
  if metrics.get('eval/loss') is None:
    return 'diverged'
  bits = metrics.get('eval/bits_per_byte')
  return f'accuracy {metrics["eval/accuracy"]:.1%}' if bits is None else f'{bits:.4f} bits per byte'


def _beyond(rates: Sequence[float], best: float) -> tuple[float, ...]:
  """Return the next rate beyond the end of the grid at which the best lies, by the grid's own
  ratio; none if the best lies inside."""
  if len(rates) < 2 or best not in (rates[0], rates[-1]):
    return ()
  end, inner = (rates[0], rates[1]) if best == rates[0] else (rates[-1], rates[-2])
  return (float(f'{end * end / inner:.3g}'),)
