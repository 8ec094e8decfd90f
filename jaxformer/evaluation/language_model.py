"""Scores of any model on held-out data: loss, bits per byte, accuracy, and the loss by position and
by source length.

Dims: B batch, T time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxformer.config import InputError
from jaxformer.models.params import Definition, Params
from jaxformer.sharding import Parallel, use_mesh
from jaxformer.task_type import IGNORE, Batch, TaskType


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
  """Sums over all targets.

  Attributes:
    nll_sum: of -log p(target), in nats.
    count: targets.
    bytes: UTF-8 bytes of the text of the targets; None if unknown.
    correct: targets that are the argmax (ties count).
  """

  nll_sum: float
  count: int
  bytes: int | None = None
  correct: int = 0

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


@dataclasses.dataclass(frozen=True)
class PositionLoss:
  """Sums over all targets by position in the document, from 0.

  Attributes:
    nll_sum_T: of -log p(target), in nats, float64.
    count_T: targets, int64.
  """

  nll_sum_T: np.ndarray
  count_T: np.ndarray

  @property
  def loss_T(self) -> np.ndarray:
    """Nats per target; NaN at positions without targets."""
    return np.divide(
      self.nll_sum_T, self.count_T, out=np.full(len(self.count_T), np.nan), where=self.count_T > 0
    )


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
  for nll_BT, correct_BT, targets_BT, _ in _scores(definition, params, batches, parallel, dtype):
    nll_sum += float(nll_BT.sum(dtype=np.float64))  # masked positions are 0
    targets = targets_BT[targets_BT != IGNORE]
    count += targets.size
    correct += int(correct_BT.sum())
    bytes += 0 if token_bytes_V is None else int(token_bytes_V[targets].sum(dtype=np.int64))
  if count == 0:
    raise InputError('evaluation: the batches have no targets')
  return EvalResult(nll_sum, count, None if token_bytes_V is None else bytes, correct)


def loss_by_position(
  definition: Definition,
  params: Params,
  batches: Iterable[Batch],
  *,
  parallel: Parallel | None = None,
  dtype: Any = None,
) -> PositionLoss:
  """Return the loss at each position of a document. Sequences may be longer than in training if the
  model has positions for them. Arguments and errors are those of `evaluate`."""
  nll_sum_T, count_T = np.zeros(0), np.zeros(0, np.int64)
  for nll_BT, _, targets_BT, segments_BT in _scores(definition, params, batches, parallel, dtype):
    counted, length = targets_BT != IGNORE, nll_BT.shape[1]
    if length > len(count_T):
      nll_sum_T, count_T = (np.pad(a, (0, length - len(a))) for a in (nll_sum_T, count_T))
    position = _positions_BT(segments_BT, nll_BT.shape)[counted]
    nll_sum_T += np.bincount(
      position, weights=nll_BT[counted].astype(np.float64), minlength=len(nll_sum_T)
    )
    count_T += np.bincount(position, minlength=len(count_T))
  if not count_T.any():
    raise InputError('evaluation: the batches have no targets')
  return PositionLoss(nll_sum_T, count_T)


def loss_by_source_length(
  definition: Definition,
  params: Params,
  batches: Iterable[Any],
  edges: Sequence[int],
  *,
  dtype: Any = None,
) -> list[EvalResult | None]:
  """Return the scores of pairs by source length.

  `edges` are ascending lengths (without the end of the document): the inclusive upper limits of the
  groups; longer sources are the last group. None for a group without targets. Errors are those of
  `evaluate`."""
  chosen, groups = list(batches), len(edges) + 1
  nll_sum_G, count_G, correct_G = (
    np.zeros(groups),
    np.zeros(groups, np.int64),
    np.zeros(groups, np.int64),
  )
  scored = _scores(definition, params, chosen, None, dtype)
  for batch, (nll_BT, correct_BT, targets_BT, _) in zip(chosen, scored, strict=True):
    group_B = np.searchsorted(edges, (np.asarray(batch.source_BS) != IGNORE).sum(axis=1) - 1)
    for values_BT, sums_G in (
      (nll_BT.astype(np.float64), nll_sum_G),
      (targets_BT != IGNORE, count_G),
      (correct_BT, correct_G),
    ):
      np.add.at(sums_G, group_B, values_BT[: len(group_B)].sum(axis=1))
  return [
    EvalResult(float(n), int(c), None, int(h)) if c else None
    for n, c, h in zip(nll_sum_G, count_G, correct_G, strict=True)
  ]


def _positions_BT(segments_BT: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
  index_BT = np.broadcast_to(np.arange(shape[1]), shape)
  if segments_BT is None:
    return index_BT
  starts_BT = np.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)))
  return index_BT - np.maximum.accumulate(np.where(starts_BT, index_BT, 0), axis=1)


# ---- one program over all batches --------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=('definition', 'parallel'))
def _scored(
  definition: Definition, params: Params, batch: Batch, parallel: Parallel | None
) -> tuple[Float[Array, 'B T'], Bool[Array, 'B T'], Int[Array, 'B T'], Int[Array, 'B T'] | None]:
  """-log p, correct, targets and segments, for the host to sum."""
  model: Any = definition.merge(params)
  result: Any = *model.scores(batch), batch.targets_BT, batch.segments_BT
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
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]]:
  """-log p, correct, targets and segments of every batch. While the device computes one, the host
  sums the one before."""
  if dtype is not None:
    params = definition.cast(params, dtype)
  rows, pending = 0, None
  for batch in batches:
    checked = _checked(definition, batch)
    shards = 1 if parallel is None else -(-parallel.batch_shards // jax.process_count())
    rows = max(rows, -(-len(checked.targets_BT) // shards) * shards)
    with contextlib.nullcontext() if parallel is None else use_mesh(parallel):
      scored = _scored(definition, params, _placed(_filled(checked, rows), parallel), parallel)
    if pending is not None:
      yield _fetched(pending)
    pending = scored
  if pending is not None:
    yield _fetched(pending)


def _checked(definition: Definition, batch: Batch) -> Batch:
  config = definition.config
  task: TaskType = config.task
  inputs = np.asarray(batch.inputs, np.float32 if task.inputs == 'features' else np.int32)
  source = np.asarray(batch.source_BS, np.int32) if task.inputs == 'pairs' else None
  targets = np.asarray(batch.targets_BT, np.int32)
  kind = 'number of classes' if task.predicts == 'class' else 'vocabulary'
  for name, ids, low, end, what in (
    ('source tokens', source, IGNORE, task.source_vocab_size, 'vocabulary'),  # -1 is padding
    ('tokens', inputs, 0, task.vocab_size, 'vocabulary'),
    ('targets', targets, IGNORE, task.classes or task.vocab_size, kind),
  ):
    if ids is not None and end is not None and ids.size and (ids.min() < low or ids.max() >= end):
      raise InputError(
        f'evaluation: {name} from {ids.min()} to {ids.max()}: must be below the {what} of {end}'
      )
  config.check_length(max(targets.shape[1], 0 if source is None else source.shape[1]))
  return Batch(
    inputs,
    targets,
    None if batch.segments_BT is None else np.asarray(batch.segments_BT, np.int32),
    source,
  )


def _filled(batch: Batch, rows: int) -> Batch:
  extra = ((0, rows - len(batch.targets_BT)), (0, 0))
  segments = None if batch.segments_BT is None else np.pad(batch.segments_BT, extra)
  inputs = np.pad(batch.inputs, (*extra, *((0, 0),) * (batch.inputs.ndim - 2)))
  source = (
    None if batch.source_BS is None else np.pad(batch.source_BS, extra, constant_values=IGNORE)
  )
  return Batch(inputs, np.pad(batch.targets_BT, extra, constant_values=IGNORE), segments, source)


def _placed(batch: Batch, parallel: Parallel | None) -> Batch:
  if parallel is None:
    return batch
  where = parallel.batch
  return jax.tree.map(lambda a: jax.make_array_from_process_local_data(where, a), batch)


def _fetched(scored: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
  return jax.tree.map(np.asarray, scored)
