"""An experiment as data: everything that determines a training run."""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Literal

from jaxformer.code_record import code_of
from jaxformer.config import Config, InputError, nearest, types_of
from jaxformer.data import DatasetConfig, Text
from jaxformer.data.missing import check_given
from jaxformer.models.model import ModelConfig
from jaxformer.models.stack import REMAT
from jaxformer.overrides import override
from jaxformer.sharding import MeshConfig
from jaxformer.task_type import TRANSLATION
from jaxformer.training.optimizer import AdamW, OptimizerConfig
from jaxformer.training.schedule import Cosine, ScheduleConfig
from jaxformer.training.trackers import TensorBoard, TrackerConfig


class TrainingConfig(Config):
  """Length, batches, precision, evaluation and checkpoints of a run.

  Attributes:
    steps: number of updates.
    batch_size: sequences per update, over all devices.
    accumulate: number of microbatches that a batch is split into; their gradients are summed.
    seed: of initialization, dropout and the order of the data.
    dtype: of activations and matmuls; 'auto' is bfloat16 on TPU and GPU and float32 on CPU.
      Parameters are float32.
    remat: rematerialization policy, a name of `models.stack.REMAT`.
    compiler_options: NAME=VALUE of options with which XLA compiles the step, over those of the chip
      in `hardware.toml`.
    z_loss: weight of the squared log-partition function (PaLM, section 5); 0 for none.
    max_logit_loss: weight of half the square of the largest logit of each token (RWKV: 1e-4); 0 for
      none.
    label_smoothing: probability moved from each target to the uniform distribution (Szegedy et al.
      2016, section 7; 0.1 in Vaswani et al. 2017); 0 for none.
    eval_every: steps between evaluations; the last step is followed by one as well.
    eval_batches: number of batches sampled evenly from the held-out rows; None for all.
    checkpoint_every: steps between checkpoints; the last step is followed by one as well.
    keep_latest: number of latest checkpoints to keep.
    keep_best: number of checkpoints with the lowest `eval/loss` to keep in addition, of those whose
      step was evaluated.
    keep_every: checkpoints of the steps that are multiples of it are kept for ever; None for none.
    log_every: steps between rows of `metrics.jsonl`.
    trackers: where metrics go besides the run folder.
    resume_with: FIELD=VALUE of settings that a run changes when it is resumed, on purpose; see
      `training.stages`. Other changed settings are refused.
    skip_steps: START:END, steps that are not taken, END not among them: step n is the one whose row
      in `metrics.jsonl` has `step` n. Their batches are passed over, and parameters and optimizer
      stay as they are; they count as steps of the run, its schedule and its data.
    profile: first step, and the one after the last, to record with the profiler into the run
      folder's `profile/`; None for none.
  """

  steps: int = 300
  batch_size: int = 16
  accumulate: int = 1
  seed: int = 0
  dtype: Literal['auto', 'bfloat16', 'float32'] = 'auto'
  remat: str = 'none'
  compiler_options: tuple[str, ...] = ()
  z_loss: float = 0.0
  max_logit_loss: float = 0.0
  label_smoothing: float = 0.0
  eval_every: int = 100
  eval_batches: int | None = 16
  checkpoint_every: int = 100
  keep_latest: int = 2
  keep_best: int = 1
  keep_every: int | None = None
  log_every: int = 10
  resume_with: tuple[str, ...] = ()
  skip_steps: tuple[str, ...] = ()
  trackers: tuple[TrackerConfig, ...] = (TensorBoard(),)
  profile: tuple[int, int] | None = None

  def validate(self):
    self.require(self.batch_size < 2**31, 'batch_size', 'below 2^31, as the sizes of arrays are')
    self.require_positive('steps', 'batch_size', 'accumulate', 'eval_every', 'eval_batches')
    self.require_positive('checkpoint_every', 'keep_latest', 'log_every')
    self.require_not_negative('keep_best', 'z_loss', 'max_logit_loss')
    self.require(0 <= self.seed < 2**32, 'seed', 'at least 0 and below 2^32')
    self.require_rate('label_smoothing')
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
    self.require(
      self.profile is None or self.profile[0] < self.steps,
      'profile',
      f'a first step below steps = {self.steps}',
    )
    self._check_kept()
    self.require(
      all(0 < r.start < r.stop <= self.steps for r in step_ranges(self.skip_steps)),
      'skip_steps',
      f'ranges from 1 to at most steps = {self.steps}, as 1200:1260 for the steps 1200 to 1259',
    )
    self.require(self.remat in REMAT, 'remat', f'a policy{nearest(self.remat, REMAT)}')

  def _check_kept(self) -> None:
    """Raises `InputError` for settings of what is kept that have no effect."""
    self.require_positive('keep_every')
    self.require(
      self.keep_every is None
      or (self.keep_every % self.checkpoint_every == 0 and self.keep_every <= self.steps),
      'keep_every',
      f'a multiple of checkpoint_every = {self.checkpoint_every}, at most steps = {self.steps}, or '
      'none',
    )
    # the last step is always saved and evaluated, and kept as the latest
    meet = math.lcm(self.eval_every, self.checkpoint_every) < self.steps
    both = max(self.eval_every, self.checkpoint_every) < self.steps
    if self.keep_best and both and not meet:
      raise InputError(
        'TrainingConfig.keep_best',
        self.keep_best,
        problem=f'has no effect: checkpoints (every {self.checkpoint_every} steps) are ranked by '
        f'evaluations (every {self.eval_every}), which meet at the last step only; must be 0, or '
        'one interval a multiple of the other',
      )


