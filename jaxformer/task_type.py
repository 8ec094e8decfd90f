"""What a model reads and predicts, as one value that models and data sets both declare."""

from __future__ import annotations

import dataclasses
from typing import Literal

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
    inputs = self.inputs if self.features is None else f'{self.features} features per position'
    return f'{inputs} -> {self.predicts.replace("_", " ")}'
