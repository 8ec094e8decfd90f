"""A scaling study: sizes of each architecture trained at several numbers of training FLOPs, from
which the loss of larger runs is foretold (Hoffmann et al. 2022). Every training of it is a `Study`
of one architecture, and runs as that does."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from jaxformer.config import Config, InputError
from jaxformer.data import DataConfig, Dataset, DatasetConfig, open_data
from jaxformer.models.model import ModelConfig
from jaxformer.planning.cost import flops_per_token
from jaxformer.study.runner import Log, Runner, Tuned
from jaxformer.study.sharing import shared
from jaxformer.study.sizing import measure
from jaxformer.study.study import AsIs, Entry, Study, file_name
from jaxformer.task_type import TRANSLATION
from jaxformer.training import AdamW, Cosine, OptimizerConfig, ScheduleConfig
from jaxformer.training.interrupt import Interrupt

PARABOLA = 3  # sizes that one needs


class RateRule(Config, abstract=True):
  """Where the learning rate of a training comes from."""

  def rates(
    self, grid: tuple[float, ...], best: Callable[[], float], growth: float
  ) -> tuple[float, ...]:
    """The rates to try at `growth` times the FLOPs of the least budget. `best` tunes at the middle
    size of that, by the grid."""
    raise NotImplementedError


class TriedAtEach(RateRule):
  """The whole grid at each size and budget: so many times the cost, and no assumption."""

  def rates(self, grid, best, growth):
    return grid


class Transferred(RateRule):
  """The grid is tried at the middle size of the least budget C0 alone; the rate of every training
  of C FLOPs is the best one x (C / C0)^exponent. The exponent is that of Bi et al. 2024 (DeepSeek
  LLM, section 3.1), where the rate depends on C alone."""

  exponent: float = -0.125

  def rates(self, grid, best, growth):
    return (best() if growth == 1 else float(f'{best() * growth**self.exponent:.3g}'),)


class Budget(Config):
  """Trainings of equal FLOPs.

  Attributes:
    flops: training FLOPs of each, attention counted causally; tokens are `flops` over the FLOPs a
      token of the model.
    params: the sizes.
  """

  flops: float
  params: tuple[float, ...]

  def validate(self):
    self.require(self.flops > 0, 'flops', 'positive')
    self.require(
      len(self.params) > 0 and all(n > 0 for n in self.params), 'params', 'positive, at least one'
    )
    self.require(
      list(self.params) == sorted(set(self.params)), 'params', 'in ascending order, each once'
    )


def budgets(
  flops: Sequence[float], params: Sequence[float], growth: float = 0.5
) -> tuple[Budget, ...]:
  """Budgets whose sizes are `params` at the first and grow with (FLOPs / those of the
  first)^growth, as the best sizes do: about as the root (Hoffmann et al. 2022)."""
  return tuple(
    Budget(flops=c, params=tuple(float(f'{n * (c / flops[0]) ** growth:.3g}') for n in params))
    for c in flops
  )


class ScalingStudy(Config):
  """How the loss of each architecture falls with parameters and tokens.

  Attributes:
    name: of the study; its runs are in `dir`/`name`.
    entries: the architectures; each gets a law of its own.
    budgets: what the laws are fitted to, from the least FLOPs to the most.
    held_out: larger budgets, which no law is fitted to: what was foretold for them is compared to
      what came.
    match: what a size is.
    tolerance: how far a size may be off. The law is fitted to the sizes as they are.
    task: what all train and are scored on.
    batch_size: sequences an update.
    optimizer, schedule: the same for all; the learning rate comes from the grid.
    learning_rates: the grid, from the least to the greatest, tried with seed `tuning_seed`; a
      single one is not tried, but taken.
    rates: where the grid is tried, and what follows for the other trainings.
    extensions: how often the grid may grow by one rate beyond an end at which the best lies.
    tuning_seed: takes no part in the fit.
    seeds: of each training; the law is fitted to the mean loss over them.
    together: how many runs of one training go at once in one program.
    eval_batches: batches of held-out sequences that score a run; None for all.
    bootstrap: resamplings that the intervals rest on.
    dir: where studies live.
  """

  name: str
  entries: tuple[Entry, ...]
  budgets: tuple[Budget, ...]
  held_out: tuple[Budget, ...] = ()
  match: Literal['params', 'active_params'] = 'params'
  tolerance: float = 0.15
  task: DatasetConfig = DataConfig(sequence_length=128)
  batch_size: int = 8
  optimizer: OptimizerConfig = AdamW()
  schedule: ScheduleConfig = Cosine()
  learning_rates: tuple[float, ...] = (3e-3, 1e-2)
  rates: RateRule = Transferred()
  extensions: int = 2
  tuning_seed: int = 0
  seeds: tuple[int, ...] = (1,)
  together: int = 4
  eval_batches: int | None = 32
  bootstrap: int = 200
  dir: str = 'runs'

  def validate(self):
    self.require(len(self.entries) > 0, 'entries', 'at least one architecture')
    for e in self.entries:
      if isinstance(e, AsIs):
        raise InputError(
          f'ScalingStudy.entries: {e.title} is a model of one size; a law needs a family or a '
          'layer, which grow'
        )
    self.require(
      len(self.budgets) >= 2,
      'budgets',
      'at least two: a law needs models that saw different numbers of tokens',
    )
    flops = [b.flops for b in self.budgets]
    if flops != sorted(set(flops)):
      raise InputError(
        f'ScalingStudy.budgets: FLOPs of {_amounts(flops)}; must be in ascending order, each once'
      )
    for b in self.budgets:
      if len(b.params) < PARABOLA:
        raise InputError(
          f'ScalingStudy.budgets: {b.flops:g} FLOPs have {len(b.params)} sizes; must be at least '
          f'{PARABOLA}, '
          'for a parabola'
        )
    for b in self.held_out:
      if b.flops <= flops[-1]:
        raise InputError(
          f'ScalingStudy.held_out: {b.flops:g} FLOPs; must be more than {flops[-1]:g}, the most of '
          'budgets'
        )
    self.require(self.bootstrap >= 2, 'bootstrap', 'at least 2')
    self.at(
      self.entries[0],
      self.budgets[0].params[0],
      self.batch_size * self.task.positions,
      self.learning_rates,
    )

  @property
  def folder(self) -> Path:
    """Where its runs and its report are."""
    return Path(self.dir) / self.name

  def at(self, entry: Entry, params: float, tokens: int, rates: tuple[float, ...]) -> Study:
    """One training as a study of its own. Raises `InputError` for values that a study of this kind
    has in common with it."""
    alike = (
      'name',
      'match',
      'tolerance',
      'batch_size',
      'optimizer',
      'schedule',
      'extensions',
      'tuning_seed',
      'seeds',
      'together',
      'eval_batches',
      'dir',
    )
    try:
      return Study(
        **{field: getattr(self, field) for field in alike},
        entries=(entry,),
        target=params,
        tasks=(self.task,),
        tokens=tokens,
        learning_rates=rates,
        contexts=(),
        rounds=0,
      )
    except InputError as e:
      raise InputError(re.sub(r'^Study\b', 'ScalingStudy', str(e))) from None


def _amounts(values: Sequence[float]) -> str:
  return ', '.join(f'{v:g}' for v in values)


@dataclasses.dataclass(frozen=True)
class Planned:
  """A training that is to be: `params` as matched, the FLOPs a token, and the tokens that make up
  the budget, in whole batches."""

  entry: Entry
  flops: float
  held_out: bool
  target: float
  model: ModelConfig
  params: float
  flops_per_token: float
  tokens: int


@dataclasses.dataclass(frozen=True)
class Scaled:
  """A training that is done: what came of it, and how often its training text was read; None where
  the data do not repeat."""

  planned: Planned
  tuned: Tuned
  passes: float | None


@dataclasses.dataclass(frozen=True)
class FinishedScaling:
  """A scaling study's trainings, by entry."""

  study: ScalingStudy
  results: dict[str, tuple[Scaled, ...]]


