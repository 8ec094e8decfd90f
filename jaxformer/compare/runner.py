"""Runs a study: every entry tuned alike, then its seeds; each run an ordinary run folder, so that a study that was killed goes on
where it was."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxformer.compare.study import Entry, Study
from jaxformer.config import InputError
from jaxformer.data import Dataset, DatasetConfig, open_data
from jaxformer.models.language_model import ModelConfig
from jaxformer.training import Experiment, TrainResult, train
from jaxformer.training.loop import DONE, INTERRUPTED
from jaxformer.training.population import train_population

Log = Callable[[str], None]


class Interrupted(Exception):
  """A run was interrupted and saved; the same study goes on from there."""


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
    trials: the grid, in ascending order of rates, with the tuning seed.
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


def run_study(study: Study, log: Log) -> Finished:
  """Trains what is not trained yet, and gathers all. Raises `Interrupted` after a signal, when what was running is saved."""
  results = {}
  for task in study.tasks:
    dataset = open_data(task, log=log)
    if dataset.vocab_size is None:
      raise InputError(f'Study.tasks: {task.tag} asks for classes of features; a study compares models of tokens')
    found = []
    for entry in study.entries:
      model = entry.model(study, dataset.vocab_size, task.positions)
      log(f'{task.tag}: {entry.title}')
      found.append(_tuned(study, entry, model, task, dataset, log))
    results[task.tag] = tuple(found)
  return Finished(study, results)


def _tuned(study: Study, entry: Entry, model: ModelConfig, task: DatasetConfig, dataset: Dataset, log: Log) -> Tuned:
  def run(pairs: Sequence[tuple[float, int]]) -> list[Trial]:
    return _trained([study.experiment(entry, model, task, rate, seed) for rate, seed in pairs], dataset, study.together, log)

  trials = {t.rate: t for t in run([(rate, study.tuning_seed) for rate in study.learning_rates])}
  for _ in range(study.extensions):
    beyond = _beyond(sorted(trials), _best(trials))
    if beyond is None:
      break
    log(f'{entry.title}: the best rate lies at an end of the grid; trying {beyond:g} too')
    trials |= {t.rate: t for t in run([(beyond, study.tuning_seed)])}
  rates, best = sorted(trials), _best(trials)
  return Tuned(
    entry.title, model, tuple(trials[r] for r in rates), best, len(rates) > 1 and best in (rates[0], rates[-1]),
    tuple(run([(best, seed) for seed in study.seeds])))


def _best(trials: dict[float, Trial]) -> float:
  return min(trials, key=lambda rate: (trials[rate].loss, rate))


def _beyond(rates: list[float], best: float) -> float | None:
  """The next rate outside a grid at whose end the best lies, in the grid's own ratio; None inside it, and for a grid of one."""
  if len(rates) < 2 or best not in (rates[0], rates[-1]):
    return None
  beyond = rates[0] ** 2 / rates[1] if best == rates[0] else rates[-1] ** 2 / rates[-2]
  return float(f'{beyond:.3g}')


def _trained(experiments: Sequence[Experiment], dataset: Dataset, together: int, log: Log) -> list[Trial]:
  """The runs of experiments of one model, `together` at a time."""
  results: list[TrainResult] = []
  for group in _batched(experiments, together):
    alone = len(group) == 1
    done = [train(group[0], dataset=dataset, log=log)] if alone else train_population(group, dataset=dataset, log=log)
    results += done
    if any(r.exit_code == INTERRUPTED for r in done):
      raise Interrupted
  return [
    Trial(e.optimizer.learning_rate, e.training.seed, str(r.folder), _loss(r), r.metrics)
    for e, r in zip(experiments, results, strict=True)]


def _batched(values: Sequence[Any], n: int) -> list[Sequence[Any]]:
  return [values[i : i + n] for i in range(0, len(values), n)]


def _loss(result: TrainResult) -> float:
  loss = result.metrics.get('eval/loss')
  return math.inf if result.exit_code != DONE or loss is None else float(loss)
