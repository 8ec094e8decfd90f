"""A study as data: the architectures, what is equal between them, and how each is trained and
tuned."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxformer import config
from jaxformer.config import Config, InputError
from jaxformer.data import Dataset, DatasetConfig, Text, open_data
from jaxformer.files import check_folder, user_path
from jaxformer.layers.layer import LayerConfig
from jaxformer.models.model import ModelConfig
from jaxformer.models.zoo import FAMILIES, Family
from jaxformer.models.zoo.around import around
from jaxformer.study.sizing import Match, solve
from jaxformer.training import (
  AdamW,
  Cosine,
  Experiment,
  OptimizerConfig,
  RunConfig,
  ScheduleConfig,
  TrainingConfig,
)
from jaxformer.training.paths import is_url

Log = Callable[[str], None]
MIN_CHECKPOINT_STEPS = 100  # between checkpoints: a shorter run is retrained sooner than restored
INCREASING = 'at least one, positive, in ascending order, each once'
PARABOLA = 3  # sizes per budget that a parabola needs


def file_name(title: str) -> str:
  """Return a title as it appears in file names of runs and measurements."""
  return re.sub(r'[^\w.+-]+', '-', title).strip('.+-') or 'unnamed'


def _increasing(values: Sequence[float]) -> bool:
  """Whether there are values, all positive and in ascending order, each once."""
  return len(values) > 0 and all(a < b for a, b in itertools.pairwise([0, *values]))


class Entry(Config, abstract=True):
  """Base class of the entries of a study: what makes a model at the study's size.

  Attributes:
    name: in the report; None for a default name.
  """

  name: str | None = None

  @property
  def title(self) -> str:
    """The name in the report."""
    raise NotImplementedError

  def family_to_scale(self) -> Family:
    """Return the family that `model` scales."""
    raise NotImplementedError

  def model(
    self, study: Study, vocab_size: int, context_length: int, source_vocab_size: int | None = None
  ) -> ModelConfig:
    """Return the model at the study's size. `source_vocab_size` is None unless the data are
    source-target pairs."""
    return solve(
      self.family_to_scale(),
      study.match,
      study.target,
      vocab_size=vocab_size,
      context_length=context_length,
      tolerance=study.tolerance,
      source_vocab_size=source_vocab_size,
    ).model


class ScaledFamily(Entry):
  """A family of `jaxformer.models.zoo`, scaled to the study's size."""

  family: str

  def validate(self):
    FAMILIES[self.family]

  @property
  def title(self) -> str:
    return self.name or self.family

  def family_to_scale(self) -> Family:
    return FAMILIES[self.family]


class TokenMixer(Entry):
  """A sequence layer in place of Llama's attention (`models.zoo.around`), scaled to the study's
  size."""

  layer: LayerConfig

  @property
  def title(self) -> str:
    return self.name or self.layer.tag

  def family_to_scale(self) -> Family:
    return around(self.layer)


class FixedModel(Entry):
  """A given model of whatever size; the report states its size error."""

  model_config: ModelConfig

  @property
  def title(self) -> str:
    return self.name or self.model_config.tag

  def model(self, study, vocab_size, context_length, source_vocab_size=None):
    return self.model_config


class Budget(Config):
  """Model sizes trained with equal training FLOPs.

  Attributes:
    flops: training FLOPs of each run, attention counted causally; the number of tokens is `flops`
      divided by the model's training FLOPs per token.
    params: the sizes.
  """

  flops: float
  params: tuple[float, ...]

  def validate(self):
    self.require_positive('flops')
    self.require(_increasing(self.params), 'params', INCREASING)


def budgets(
  flops: Sequence[float], params: Sequence[float], growth: float = 0.5
) -> tuple[Budget, ...]:
  """Return budgets whose sizes are `params` at the first and grow with (FLOPs / first
  FLOPs)^growth, as optimal sizes do: about as the square root (Hoffmann et al. 2022)."""
  return tuple(
    Budget(flops=c, params=tuple(float(f'{n * (c / flops[0]) ** growth:.3g}') for n in params))
    for c in flops
  )