def run_scaling(study: ScalingStudy, log: Log, interrupt: Interrupt) -> FinishedScaling:
  """Trains what is not trained yet, and gathers all. Raises `compare.sharing.Interrupted` after a
  signal, when what was running is saved. The same study gives the same numbers however often it was
  interrupted; several processes share its architectures."""
  dataset = open_data(study.task, log=log)
  plans = {}
  for entry in study.entries:  # before any trains: a size that cannot be met is known at once
    plans[entry.title] = _distinct(entry, list(_plan(study, entry, dataset)))
    for p in plans[entry.title]:
      held_out = ' held out' if p.held_out else ''
      log(
        f'{entry.title} | {p.flops:.3g} FLOPs{held_out} | {p.params:,.0f} {study.match} x '
        f'{p.tokens:,} tokens'
      )
  jobs = {
    file_name(title): functools.partial(_trained, study, planned, dataset, log, interrupt)
    for title, planned in plans.items()
  }
  done = shared(study.folder / 'locks', jobs, interrupt).values()
  return FinishedScaling(study, dict(zip(plans, done, strict=True)))


def _plan(study: ScalingStudy, entry: Entry, dataset: Dataset) -> Iterator[Planned]:
  if dataset.vocab_size is None:
    raise InputError(
      f'ScalingStudy.task = {study.task.tag}: has no tokens; a study compares models of tokens'
    )
  if study.task.task == TRANSLATION:
    raise InputError(
      f'ScalingStudy.task = {study.task.tag}: are pairs of texts, whose FLOPs a token vary; must '
      'be text'
    )
  length, batch = study.task.positions, study.batch_size * study.task.positions
  for budget in (*study.budgets, *study.held_out):
    for target in budget.params:
      model = entry.model(
        study.at(entry, target, batch, study.learning_rates), dataset.vocab_size, length
      )
      per_token = flops_per_token(model, length)
      steps = round(budget.flops / per_token / batch)
      if steps < 1:
        raise InputError(
          f'ScalingStudy.budgets: {budget.flops:g} FLOPs are less than one batch of {entry.title} '
          f'at {target:g} '
          f'{study.match}; must be at least {per_token * batch:.3g}, or the size or the batch '
          'smaller'
        )
      held_out = budget.flops > study.budgets[-1].flops
      yield Planned(
        entry,
        budget.flops,
        held_out,
        target,
        model,
        measure(model, study.match),
        per_token,
        steps * batch,
      )


