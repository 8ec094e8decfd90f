"""Recipe: how a published model was trained, as data with the source of each value."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Literal

from jaxformer.config import Registry
from jaxformer.data import DatasetConfig
from jaxformer.models.zoo import PRESETS
from jaxformer.training.experiment import Experiment, RunConfig, TrainingConfig
from jaxformer.training.optimizer import OptimizerConfig
from jaxformer.training.schedule import ScheduleConfig

Status = Literal['published', 'derived', 'secondary', 'memory', 'ours']
"""How far a value is that of the publication:

- 'published': stated there, and read there.
- 'derived': computed from what is stated there.
- 'secondary': from a summary, a re-implementation, or the authors' code for another run.
- 'memory': believed to be so; not confirmed in a source.
- 'ours': not published, or not expressible here; the note says what was chosen, and why.
"""
Field = Literal[
  'tokens',
  'batch',
  'length',
  'steps',
  'optimizer',
  'betas',
  'eps',
  'peak',
  'minimum',
  'warmup',
  'schedule',
  'decay',
  'clip',
  'dropout',
  'init',
  'precision',
  'tokenizer',
]
Unit = Literal['tokens', 'sequences', 'pairs']


@dataclasses.dataclass(frozen=True)
class Origin:
  """Where a value of a recipe comes from.

  Attributes:
    status: see `Status`.
    source: publication or file, with the section or table; '' where there is none.
    note: words of the source that the value stands for, a computation, or a reason.
  """

  status: Status
  source: str = ''
  note: str = ''

  def noted(self, note: str) -> 'Origin':
    """Return the same origin with a note."""
    return dataclasses.replace(self, note=note)


Origins = dict[Field, Origin]


@dataclasses.dataclass(frozen=True)
class Source:
  """A publication or a file."""

  name: str
  reference: str

  def at(self, place: str, note: str = '') -> Origin:
    """Return the origin of what is stated at a place of it."""
    return Origin('published', self._place(place), note)

  def hint(self, place: str, note: str = '') -> Origin:
    """Return the origin of what a secondary source states at a place of it."""
    return Origin('secondary', self._place(place), note)

  def _place(self, place: str) -> str:
    return ', '.join(filter(None, (f'{self.name} ({self.reference})', place)))


def derived(note: str) -> Origin:
  """Return the origin of a value that is computed, as the note says."""
  return Origin('derived', note=note)


def ours(note: str = 'not published') -> Origin:
  """Return the origin of a value that is not published, or that stands for what is."""
  return Origin('ours', note=note)


def memory(note: str = 'not confirmed in a source') -> Origin:
  """Return the origin of a value that no source confirmed."""
  return Origin('memory', note=note)


def each(origin: Origin, *fields: Field) -> Origins:
  """Return one origin for several fields."""
  return dict.fromkeys(fields, origin)


# Where a paper does not state its precision, or had other hardware.
AUTO = 'bfloat16 compute, float32 parameters'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """How a published model was trained.

  The values are those of the experiment that `experiment` returns; `origins` says of each where it
  comes from. A value that could not be expressed is replaced by the nearest one, marked as ours.

  Attributes:
    preset: name of the model.
    amount: trained on, in `unit`: as published, or as chosen.
    data: with what has to be given in place of the published corpus and tokenizer.
    batch_size: of `training`: sequences, or pairs of the last bucket.
    steps: updates; None for those that make up `amount`.
    label_smoothing, max_logit_loss: of `training`.
    dropout: of the model.
    init: of the model, in words.
    precision: of the published run, in words.
    dtype, remat: of `training`.
    origins: of each value.
    note: what a run of this recipe lacks to be a reproduction.
  """

  preset: str
  amount: float
  unit: Unit = 'tokens'
  data: DatasetConfig
  batch_size: int
  steps: int | None = None
  optimizer: OptimizerConfig
  schedule: ScheduleConfig
  label_smoothing: float = 0.0
  max_logit_loss: float = 0.0
  dropout: float = 0.0
  init: str
  precision: str = AUTO
  dtype: Literal['auto', 'float32'] = 'auto'
  remat: str = 'full'
  origins: Mapping[Field, Origin]
  note: str = ''

  @property
  def experiment(self) -> Experiment:
    """The recipe as an experiment. Every 1,000 steps it is evaluated and saved."""
    per_step = self.batch_size * (self.data.positions if self.unit == 'tokens' else 1)
    steps = round(self.amount / per_step) if self.steps is None else self.steps
    return Experiment(
      model=PRESETS[self.preset].model,
      data=self.data,
      optimizer=self.optimizer,
      schedule=self.schedule,
      training=TrainingConfig(
        steps=steps,
        batch_size=self.batch_size,
        dtype=self.dtype,
        remat=self.remat,
        label_smoothing=self.label_smoothing,
        max_logit_loss=self.max_logit_loss,
        eval_every=1000,
        checkpoint_every=1000,
      ),
      run=RunConfig(name=self.preset),
    )


FIELDS: tuple[Field, ...] = typing.get_args(Field)
RECIPES: Registry[Recipe] = Registry('recipe')


def recipe(preset: str, **fields: object) -> None:
  """Register the recipe of a preset; `fields` are those of `Recipe`."""
  RECIPES.add(preset, Recipe(preset=preset, **fields))  # ty: ignore[invalid-argument-type]
