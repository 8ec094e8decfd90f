"""A study as data: which architectures, what is made equal, on what they are trained and tuned, and
with which seeds."""

from __future__ import annotations

import re
from pathlib import Path

from jaxformer import config
from jaxformer.config import Config, InputError
from jaxformer.data import DataConfig, DatasetConfig
from jaxformer.layers.layer import LayerConfig
from jaxformer.models.model import ModelConfig
from jaxformer.models.zoo import FAMILIES
from jaxformer.models.zoo.around import around
from jaxformer.overrides import override
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

BETWEEN_CHECKPOINTS = 100  # steps of a run at least: a short one is sooner done again than saved


def file_name(title: str) -> str:
  """A title as runs and measurements have it in the names of their files."""
  return re.sub(r'[^\w.+-]+', '-', title).strip('.+-') or 'unnamed'


class Entry(Config, abstract=True):
  """Base of what stands in a study.

  Attributes:
    name: in the report; None for one that tells it.
  """

  name: str | None = None

  @property
  def title(self) -> str:
    """The name in the report."""
    raise NotImplementedError

  def model(
    self, study: Study, vocab_size: int, context_length: int, source_vocab_size: int | None = None
  ) -> ModelConfig:
    """The model at the study's size; `source_vocab_size` is that of pairs, None for other data."""
    raise NotImplementedError


class Grown(Entry):
  """A family at the study's size."""

  family: str

  def validate(self):
    FAMILIES[self.family]

  @property
  def title(self) -> str:
    return self.name or self.family

  def model(
    self, study: Study, vocab_size: int, context_length: int, source_vocab_size: int | None = None
  ) -> ModelConfig:
    return solve(
      FAMILIES[self.family],
      study.match,
      study.target,
      vocab_size=vocab_size,
      context_length=context_length,
      tolerance=study.tolerance,
      source_vocab_size=source_vocab_size,
    ).model


class Mixer(Entry):
  """A sequence layer at the study's size, in Llama's place of attention (`models.zoo.around`)."""

  layer: LayerConfig

  @property
  def title(self) -> str:
    return self.name or self.layer.tag

  def model(
    self, study: Study, vocab_size: int, context_length: int, source_vocab_size: int | None = None
  ) -> ModelConfig:
    return solve(
      around(self.layer),
      study.match,
      study.target,
      vocab_size=vocab_size,
      context_length=context_length,
      tolerance=study.tolerance,
      source_vocab_size=source_vocab_size,
    ).model


class AsIs(Entry):
  """A model as it is, whatever its size; the report says by how much it misses."""

  model_config: ModelConfig

  @property
  def title(self) -> str:
    return self.name or self.model_config.tag

  def model(
    self, study: Study, vocab_size: int, context_length: int, source_vocab_size: int | None = None
  ) -> ModelConfig:
    return self.model_config


