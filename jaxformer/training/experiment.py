"""An experiment as data: everything that decides what a training run does."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal, TypeVar

from jaxformer.config import Config, InputError, nearest, types_of
from jaxformer.data import DataConfig, DatasetConfig, Kind, TaskConfig
from jaxformer.models.language_model import ModelConfig
from jaxformer.models.stack import REMAT
from jaxformer.sharding import MeshConfig
from jaxformer.training.optimizer import AdamW, OptimizerConfig
from jaxformer.training.schedule import Cosine, ScheduleConfig
from jaxformer.training.trackers import TensorBoard, TrackerConfig

D = TypeVar('D', bound=DatasetConfig)


class TrainingConfig(Config):
  """
  Attributes:
    steps: updates of the parameters.
    batch_size: sequences an update, over all devices.
    accumulate: microbatches that a batch is cut into, one after the other; their gradients add up
      to that of the batch.
    seed: of initial values, dropout and the order of the data.
    dtype: of activations and products; 'auto' is bfloat16 on TPU and GPU and float32 on CPU.
      Parameters are float32.
    remat: what the forward pass keeps, a name of `models.stack.REMAT`.
    z_loss: weight of the squared log-partition function (PaLM, section 5); 0 for none.
    label_smoothing: how much of each target goes to all tokens evenly (Szegedy et al. 2016, section
      7; 0.1 in Vaswani et al. 2017); 0 for none.
    eval_every: steps between evaluations; one more follows the last step.
    eval_batches: batches of held-out rows, spread over all of them; None for all.
    checkpoint_every: steps between checkpoints; one more follows the last step.
    keep_latest: newest checkpoints kept.
    keep_best: checkpoints with the lowest `eval/loss` kept beside them.
    log_every: steps between lines of `metrics.jsonl`.
    trackers: where metrics go besides.
    profile: first step and the one after the last to record with the profiler, into the run
      folder's `profile/`; None for none.
  """

  steps: int = 300
  batch_size: int = 16
  accumulate: int = 1
  seed: int = 0
  dtype: Literal['auto', 'bfloat16', 'float32'] = 'auto'
  remat: str = 'none'
  z_loss: float = 0.0
  label_smoothing: float = 0.0
  eval_every: int = 100
  eval_batches: int | None = 16
  checkpoint_every: int = 100
  keep_latest: int = 2
  keep_best: int = 1
  log_every: int = 10
  trackers: tuple[TrackerConfig, ...] = (TensorBoard(),)
  profile: tuple[int, int] | None = None

  def validate(self):
    for field in (
      'steps',
      'batch_size',
      'accumulate',
      'eval_every',
      'checkpoint_every',
      'keep_latest',
      'log_every',
    ):
      self.require(getattr(self, field) > 0, field, 'positive')
    self.require(self.keep_best >= 0, 'keep_best', 'at least 0')
    self.require(0 <= self.seed < 2**32, 'seed', 'at least 0 and below 2^32')
    self.require(self.z_loss >= 0, 'z_loss', 'at least 0')
    self.require(0 <= self.label_smoothing < 1, 'label_smoothing', 'at least 0 and below 1')
    self.require(
      self.eval_batches is None or self.eval_batches > 0, 'eval_batches', 'positive, or none'
    )
    self.require(
      self.batch_size % self.accumulate == 0,
      'batch_size',
      f'a multiple of accumulate = {self.accumulate}',
    )
    self.require(
      self.profile is None or 0 <= self.profile[0] < self.profile[1],
      'profile',
      'a first step and a later one, or none',
    )
    if self.remat not in REMAT:
      raise InputError(
        f'TrainingConfig.remat = {self.remat!r}: no such policy{nearest(self.remat, REMAT)}'
      )


class RunConfig(Config):
  """The run folder is `dir`/`name`, where `dir` is a folder or gs://BUCKET/FOLDER. The same name
  goes on with the run; None is a name made from the experiment's digest."""

  name: str | None = None
  dir: str = 'runs'

  def validate(self):
    self.require(
      self.name is None or re.fullmatch(r'[\w][\w.+-]*(/[\w][\w.+-]*)*', self.name) is not None,
      'name',
      'letters, digits and . _ + - (with / between folders)',
    )


class Experiment(Config):
  """What is trained, on what, how, and where."""

  model: ModelConfig
  data: DatasetConfig = DataConfig()
  optimizer: OptimizerConfig = AdamW()
  schedule: ScheduleConfig = Cosine()
  training: TrainingConfig = TrainingConfig()
  mesh: MeshConfig = MeshConfig()
  run: RunConfig = RunConfig()

  def validate(self):
    longest, length = getattr(self.model, 'max_len', None), self.data.max_len
    if longest is not None and length > longest:
      field = (
        'data.sequence_length'
        if isinstance(self.data, DataConfig)
        else f'data = {self.data.tag}: positions'
      )
      raise InputError(
        f'{field} = {length}: must be at most {longest}, where the learned positions of the model '
        'end'
      )
    warmup = self.schedule.warmup_steps(self.training.steps)
    if warmup > self.training.steps:
      raise InputError(
        f'schedule.warmup = {warmup}: must be at most training.steps = {self.training.steps}'
      )