class ScalingGrid(Config):
  """Sizes and budgets of a scaling study, which fits the loss of each architecture as a law of
  parameters and tokens (Hoffmann et al. 2022).

  Attributes:
    budgets: what the laws are fitted to, in ascending order of FLOPs.
    held_out: larger budgets, excluded from the fit, on which predictions are tested.
    rate_exponent: the grid of learning rates is tried at the middle size of the smallest budget C0
      only; a run of C FLOPs uses the best rate x (C / C0)^rate_exponent. The default is that of Bi
      et al. 2024 (DeepSeek LLM, section 3.1). None tries the whole grid at each size and budget.
    bootstrap: refits on which the intervals of a law are based.
  """

  budgets: tuple[Budget, ...]
  held_out: tuple[Budget, ...] = ()
  rate_exponent: float | None = -0.125
  bootstrap: int = 200

  def validate(self):
    self.require(
      len(self.budgets) >= 2,
      'budgets',
      'at least two: a law needs models trained on different numbers of tokens',
    )
    flops = [b.flops for b in self.budgets]
    if not _increasing(flops):
      amounts = ', '.join(f'{v:g}' for v in flops)
      raise InputError('ScalingGrid.budgets', amounts, 'FLOPs in ascending order, each once')
    for b in self.budgets:
      if len(b.params) < PARABOLA:
        raise InputError(
          'ScalingGrid.budgets',
          f'{len(b.params)} sizes at {b.flops:g} FLOPs',
          f'at least {PARABOLA} sizes per budget, for a parabola',
        )
    for b in self.held_out:
      if b.flops <= flops[-1]:
        raise InputError(
          'ScalingGrid.held_out',
          f'{b.flops:g} FLOPs',
          f'more than {flops[-1]:g}, the largest of budgets',
        )
    self.require(self.bootstrap >= 2, 'bootstrap', 'at least 2')

  def rate(self, best: float, growth: float) -> float:
    """Return the learning rate at `growth` times the FLOPs of the smallest budget, where `best` is
    the best rate."""
    return float(f'{best * growth ** (self.rate_exponent or 0.0):.3g}')


