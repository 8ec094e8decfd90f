"""Runs a study: every entry tuned alike, then its seeds; each run an ordinary run folder, so that a
study that was killed goes on where it was, and several processes share the work by locks on
files."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from jaxformer import config
from jaxformer.config import InputError
from jaxformer.data import Dataset, DatasetConfig, open_data
from jaxformer.exit_codes import PREEMPTED
from jaxformer.models.model import ModelConfig
from jaxformer.study.sharing import Interrupted, shared
from jaxformer.study.sizing import measure
from jaxformer.study.study import Entry, Study, file_name
from jaxformer.training import Experiment, read_metrics, train, train_population
from jaxformer.training.experiment import check_fit
from jaxformer.training.interrupt import Interrupt
from jaxformer.training.run import read_events, run_folder

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Trial:
  """One run of a study.

  Attributes:
    rate, seed: of the run.
    folder: its run folder.
    loss: held-out, nats a target; infinite where its numbers stopped being finite.
    metrics: the newest value of each metric.
  """

  rate: float
  seed: int
  folder: str
  loss: float
  metrics: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tuned:
  """What came of one entry on one task.

  Attributes:
    title: of the entry.
    model: as it was trained.
    trials: the grid, in ascending order of rates, with the tuning seed; none where there was but
      one rate.
    rate: the best of them.
    at_edge: whether it still lies at an end of the grid, so that a better one may lie beyond.
    runs: at the best rate, a seed each.
  """

  title: str
  model: ModelConfig
  trials: tuple[Trial, ...]
  rate: float
  at_edge: bool
  runs: tuple[Trial, ...]


@dataclasses.dataclass(frozen=True)
class Finished:
  """A study's results: task -> what came of each entry on it, in the order of the study."""

  study: Study
  results: dict[str, tuple[Tuned, ...]]


def run_study(
  study: Study,
  log: Log,
  interrupt: Interrupt,
  each: Callable[[str, Dataset, Tuned], None] | None = None,
) -> Finished:
  """Trains what is not trained yet, and gathers all. Raises `Interrupted` after a signal, when what
  was running is saved.

  Several processes may run the same study at once, here or on machines that share its folder: each
  trains what no other is training, and waits for the others at the end. The same study gives the
  same numbers however often it was interrupted, and by however many.

  Args:
    each: is called with the task's title, its data and what came of an entry, while no other
      process works at that entry.
  """
  models, jobs = {}, {}
  datasets = [open_data(task, log=log) for task in study.tasks]
  for title, task, dataset in zip(study.task_titles, study.tasks, datasets, strict=True):
    if dataset.vocab_size is None:
      raise InputError(f'Study.tasks: {title} has no tokens; a study compares models of tokens')
    for entry in study.entries:  # before any trains: a size that cannot be met is known at once
      model = models[title, entry.title] = entry.model(
        study, dataset.vocab_size, task.max_len, dataset.source_vocab_size
      )
      check_fit(model, task, dataset.vocab_size, dataset.source_vocab_size)
      value = measure(model, study.match)
      log(f'{title} | {entry.title} | {value:,.0f} {study.match} ({value / study.target - 1:+.2%})')
  for title, task, dataset in zip(study.task_titles, study.tasks, datasets, strict=True):
    runner = Runner(study, title, dataset, interrupt, log)
    for entry in study.entries:
      jobs[file_name(f'{title}-{entry.title}')] = functools.partial(
        _job, runner, entry, models[title, entry.title], task, each
      )
  done = iter(shared(study.folder / 'locks', jobs, interrupt).values())
  return Finished(
    study, {title: tuple(next(done) for _ in study.entries) for title in study.task_titles}
  )


def _job(
  runner: Runner,
  entry: Entry,
  model: ModelConfig,
  task: DatasetConfig,
  each: Callable[[str, Dataset, Tuned], None] | None,
) -> Tuned:
  tuned = runner.tuned(entry, model, task)
  if each is not None:
    each(runner.where, runner.dataset, tuned)
  return tuned


def finished_part(study: Study) -> Study:
  """The study with those of its entries whose every run is done. Raises `InputError` where there
  are none."""
  opened = [
    (title, task, open_data(task))
    for title, task in zip(study.task_titles, study.tasks, strict=True)
  ]

  def is_done(entry: Entry) -> bool:
    for title, task, dataset in opened:
      assert dataset.vocab_size is not None
      try:
        _Reader(study, title, dataset, Interrupt(), lambda line: None).tuned(
          entry,
          entry.model(study, dataset.vocab_size, task.max_len, dataset.source_vocab_size),
          task,
        )
      except _Unfinished:
        return False
    return True

  entries = tuple(e for e in study.entries if is_done(e))
  if not entries:
    raise InputError(
      f'{study.folder}: no architecture of the study has all its runs done; `jaxformer compare` '
      'trains them'
    )
  return study.replace(entries=entries)