def default_experiment(model: ModelConfig, name: str) -> Experiment:
  """What `train NAME` does without overrides: settings under which a tiny model learns in about a
  minute on two CPU cores."""
  length = min(getattr(model, 'context_length', 256), 256)
  # Pairs are short: more of them fit a minute.
  pairs = getattr(model, 'source_vocab_size', None) is not None
  training = (
    TrainingConfig(steps=600, batch_size=32, eval_every=200)
    if pairs
    else TrainingConfig(steps=400, batch_size=8)
  )
  return Experiment(
    model=model,
    data=_fitting_task(model) or DataConfig(sequence_length=length),
    optimizer=AdamW(learning_rate=3e-3),
    training=training,
    run=RunConfig(name=name),
  )


def _fitting_task(model: ModelConfig) -> DatasetConfig | None:
  """The task that asks just what a classifier or an autoencoder answers, or pairs of texts that an
  encoder-decoder can read; None for other models, and where there is none."""
  wanted = tuple(getattr(model, name, None) for name in Kind._fields)
  if getattr(model, 'source_vocab_size', None) is not None:
    return next((d for d in _pair_data() if _fits(model, d)), None)
  return next(
    (
      t
      for t in [*_tasks(classes=True), *_tasks(classes=False, autoencoder=True)]
      if tuple(t.kind) == wanted
    ),
    None,
  )


def _fits(model: ModelConfig, data: DatasetConfig) -> bool:
  try:
    check_fit(model, data)
  except InputError:
    return False
  return True


def _as_they_are(base: type[D]) -> list[D]:
  """Data of every type that needs no setting."""
  return [
    t()
    for t in types_of(base)
    if not any(f.default is f.default_factory for f in dataclasses.fields(t))
  ]


def _tasks(classes: bool, autoencoder: bool = False) -> list[TaskConfig]:
  """The tasks that ask for a class, those that ask for tokens one after the other, or those that
  ask for all of them of the last position; not those of pairs."""
  asked = classes, autoencoder, False
  kinds = ((t, t.kind) for t in _as_they_are(TaskConfig))
  return [
    t
    for t, k in kinds
    if (k.classes is not None, k.autoencoder is not None, k.source_vocab_size is not None) == asked
  ]


def _pair_data() -> list[DatasetConfig]:
  """What holds pairs of a source and a target."""
  return [d for d in _as_they_are(DatasetConfig) if d.kind.source_vocab_size is not None]


def _check_pairs(model: ModelConfig, mine: Kind, data: DatasetConfig) -> None:
  if (mine.source_vocab_size is None) == (data.kind.source_vocab_size is None):
    return
  if mine.source_vocab_size is None:
    raise InputError(
      f'data = {data.tag}: are pairs of a source and a target, which an EncoderDecoder reads, and '
      f'a {model.tag} '
      'reads one sequence'
    )
  fitting = [t.tag for t in types_of(DatasetConfig) if t.tag == 'Pairs'] + [
    d.tag for d in _pair_data()
  ]
  raise InputError(
    f'data = {data.tag}: an {model.tag} reads pairs of a source and a target, and these data are '
    'no pairs'
    f'{nearest("", fitting)}'
  )


def check_fit(
  model: ModelConfig,
  data: DatasetConfig,
  vocab_size: int | None = None,
  source_vocab_size: int | None = None,
) -> None:
  """Raises `InputError` where a model cannot read the data, or cannot answer what they ask.

  Args:
    vocab_size, source_vocab_size: of the data once they are open; by default what their config
      tells.
  """
  kind = data.kind
  mine = Kind(*(getattr(model, name, None) for name in Kind._fields))
  _check_pairs(model, mine, data)
  if (mine.classes is None) != (kind.classes is None):
    able, asked = (
      ('names one of its classes', 'ask for tokens')
      if mine.classes
      else ('predicts tokens', 'ask for a class')
    )
    fitting = [t.tag for t in _tasks(classes=mine.classes is not None)] + (
      [] if mine.classes else [DataConfig.tag]
    )
    raise InputError(
      f'data = {data.tag}: a {model.tag} {able}, and these data {asked}{nearest("", fitting)}'
    )
  if mine.autoencoder != kind.autoencoder:
    does = 'a whole sequence from its last position'
    what = (
      f'an {model.tag} tells {does}, and these data ask for something else'
      if mine.autoencoder
      else (
        f'ask for {does}, which an Autoencoder tells; a {model.tag} would be shown each token that '
        'it is asked for'
      )
    )
    fitting = [t.tag for t in _tasks(False, mine.autoencoder is not None)] + (
      [] if mine.autoencoder else [DataConfig.tag]
    )
    raise InputError(f'data = {data.tag}: {what}{nearest("", fitting)}')
  if mine.features != kind.features:
    has, reads = ('tokens' if n is None else f'{n} numbers' for n in (kind.features, mine.features))
    raise InputError(
      f'data = {data.tag}: have {has} at each position, and model.input reads {reads}'
    )
  if mine.classes is not None and kind.classes is not None and mine.classes < kind.classes:
    raise InputError(
      f'model.classes = {mine.classes}: must be at least {kind.classes}, those of {data.tag}'
    )
  wanted, whose = (
    vocab_size or kind.vocab_size,
    'the tokenizer' if isinstance(data, DataConfig) else data.tag,
  )
  if mine.vocab_size is not None and wanted is not None and wanted > mine.vocab_size:
    field = 'model.vocab_size' if mine.classes is None else 'model.input.vocab_size'
    raise InputError(f'{field} = {mine.vocab_size}: must be at least {wanted}, those of {whose}')
  wanted = source_vocab_size or kind.source_vocab_size
  if mine.source_vocab_size is not None and wanted is not None and wanted > mine.source_vocab_size:
    raise InputError(
      f'model.source_vocab_size = {mine.source_vocab_size}: must be at least {wanted}, those of '
      f'the sources of {data.tag}'
    )
