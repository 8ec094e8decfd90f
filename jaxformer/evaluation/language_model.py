"""Scores of any model on held-out data: loss, bits per byte, accuracy, and the loss by position and
by source length.

Dims: B batch, T time.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxformer.config import InputError
from jaxformer.evaluation.translation import TranslationResult
from jaxformer.models.params import Definition, Params
from jaxformer.sharding import Parallel, use_mesh
from jaxformer.task_type import IGNORE, Batch, TaskType

SHOWN_POSITIONS = (0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 1023, 2047, 4095)
Scores = tuple[np.ndarray, np.ndarray, Batch]
"""-log p and whether the target is the argmax, `B T`, and the batch without its inputs."""


def bits_per_byte(nll_sum: float, bytes: int) -> float:
  """Convert a sum of negative log-likelihoods in nats to bits per byte of text: nll_sum / (bytes ln
  2).

  Independent of the tokenizer if `bytes` are the UTF-8 bytes of the text of the counted
  targets."""
  if bytes < 1:
    raise InputError('bytes', bytes, 'positive')
  return nll_sum / (bytes * math.log(2))


@dataclasses.dataclass(frozen=True)
class EvalResult:
  """Scores of a model: sums over all targets, and what is reported with them.

  Attributes:
    nll_sum: of -log p(target), in nats.
    count: targets.
    bytes: UTF-8 bytes of the text of the targets; None if unknown.
    correct: targets that are the argmax (ties count).
    name, step: of the model; None if it has none.
    weights: what its parameters are, in words; None if unknown.
    source: of the data; None if unknown.
    held_out: what the sequences that were scored are called.
    validation_sha256: their hash (`Dataset.validation_sha256`); None if unknown.
    of_run: whether they are those that the run of the model holds out; None if unknown.
    baselines: bits per byte of models of single bytes, by name ('unigram_bits_per_byte'); empty for
      data other than text.
    translation: scores of translations; None for data other than pairs.
    loss_by_position: nats per target at each position, None at one without targets; None if not
      measured.
  """

  nll_sum: float
  count: int
  bytes: int | None = None
  correct: int = 0
  name: str | None = None
  step: int | None = None
  weights: str | None = None
  source: str | None = None
  held_out: str = 'held-out data'
  validation_sha256: str | None = None
  of_run: bool | None = None
  baselines: dict[str, float] = dataclasses.field(default_factory=dict)
  translation: TranslationResult | None = None
  loss_by_position: list[float | None] | None = None

  @property
  def loss(self) -> float:
    """Nats per target."""
    return self.nll_sum / self.count

  @property
  def accuracy(self) -> float:
    """Top-1 accuracy."""
    return self.correct / self.count

  @property
  def perplexity(self) -> float:
    """exp(loss), inf where that is beyond a float."""
    return math.exp(self.loss) if self.loss < 700 else math.inf

  @property
  def bits_per_byte(self) -> float | None:
    """None without `bytes`."""
    return None if self.bytes is None else bits_per_byte(self.nll_sum, self.bytes)

  def json(self) -> dict[str, Any]:
    """The scores as JSON data."""
    value: dict[str, Any] = {
      'run': self.name,
      'step': self.step,
      'weights': self.weights,
      'source': self.source,
      'validation_sha256': self.validation_sha256,
      'of_run': self.of_run,
      'loss': self.loss,
      'targets': self.count,
    }
    if self.bytes is not None:
      names = 'bits_per_byte', 'perplexity', 'bytes'
      value |= {name: getattr(self, name) for name in names}
    if not self.baselines:
      value['accuracy'] = self.accuracy
    value |= self.baselines
    if self.translation is not None:
      value['translation'] = self.translation.json()
    if self.loss_by_position is not None:
      value['loss_by_position'] = self.loss_by_position
    return value

  def lines(self) -> list[str]:
    """The scores for a reader."""
    weights = '' if self.weights is None else f' ({self.weights})'
    weights = weights if self.step is None else f' at step {self.step}'
    other = ', which the run does not hold out' if self.of_run is False else ''
    name = '' if self.name is None else f'{self.name}{weights}, {self.held_out}{other}: '
    head = f'{name}{self.count:,} targets'
    if self.bytes is None:
      lines = [head, f'  {self.accuracy:.2%} correct, {self.loss:.4f} nats per target']
    else:
      known = ', '.join(f'{n.partition("_")[0]} {v:.4f}' for n, v in self.baselines.items())
      known = f' (models of bytes: {known})' if known else ''
      lines = [
        f'{head}, {self.bytes:,} bytes',
        f'  {self.bits_per_byte:.4f} bits per byte{known}',
        f'  {self.loss:.4f} nats per token, perplexity {self.perplexity:.2f}, top-1 accuracy '
        f'{self.accuracy:.2%}',
      ]
    if self.translation is not None:
      lines += [f'  {line}' for line in self.translation.lines()]
    if self.loss_by_position is not None:
      losses = dict(enumerate(self.loss_by_position))
      at = (f'{i}: {losses[i]:.3f}' for i in SHOWN_POSITIONS if losses.get(i) is not None)
      lines.append(f'  nats at position {", ".join(at)}')
    return lines


def evaluate(
  definition: Definition,
  params: Params,
  batches: Iterable[Batch],
  *,
  token_bytes_V: Int[np.ndarray, ' V'] | None = None,
  parallel: Parallel | None = None,
  dtype: Any = None,
) -> EvalResult:
  """Score a model of any type on all targets of `batches`, each counted once, whatever the batch
  size.

  Args:
    batches: a batch with fewer rows than the first is padded with rows without targets, so that one
      program serves all.
    token_bytes_V: number of UTF-8 bytes of each token of the tokenizer, for bits per byte.
    parallel: mesh and rules of the parameters; None for one device. Each process passes its rows of
      a batch, and all receive the sums.
    dtype: compute dtype; None for that of the parameters.

  Raises:
    InputError: no targets, token ids out of range, or sequences longer than the model has
      positions.
  """
  nll_sum, count, bytes, correct = 0.0, 0, 0, 0
  for nll_BT, correct_BT, batch in _scores(definition, params, batches, parallel, dtype):
    nll_sum += float(nll_BT.sum(dtype=np.float64))  # masked positions are 0
    targets = batch.targets_BT[batch.targets_BT != IGNORE]
    count += targets.size
    correct += int(correct_BT.sum())
    bytes += 0 if token_bytes_V is None else int(token_bytes_V[targets].sum(dtype=np.int64))
  if count == 0:
    raise InputError('evaluation: the batches have no targets')
  return EvalResult(nll_sum, count, None if token_bytes_V is None else bytes, correct)


def loss_by_position(
  definition: Definition, params: Params, batches: Iterable[Batch], *, dtype: Any = None
) -> list[EvalResult | None]:
  """Return the scores at each position of a document, from 0 to the last with targets; None for one
  without. Sequences may be longer than in training if the model has positions for them. Arguments
  and errors are those of `evaluate`."""
  found = _grouped(_scores(definition, params, batches, None, dtype), _positions_BT)
  if not found:
    raise InputError('evaluation: the batches have no targets')
  return [found.get(position) for position in range(max(found) + 1)]


def loss_by_source_length(
  definition: Definition, params: Params, batches: Iterable[Batch], edges: Sequence[int]
) -> list[EvalResult | None]:
  """Return the scores of pairs by source length.

  `edges` are ascending lengths (without the end of the document): the inclusive upper limits of the
  groups; longer sources are the last group. None for a group without targets. Errors are those of
  `evaluate`."""

  def group_BT(batch: Batch) -> np.ndarray:
    group_B = np.searchsorted(edges, (batch.source_BS != IGNORE).sum(axis=1) - 1)
    return np.broadcast_to(group_B[:, None], batch.targets_BT.shape)

  found = _grouped(_scores(definition, params, batches, None, None), group_BT)
  return [found.get(group) for group in range(len(edges) + 1)]


def _grouped(
  scores: Iterable[Scores], group_BT: Callable[[Batch], np.ndarray]
) -> dict[int, EvalResult]:
  """The scores of each group of targets that has any."""
  sums_G3 = np.zeros((0, 3))
  for nll_BT, correct_BT, batch in scores:
    counted_BT = batch.targets_BT != IGNORE
    group, values_BT3 = group_BT(batch)[counted_BT], np.stack([nll_BT, counted_BT, correct_BT], -1)
    missing = max(0, group.max(initial=-1) + 1 - len(sums_G3))
    sums_G3 = np.pad(sums_G3, ((0, missing), (0, 0)))
    np.add.at(sums_G3, group, values_BT3[counted_BT])
  return {
    group: EvalResult(float(nll), int(count), correct=int(correct))
    for group, (nll, count, correct) in enumerate(sums_G3)
    if count
  }


def _positions_BT(batch: Batch) -> np.ndarray:
  """The position of each target in its document."""
  shape, segments_BT = batch.targets_BT.shape, batch.segments_BT
  index_BT = np.broadcast_to(np.arange(shape[1]), shape)
  if segments_BT is None:
    return index_BT
  starts_BT = np.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)))
  return index_BT - np.maximum.accumulate(np.where(starts_BT, index_BT, 0), axis=1)


# ---- one program over all batches --------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=('definition', 'parallel'))
def _scored(
  definition: Definition, params: Params, batch: Batch, parallel: Parallel | None
) -> tuple[Float[Array, 'B T'], Bool[Array, 'B T'], Batch]:
  """-log p, correct, and the batch without inputs, for the host to sum."""
  model: Any = definition.merge(params)
  result: Any = *model.scores(batch), batch._replace(inputs=None)
  # Every process receives all rows; these are few numbers to all-gather.
  if parallel is None:
    return result
  return jax.lax.with_sharding_constraint(result, parallel.replicated)


def _scores(
  definition: Definition,
  params: Params,
  batches: Iterable[Batch],
  parallel: Parallel | None,
  dtype: Any,
) -> Iterator[Scores]:
  """The scores of every batch. While the device computes one, the host sums the one before."""
  if dtype is not None:
    params = definition.cast(params, dtype)
  rows, pending = 0, None
  for batch in batches:
    checked = _checked(definition, batch)
    shards = 1 if parallel is None else -(-parallel.batch_shards // jax.process_count())
    rows = max(rows, -(-len(checked.targets_BT) // shards) * shards)
    with use_mesh(parallel):
      scored = _scored(definition, params, _placed(_filled(checked, rows), parallel), parallel)
    if pending is not None:
      yield jax.tree.map(np.asarray, pending)
    pending = scored
  if pending is not None:
    yield jax.tree.map(np.asarray, pending)


def _checked(definition: Definition, batch: Batch) -> Batch:
  config = definition.config
  task: TaskType = config.task
  inputs = np.float32 if task.inputs == 'features' else np.int32
  types = Batch(inputs, np.int32, np.int32, np.int32)
  checked = Batch(*(a if a is None else np.asarray(a, t) for a, t in zip(batch, types)))
  kind = 'number of classes' if task.predicts == 'class' else 'vocabulary'
  for name, ids, low, end, what in (
    ('source tokens', checked.source_BS, IGNORE, task.source_vocab_size, 'vocabulary'),
    ('tokens', checked.inputs, 0, task.vocab_size, 'vocabulary'),
    ('targets', checked.targets_BT, IGNORE, task.classes or task.vocab_size, kind),
  ):
    if ids is not None and end is not None and ids.size and (ids.min() < low or ids.max() >= end):
      raise InputError(
        f'evaluation: {name} from {ids.min()} to {ids.max()}: must be below the {what} of {end}'
      )
  for ids in (checked.targets_BT, checked.source_BS):
    if ids is not None:
      config.check_length(ids.shape[1])
  return checked


def _filled(batch: Batch, rows: int) -> Batch:
  """The batch with rows without targets up to `rows`."""

  def filled(a: np.ndarray, value: int) -> np.ndarray:
    extra = ((0, rows - len(a)), *((0, 0),) * (a.ndim - 1))
    return np.pad(a, extra, constant_values=value)

  padding = Batch(0, IGNORE, 0, IGNORE)
  return Batch(*(a if a is None else filled(a, v) for a, v in zip(batch, padding)))


def _placed(batch: Batch, parallel: Parallel | None) -> Batch:
  if parallel is None:
    return batch
  where = parallel.batch
  return jax.tree.map(lambda a: jax.make_array_from_process_local_data(where, a), batch)
