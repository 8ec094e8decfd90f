"""What a model reads and predicts: the task type that models and data sets both declare, and the
batches that pass between them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

# The id that stands for no token: positions without a target, padding of sources, and what follows
# the end of a decoded sequence.
IGNORE = -1

Inputs = Literal['tokens', 'features', 'pairs']
Predicts = Literal['next_token', 'class', 'sequence']


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskType:
  """Inputs and predictions of a model or a data set. A model fits data whose task type is equal.

  Sizes take no part in the comparison: those of the model must be at least those of the data
  (`too_small`). A size is None where it does not apply or is not known yet.

  Attributes:
    inputs: 'tokens', 'features' (a vector of numbers per position), or 'pairs' of a source and a
      target.
    predicts: 'next_token' at each position, one 'class' per sequence, or the whole 'sequence' from
      its last hidden state.
    vocab_size: token ids of the inputs, or of the targets of pairs.
    source_vocab_size: token ids of the sources of pairs.
    classes: number of classes.
    features: numbers per position; compared, since a model reads exactly so many.
  """

  inputs: Inputs = 'tokens'
  predicts: Predicts = 'next_token'
  features: int | None = None
  vocab_size: int | None = dataclasses.field(default=None, compare=False)
  source_vocab_size: int | None = dataclasses.field(default=None, compare=False)
  classes: int | None = dataclasses.field(default=None, compare=False)

  def too_small(self, data: TaskType) -> tuple[str, int, int] | None:
    """Return (name, size, needed) of the first size that is below that of the data, or None."""
    for name in ('vocab_size', 'source_vocab_size', 'classes'):
      size, needed = getattr(self, name), getattr(data, name)
      if size is not None and needed is not None and size < needed:
        return name, size, needed
    return None

  def __str__(self) -> str:
    """Describe the task in words: 'tokens -> next token'."""
    inputs = {'pairs': 'source-target pairs', 'features': f'{self.features} features per position'}
    predicts = {
      'class': 'one class per sequence',
      'sequence': 'the sequence from its last hidden state',
    }
    return f'{inputs.get(self.inputs, "tokens")} -> {predicts.get(self.predicts, "next token")}'


LANGUAGE_MODELING = TaskType()
TRANSLATION = TaskType(inputs='pairs')


class Batch(NamedTuple):
  """Rows to train on or to score, as NumPy or JAX arrays.

  Attributes:
    inputs: what the model reads: token ids `B T`, or features `B T F` in fp32. Of pairs, what the
      decoder reads.
    targets_BT: the id to predict at each position, or IGNORE. Of language modeling the token that
      follows; of classification the class, at the last position of the sequence alone.
    segments_BT: the documents of a row, numbered from 1, with 0 for padding; None where rows hold
      neither a boundary nor padding.
    source_BS: of pairs, the source with the token that ends it, then IGNORE as padding; else None.
  """

  inputs: Any
  targets_BT: Any
  segments_BT: Any = None
  source_BS: Any = None