def _distinct(entry: Entry, planned: list[Planned]) -> tuple[Planned, ...]:
  """As they are. Raises `InputError` where two sizes of a budget come out as one model."""
  seen: dict[tuple[float, ModelConfig], float] = {}
  for p in planned:
    if (p.flops, p.model) in seen:
      raise InputError(
        f'ScalingStudy.budgets: of {entry.title} at {p.flops:g} FLOPs, sizes '
        f'{seen[p.flops, p.model]:g} and '
        f'{p.target:g} are the same model of {p.params:,.0f}; must lie further apart'
      )
    seen[p.flops, p.model] = p.target
  return tuple(planned)


def _trained(
  study: ScalingStudy, planned: Sequence[Planned], dataset: Dataset, log: Log, interrupt: Interrupt
) -> tuple[Scaled, ...]:
  done: dict[Planned, Tuned] = {}
  least = [p for p in planned if p.flops == study.budgets[0].flops]
  start = least[len(least) // 2]

  def train(p: Planned, rates: tuple[float, ...]) -> Tuned:
    if p not in done:
      where = f'{p.flops:.3g} FLOPs, {p.params:,.0f} {study.match}'
      runner = Runner(study.at(p.entry, p.target, p.tokens, rates), where, dataset, interrupt, log)
      done[p] = runner.tuned(p.entry, p.model, study.task)
    return done[p]

  def best() -> float:
    return train(start, study.learning_rates).rate

  whole = getattr(dataset, 'train_tokens', None)
  return tuple(
    Scaled(
      p,
      train(p, study.rates.rates(study.learning_rates, best, p.flops / start.flops)),
      None if whole is None else p.tokens / whole,
    )
    for p in planned
  )