class Runner:
  """Trains what is not trained yet of one entry on one task."""

  def __init__(self, study: Study, where: str, dataset: Dataset, interrupt: Interrupt, log: Log):
    self.study, self.where, self.dataset, self.interrupt, self.log = (
      study,
      where,
      dataset,
      interrupt,
      log,
    )

  def tuned(self, entry: Entry, model: ModelConfig, task: DatasetConfig) -> Tuned:
    s = self.study

    def run(pairs: Sequence[tuple[float, int]]) -> list[Trial]:
      return self.trained(
        entry.title, [s.experiment(entry, model, task, rate, seed) for rate, seed in pairs]
      )

    trials: dict[float, Trial] = {}
    best = s.learning_rates[0]
    if len(s.learning_rates) > 1:
      trials = {t.rate: t for t in run([(rate, s.tuning_seed) for rate in s.learning_rates])}
      for _ in range(s.extensions):
        beyond = _beyond(sorted(trials), _best(trials))
        if beyond is None:
          break
        trials |= {t.rate: t for t in run([(beyond, s.tuning_seed)])}
      best = _best(trials)
    rates = sorted(trials)
    return Tuned(
      entry.title,
      model,
      tuple(trials[r] for r in rates),
      best,
      len(rates) > 1 and best in (rates[0], rates[-1]),
      tuple(run([(best, seed) for seed in s.seeds])),
    )

  def trained(self, title: str, experiments: Sequence[Experiment]) -> list[Trial]:
    """The runs of experiments of one model, `together` at a time."""
    found: list[Trial] = []
    for group in _batched(experiments, self.study.together if self.dataset.config.one_shape else 1):
      done = [finished(e) for e in group]
      # those that are done go along: in a population of another size sums round otherwise
      if any(t is None for t in done):
        began = time.perf_counter()
        self._train(group)
        done = [_trial(e) for e in group]
        spent = f'{time.perf_counter() - began:.1f} s' + (
          f' for {len(group)} together' if len(group) > 1 else ''
        )
      else:
        spent = 'done before'
      for t in done:
        assert t is not None
        self.log(
          f'{self.where} | {title} | rate {t.rate:g} | seed {t.seed} | {score_text(t.metrics)} | '
          f'{spent}'
        )
        found.append(t)
    return found

  def _train(self, group: Sequence[Experiment]) -> None:
    if self.interrupt.signal is None:

      def quiet(line: str) -> None:
        """One line a run is enough."""

      alone = len(group) == 1
      results = (
        [train(group[0], dataset=self.dataset, log=quiet)]
        if alone
        else train_population(group, dataset=self.dataset, log=quiet)
      )
      if all(r.exit_code != PREEMPTED for r in results) and self.interrupt.signal is None:
        return
    raise Interrupted


class _Unfinished(Exception):
  """A run is not done."""


class _Reader(Runner):
  """Gathers what is done, and trains nothing."""

  def _train(self, group: Sequence[Experiment]) -> None:
    raise _Unfinished


def finished(experiment: Experiment) -> Trial | None:
  """The run of an experiment if it has come to its end, be it that its numbers stopped being
  finite."""
  folder = run_folder(experiment)
  file = folder / 'config.json'
  if not file.exists() or file.read_text() != config.text(experiment):
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
  """What a run is judged by, for a reader."""
  if metrics.get('eval/loss') is None:
    return 'diverged'
  bits = metrics.get('eval/bits_per_byte')
  return f'accuracy {metrics["eval/accuracy"]:.1%}' if bits is None else f'{bits:.4f} bits per byte'


def _best(trials: dict[float, Trial]) -> float:
  return min(trials, key=lambda rate: (trials[rate].loss, rate))


def _beyond(rates: list[float], best: float) -> float | None:
  """The next rate outside a grid at whose end the best lies, in the grid's own ratio; None inside
  it."""
  if best not in (rates[0], rates[-1]):
    return None
  beyond = rates[0] ** 2 / rates[1] if best == rates[0] else rates[-1] ** 2 / rates[-2]
  return float(f'{beyond:.3g}')


def _batched(values: Sequence[Any], n: int) -> list[Sequence[Any]]:
  return [values[i : i + n] for i in range(0, len(values), n)]