class Study(Config):
  """Architectures of equal size, tuned equally, trained on the same sequences in the same order for
  equal seeds. With `scaling` a grid of sizes and budgets replaces the one size.

  Attributes:
    name: of the study; its runs are in `dir`/`name`.
    entries: what is compared; the first is the baseline.
    match, target: the quantity made equal, and its value (`study.sizing`).
    tolerance: largest relative size error.
    tasks: what each architecture is trained and scored on, one after the other.
    tokens: training tokens per run.
    batch_size: sequences per update.
    optimizer, schedule: shared; the learning rate comes from the grid.
    learning_rates: the grid, in ascending order, tried with seed `tuning_seed`; a single rate is
      used untuned.
    max_grid_extensions: how often the grid may be extended by one rate beyond an end at which the
      best rate lies.
    tuning_seed: excluded from the comparison.
    seeds: of the runs at each architecture's best learning rate.
    runs_per_program: runs of one architecture trained at once in one program
      (`training.population`); one at a time on data whose batches differ in shape.
    eval_batches: batches of held-out sequences that score a run; None for all.
    evaluations: evenly spaced evaluations per run; the last one is its score.
    translations: held-out texts of source-target pairs that every run translates greedily; 0 for
      none.
    contexts: context lengths, in tokens, at which prefill and decoding are timed; empty for none.
    timing_repeats: repeated timings of each training step, taken in turns; 0 for none.
    scaling: sizes and budgets of a scaling study; None for a study at one size.
    dir: where studies live.
  """

  name: str
  entries: tuple[Entry, ...]
  match: Match = 'params'
  target: float = 1e6
  tolerance: float = 0.02
  tasks: tuple[DatasetConfig, ...] = (Text(sequence_length=256),)
  tokens: int = 1_000_000
  batch_size: int = 16
  optimizer: OptimizerConfig = AdamW()
  schedule: ScheduleConfig = Cosine()
  learning_rates: tuple[float, ...] = (1e-3, 3e-3)
  max_grid_extensions: int = 2
  tuning_seed: int = 0
  seeds: tuple[int, ...] = (1, 2, 3)
  runs_per_program: int = 4
  eval_batches: int | None = 32
  evaluations: int = 1
  translations: int = 200
  contexts: tuple[int, ...] = (128, 1024)
  timing_repeats: int = 5
  scaling: ScalingGrid | None = None
  dir: str = 'runs'

  def validate(self):
    self.require(len(self.entries) > 0, 'entries', 'at least one architecture')
    titles = [file_name(e.title) for e in self.entries]
    if twice := sorted({t for t in titles if titles.count(t) > 1}):
      raise InputError('Study.entries', ', '.join(twice), 'distinct names; set name of one of them')
    self.require(len(self.tasks) > 0, 'tasks', 'at least one task')
    self.require(_increasing(self.learning_rates), 'learning_rates', INCREASING)
    rate = self.optimizer.learning_rate
    default = config.field_default(type(self.optimizer), 'learning_rate')
    if rate not in (default, *self.learning_rates):
      problem = 'has no effect: the rates of a study are its learning_rates'
      raise InputError('Study.optimizer.learning_rate', rate, problem=problem)
    self.require(
      len(self.seeds) > 0 and len(set(self.seeds)) == len(self.seeds),
      'seeds',
      'at least one, each once',
    )
    for field, seeds in (('seeds', self.seeds), ('tuning_seed', (self.tuning_seed,))):
      self.require(all(0 <= s < 2**32 for s in seeds), field, 'at least 0 and below 2^32')
    self.require(
      self.tuning_seed not in self.seeds,
      'tuning_seed',
      'none of the seeds, since it selects the learning rate',
    )
    self.require_positive(
      'target', 'tolerance', 'tokens', 'batch_size', 'runs_per_program', 'evaluations'
    )
    self.require_not_negative('max_grid_extensions', 'translations', 'timing_repeats')
    self.require(
      file_name(self.name) == self.name, 'name', 'letters, digits and . _ + -: it is a folder'
    )
    self.require(all(c > 0 for c in self.contexts), 'contexts', 'positive')
    if self.scaling is not None:
      self._validate_scaling()
      return
    for task in self.tasks:
      batch = self.batch_size * task.positions
      self.require(self.tokens >= batch, 'tokens', f'at least {batch:,}, one batch of {task.tag}')

  def _validate_scaling(self):
    for e in self.entries:
      if isinstance(e, FixedModel):
        raise InputError(
          'Study.entries', e.title, 'a family or a layer, which scale: the model has one size'
        )
    for field in ('target', 'tokens'):
      default = type(self).__dataclass_fields__[field].default
      self.require(
        getattr(self, field) == default, field, 'left unset in a scaling study: scaling.budgets'
      )
    self.require(
      self.match in ('params', 'active_params'), 'match', 'params or active_params with scaling'
    )
    self.require(len(self.tasks) == 1, 'tasks', 'one task in a scaling study')

  @property
  def task_titles(self) -> tuple[str, ...]:
    """A name per task: the type of the task, or the source of a text; numbered from the second of a
    name on."""
    tags = [task.title for task in self.tasks]
    counts = [tags[:i].count(tag) for i, tag in enumerate(tags, 1)]
    return tuple(tag if n == 1 else f'{tag}-{n}' for tag, n in zip(tags, counts, strict=True))

  def open_tasks(self, log: Log | None = None) -> dict[str, Dataset]:
    """Return the data of each task by its title."""
    return {
      title: open_data(task, log=log)
      for title, task in zip(self.task_titles, self.tasks, strict=True)
    }

  @property
  def folder(self) -> Path:
    """Folder of the runs and the report."""
    return user_path(self.dir, 'study.dir') / user_path(self.name, 'study.name')

  def check_folder(self) -> None:
    """Raise `InputError` where the folder can be neither used nor made."""
    if is_url(self.dir):
      raise InputError('study.dir', self.dir, 'a folder of a local or shared disk')
    check_folder(self.folder, 'study.dir', self.dir)

  def at(self, target: float, tokens: int) -> Study:
    """Return the study of one size of a scaling study."""
    return self.replace(scaling=None, target=target, tokens=tokens)

  def steps(self, task: DatasetConfig) -> int:
    """Return the number of updates per run on a task."""
    return self.tokens // (self.batch_size * task.positions)

  def experiment(
    self, entry: Entry, model: ModelConfig, dataset: Dataset, rate: float, seed: int
  ) -> Experiment:
    """Return one run. Its folder is named after a digest of its settings, the code of the user in
    them, and the content of its data, so that the same run is found finished, and no other."""
    task = dataset.config
    steps = self.steps(task)
    experiment = Experiment(
      model=model,
      data=task,
      optimizer=self.optimizer.replace(learning_rate=rate),
      schedule=self.schedule,
      training=TrainingConfig(
        steps=steps,
        batch_size=self.batch_size,
        seed=seed,
        eval_every=max(1, steps // self.evaluations),
        eval_batches=self.eval_batches,
        checkpoint_every=max(min(steps, MIN_CHECKPOINT_STEPS), steps // 4),
        keep_latest=1,
        keep_best=0,
        log_every=max(1, steps // 50),
        trackers=(),
      ),
      run=RunConfig(dir=self.dir),
    )
    contents = json.dumps([config.digest(experiment), dataset.identity], sort_keys=True)
    short = hashlib.sha256(contents.encode()).hexdigest()[:8]
    name = f'{self.name}/{file_name(entry.title)}-{task.tag}-{rate:g}-{seed}-{short}'
    return experiment.replace(run=experiment.run.replace(name=name))