def step_ranges(texts: Iterable[str]) -> list[range]:
  """Return the ranges of steps that START:END stand for. Raises `InputError`."""
  found = []
  for text in texts:
    if (match := re.fullmatch(r'([0-9]{1,18}):([0-9]{1,18})', text)) is None:
      raise InputError('training.skip_steps', text, 'START:END, as 1200:1260')
    found.append(range(int(match[1]), int(match[2])))
  return found


class RunConfig(Config):
  """The run folder is `dir`/`name`, where `dir` is a folder or gs://BUCKET/FOLDER. The same name
  resumes the run; None stands for a name made from the experiment's digest."""

  name: str | None = None
  dir: str = 'runs'

  def validate(self):
    self.require(
      self.name is None or re.fullmatch(r'[\w][\w.+-]*(/[\w][\w.+-]*)*', self.name) is not None,
      'name',
      'letters, digits and . _ + - (with / between folders)',
    )


class Experiment(Config):
  """A model, its data, and how and where it is trained."""

  model: ModelConfig
  data: DatasetConfig = Text()
  optimizer: OptimizerConfig = AdamW()
  schedule: ScheduleConfig = Cosine()
  training: TrainingConfig = TrainingConfig()
  mesh: MeshConfig = MeshConfig()
  run: RunConfig = RunConfig()

  @property
  def tokens(self) -> int:
    """Positions trained on, padding included: steps x batch size x length, of the last bucket where
    the data have several."""
    return self.training.steps * self.training.batch_size * self.data.positions

  def validate(self):
    longest, length = self.model.max_len, self.data.max_len
    if longest is not None and length > longest:
      raise InputError(
        f'data.{self.data.length_field}',
        length,
        f'at most {longest}, where the learned positions of the model end',
      )
    warmup = self.schedule.warmup_steps(self.training.steps)
    if warmup > self.training.steps:
      raise InputError('schedule.warmup', warmup, f'at most training.steps = {self.training.steps}')
    self.with_changes(self.training.resume_with)

  @property
  def resumed(self) -> 'Experiment':
    """The experiment with the changes of its `training.resume_with`, which it keeps as the mark
    that they are on purpose."""
    given = self.training.resume_with
    changed = self.with_changes(given)
    return changed.replace(training=changed.training.replace(resume_with=given))

  def with_changes(self, given: Sequence[str]) -> 'Experiment':
    """Return the experiment with the settings that `training.resume_with` would give it, and
    nothing in that field. Raises `InputError`."""
    if not self.training.resume_with and not given:
      return self
    pairs = []
    for text in given:
      path, equals, value = text.removeprefix('--').partition('=')
      if not equals or not path:
        raise InputError(
          'training.resume_with', text, 'FIELD=VALUE, as optimizer.learning-rate=3e-4'
        )
      if path.replace('-', '_').startswith(('run.', 'training.resume_with', 'training.skip_steps')):
        raise InputError('training.resume_with', text, problem=f'--{path} itself must be given')
      pairs.append((path, value))
    plain = self.replace(training=self.training.replace(resume_with=()))
    return override(plain, pairs)


LONGEST = 8192  # tokens of a sequence, where neither recipe nor user says more


def default_experiment(model: ModelConfig, name: str) -> Experiment:
  """Return settings with which a tiny model learns something in about a minute on two CPU cores."""
  data: DatasetConfig = Text(sequence_length=min(model.context_length, LONGEST))
  if model.task != data.task:
    fitting = (d for d in _complete_data() if d.task == model.task)
    data = next((d for d in fitting if model.task.too_small(d.task) is None), data)
  # Pairs are short, so that more of them fit into a minute.
  training = (
    TrainingConfig(steps=600, batch_size=32, eval_every=200)
    if model.task == TRANSLATION
    else TrainingConfig(steps=400, batch_size=8)
  )
  return Experiment(
    model=model,
    data=data,
    optimizer=AdamW(learning_rate=3e-3),
    training=training,
    run=RunConfig(name=name),
  )


def check_complete(experiment: Experiment) -> None:
  """Raise `InputError` where corpus or tokenizer have to be given first."""
  check_given(experiment.data.missing())


def _complete_data() -> list[DatasetConfig]:
  """Return the data of every type of the package whose settings all have defaults."""
  return [
    t()
    for t in types_of(DatasetConfig)
    if code_of(t) is None and not any(f.default is f.default_factory for f in dataclasses.fields(t))
  ]


_MODEL_FOR = {
  'pairs': 'an EncoderDecoder',
  'class': 'a Classifier',
  'sequence': 'an Autoencoder (experiments/mad_autoencoder.py)',
  'next_token': 'a LanguageModel',
}


def check_fit(
  model: ModelConfig,
  data: DatasetConfig,
  vocab_size: int | None = None,
  source_vocab_size: int | None = None,
) -> None:
  """Raise `InputError` where the task of the data is not that of the model, or has more tokens or
  classes than the model.

  Args:
    vocab_size, source_vocab_size: of the opened data; by default those that their config knows.
  """
  mine, wanted = model.task, data.task
  if mine != wanted:
    fitting = ', '.join(d.tag for d in _complete_data() if d.task == mine)
    suited = _MODEL_FOR['pairs' if wanted.inputs == 'pairs' else wanted.predicts]
    advice = [] if model.tag in suited else [f'use {suited}']
    advice += [f'use data that fit the model ({fitting})'] if fitting else []
    raise InputError(
      f'data = {data.tag}: the task is "{wanted}", but {model.tag} is a model for "{mine}"'
      + ('; ' + ' or '.join(advice) if advice else '')
    )
  sized = dataclasses.replace(
    wanted,
    vocab_size=vocab_size or wanted.vocab_size,
    source_vocab_size=source_vocab_size or wanted.source_vocab_size,
  )
  if (small := mine.too_small(sized)) is not None:
    name, size, needed = small
    raise InputError(f'model.{name}', size, f'at least {needed}, that of {data.tag}')