class Study(Config):
  """Architectures of equal size, tuned alike, trained on the same sequences in the same order for
  equal seeds.

  Attributes:
    name: of the study; its runs are in `dir`/`name`.
    entries: what is compared; the first is what the others are compared to.
    match, target: what is made equal, and to how much (`compare.sizing`).
    tolerance: how far a size may be off.
    tasks: what each is trained and scored on, one after the other.
    tokens: training tokens of a run.
    batch_size: sequences an update.
    optimizer, schedule: the same for all; the learning rate comes from the grid.
    learning_rates: the grid, from the least to the greatest, tried with seed `tuning_seed`; a
      single one is not tried, but taken.
    extensions: how often the grid may grow by one rate beyond an end at which the best lies.
    tuning_seed: takes no part in the comparison.
    seeds: of the runs at each one's best learning rate.
    together: how many runs of one architecture train at once in one program
      (`training.population`); one after the other on data whose batches have several shapes.
    eval_batches: batches of held-out sequences that score a run; None for all.
    evaluations: how often a run is scored on its way, at even steps; its score is that of the end.
    translations: held-out texts of pairs that every run translates, the likeliest token at each
      step; 0 leaves that out.
    contexts: tokens of context at which reading a prompt and decoding are timed; none leaves that
      out.
    rounds: how often the training step of each is timed, in turn; 0 leaves that out.
    dir: where studies live.
  """

  name: str
  entries: tuple[Entry, ...]
  match: Match = 'params'
  target: float = 1e6
  tolerance: float = 0.02
  tasks: tuple[DatasetConfig, ...] = (DataConfig(sequence_length=256),)
  tokens: int = 1_000_000
  batch_size: int = 16
  optimizer: OptimizerConfig = AdamW()
  schedule: ScheduleConfig = Cosine()
  learning_rates: tuple[float, ...] = (1e-3, 3e-3)
  extensions: int = 2
  tuning_seed: int = 0
  seeds: tuple[int, ...] = (1, 2, 3)
  together: int = 4
  eval_batches: int | None = 32
  evaluations: int = 1
  translations: int = 200
  contexts: tuple[int, ...] = (128, 1024)
  rounds: int = 5
  dir: str = 'runs'

  def validate(self):
    self.require(len(self.entries) > 0, 'entries', 'at least one architecture')
    titles = [file_name(e.title) for e in self.entries]
    if twice := sorted({t for t in titles if titles.count(t) > 1}):
      raise InputError(
        f'Study.entries: {", ".join(twice)} stands there twice; give one of them another name'
      )
    self.require(len(self.tasks) > 0, 'tasks', 'at least one task')
    self.require(
      all(r > 0 for r in self.learning_rates or (0,)), 'learning_rates', 'positive, at least one'
    )
    self.require(
      list(self.learning_rates) == sorted(set(self.learning_rates)),
      'learning_rates',
      'in ascending order, each once',
    )
    self.require(
      len(self.seeds) > 0 and len(set(self.seeds)) == len(self.seeds),
      'seeds',
      'at least one, each once',
    )
    self.require(
      self.tuning_seed not in self.seeds,
      'tuning_seed',
      'none of the seeds: the best rate was chosen by it',
    )
    for field in ('target', 'tolerance', 'tokens', 'batch_size', 'together', 'evaluations'):
      self.require(getattr(self, field) > 0, field, 'positive')
    for field in ('extensions', 'translations', 'rounds'):
      self.require(getattr(self, field) >= 0, field, 'at least 0')
    self.require(
      file_name(self.name) == self.name, 'name', 'letters, digits and . _ + -: it is a folder'
    )
    self.require(all(c > 0 for c in self.contexts), 'contexts', 'positive')
    for task in self.tasks:
      batch = self.batch_size * task.positions
      self.require(
        self.tokens >= batch, 'tokens', f'at least {batch:,}, those of one batch of {task.tag}'
      )

  @property
  def task_titles(self) -> tuple[str, ...]:
    """A name for each task: its type, of text that of its source; from the second of a name on with
    a number."""
    tags = [task.source.tag if isinstance(task, DataConfig) else task.tag for task in self.tasks]
    counts = [tags[: i + 1].count(tag) for i, tag in enumerate(tags)]
    return tuple(tag if n == 1 else f'{tag}-{n}' for tag, n in zip(tags, counts, strict=True))

  @property
  def folder(self) -> Path:
    """Where its runs and its report are."""
    return Path(self.dir) / self.name

  def steps(self, task: DatasetConfig) -> int:
    """Updates of a run on a task."""
    return self.tokens // (self.batch_size * task.positions)

  def experiment(
    self, entry: Entry, model: ModelConfig, task: DatasetConfig, rate: float, seed: int
  ) -> Experiment:
    """One run. Its folder is named after its contents, so that another study of the same run finds
    it done."""
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
        checkpoint_every=max(min(steps, BETWEEN_CHECKPOINTS), steps // 4),
        keep_latest=1,
        keep_best=0,
        log_every=max(1, steps // 50),
        trackers=(),
      ),
      run=RunConfig(dir=self.dir),
    )
    short = config.digest(experiment)[:8]
    return override(
      experiment,
      [('run.name', f'{self.name}/{file_name(entry.title)}-{task.tag}-{rate:g}-{seed}-{short}')],
    )
