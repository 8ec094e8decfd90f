"""ListOps: nested lists of operations on digits, and their values."""

import random

import numpy as np

from jaxformer.config import InputError
from jaxformer.data.shuffle import Index
from jaxformer.data.tasks.task import GeneratedTask, Side, labelled
from jaxformer.task_type import Batch, TaskType

OPERATORS = ('MAX', 'MIN', 'MED', 'SM')
CLOSE = 10 + len(OPERATORS)
TRIES = 10_000
NESTED = 0.25  # probability that an argument is a list
NAMES = (*'0123456789', *(f'[{name}' for name in OPERATORS), ']')


class ListOps(GeneratedTask):
  """The value, 0 to 9, of an expression such as `[MAX 2 9 [MIN 4 7 ] 0 ]` (Nangia and Bowman 2018;
  at the lengths of the Long Range Arena, Tay et al. 2021, section 2.2.1).

  Operators: maximum, minimum, median (of an even number, the mean of the middle two rounded down),
  sum modulo 10. A list has 2 to `max_args` arguments, each a list with probability 1/4 down to
  `max_depth` nested lists, else a digit. Expressions are drawn until one has more than `min_length`
  and fewer than `max_length` tokens. Tokens: the ten digits, four operators with their brackets,
  the closing bracket; parentheses of binary trees are left out, as in the Long Range Arena.

  Training repeats `train_sequences` expressions; None generates new ones without end. Expressions
  are generated on demand, in a few milliseconds each at the published lengths.
  """

  max_depth: int = 10
  max_args: int = 10
  min_length: int = 500
  max_length: int = 2000
  train_sequences: int | None = 96_000
  test_sequences: int = 2000

  def validate(self) -> None:
    self.require(self.max_depth >= 2, 'max_depth', 'at least 2: the digit inside a list counts')
    self.require(self.max_args >= 2, 'max_args', 'at least 2')
    self.require_not_negative('min_length')
    largest = expression_length(self.max_depth, self.max_args)
    self.require(
      self.min_length + 1 < largest,
      'min_length',
      f'below {largest - 1}, since no expression of this depth is longer',
    )
    self.require(
      self.max_length > max(self.min_length + 1, 4),
      'max_length',
      'at least 5 and 2 more than min_length',
    )
    super().validate()

  @property
  def positions(self) -> int:
    return self.max_length

  @property
  def task(self) -> TaskType:
    return TaskType(predicts='class', vocab_size=len(NAMES), classes=10)

  def rows(self, side: Side, index_N: Index) -> Batch:
    seeds = self.random_bits(side, index_N, 1)[:, 0]
    drawn = [self._draw(int(s)) for s in seeds]
    tokens = np.zeros((index_N.size, self.max_length), np.int32)
    for row, (expression, _) in zip(tokens, drawn, strict=True):
      row[: len(expression)] = expression
    return labelled(
      tokens,
      np.array([value for _, value in drawn], np.int64),
      np.array([len(e) for e, _ in drawn], np.int64),
    )

  def _draw(self, seed: int) -> tuple[list[int], int]:
    """Return the tokens and the value of an expression."""
    # The one generator of the standard library whose numbers are guaranteed to stay the same.
    uniform = random.Random(seed).random
    for _ in range(TRIES):
      tokens: list[int] = []
      # A digit alone is never long enough, so the outermost is a list; one that grows too long is
      # abandoned.
      value = self._list(uniform, tokens, 1)
      if self.min_length < len(tokens) < self.max_length:
        return tokens, value
    raise InputError(
      f'{self.tag}.min_length',
      self.min_length,
      problem=f'of {TRIES:,} expressions none is longer, and shorter than max_length = '
      f'{self.max_length}; needs bounds further apart, or a larger max_depth or max_args',
    )

  def _list(self, uniform, tokens: list[int], depth: int) -> int:
    """Append the tokens of a list, and return its value."""
    operator, values = int(uniform() * len(OPERATORS)), []
    tokens.append(10 + operator)
    for _ in range(2 + int(uniform() * (self.max_args - 1))):
      if len(tokens) >= self.max_length:
        return 0
      if depth < self.max_depth - 1 and uniform() < NESTED:
        values.append(self._list(uniform, tokens, depth + 1))
      else:
        values.append(int(uniform() * 10))
        tokens.append(values[-1])
    tokens.append(CLOSE)
    return apply(OPERATORS[operator], values)


def apply(operator: str, values: list[int]) -> int:
  """Return the value of an operator for its arguments."""
  if operator == 'SM':
    return sum(values) % 10
  if operator == 'MED':
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) // 2
  return max(values) if operator == 'MAX' else min(values)


def expression_length(max_depth: int, max_args: int) -> int:
  """Return the number of tokens of the largest expression."""
  length = 1
  for _ in range(max_depth - 1):
    length = 2 + max_args * length
  return length
