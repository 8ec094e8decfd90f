"""Alternative implementations of one operation, and the one place where one of them is chosen.

An `Operation` is a table of functions that compute the same result ('naive', 'chunked', 'pallas',
...), each with the cases that it supports, and an order of preference that depends on the platform
and on the case (shapes, dtypes, what is sharded). While a program is traced every call of an
operation chooses anew; a function that was traced before keeps what was chosen then.

- `implementation(attention='chunked')` forces a choice, for tests and experiments.
- `record_choices()` collects what was chosen while a program was traced.
- `Operation.explain` says what would run for a case, and why the others would not.
"""

from __future__ import annotations

import contextlib
import contextvars
import types
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from jaxformer.config import InputError
from jaxformer.sharding import platform

OPERATIONS = (
  'attention',
  'attentive_decoder',
  'cross_entropy',
  'delta_rule',
  'diagonal_scan',
  'gated_scan',
  'grouped_matmul',
  'gru',
  'input_feeding',
  'latent_attention',
  'lstm',
  'mamba3',
  'mlstm',
  'moe_capacity',
  'moe_dropless',
  'selective_scan',
  'slstm',
  'solve',
  'ssd',
  'ssm',
  'token_scores',
  'wkv4',
  'wkv6',
  'wkv7',
)

# {operation: {implementation that ran: {other implementation: why it did not run}}}
Choices = dict[str, dict[str, dict[str, str]]]

_FORCED: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar(
  'implementation', default=types.MappingProxyType({})
)
_NAMES: set[str] = {'naive'}  # of the implementations of all operations imported so far
_RECORD: contextvars.ContextVar[Choices | None] = contextvars.ContextVar('choices', default=None)


class Operation:
  """A table of implementations and the order in which they are tried.

  Args:
    name: one of `OPERATIONS`, the keyword of `implementation`.
    table: name -> function. The functions take the same arguments.
    order: from the arguments of `choose`, which describe the case, the names to try, the preferred
      one first. At least one of them must support the case.
    unsupported: name -> function from the arguments of `choose` to the reason why this
      implementation cannot compute the case, in words, or None where it can. Implementations that
      are not named support every case.
  """

  def __init__(
    self,
    name: str,
    table: Mapping[str, Callable[..., Any]],
    order: Callable[..., Sequence[str]],
    unsupported: Mapping[str, Callable[..., str | None]] = types.MappingProxyType({}),
  ):
    assert name in OPERATIONS, name
    self.name, self.table, self.order, self.unsupported = name, table, order, unsupported
    _NAMES.update(table)

  def __getitem__(self, name: str) -> Callable[..., Any]:
    return self.table[name]

  def choose(self, *case: Any, **options: Any) -> str:
    """The name of the implementation that computes a case on `sharding.platform()`.

    Raises:
      InputError: the implementation that `implementation` forces is unknown or does not support the
        case.
    """
    forced = _FORCED.get()
    name, every = forced.get(self.name), forced.get('every')
    if name is None and every in self.table:
      name = every
    if name is None:
      name = self._preferred(*case, **options)
    elif name not in self.table:
      raise InputError(f'implementation of {self.name}', name, f'one of {", ".join(self.table)}')
    elif reason := self._reason(name, *case, **options):
      raise InputError(f'implementation of {self.name}', name, problem=reason)
    if (record := _RECORD.get()) is not None:
      ran = record.setdefault(self.name, {})
      ran.setdefault(name, self._why_not(name, *case, **options))
    return name

  def explain(self, *case: Any, **options: Any) -> tuple[str, dict[str, str]]:
    """The implementation that `sharding.platform()` prefers for a case, and why each of the others
    would not run."""
    name = self._preferred(*case, **options)
    return name, self._why_not(name, *case, **options)

  def _reason(self, name: str, *case: Any, **options: Any) -> str | None:
    check = self.unsupported.get(name)
    return None if check is None else check(*case, **options)

  def _preferred(self, *case: Any, **options: Any) -> str:
    order = self.order(*case, **options)
    return next(n for n in order if self._reason(n, *case, **options) is None)

  def _why_not(self, chosen: str, *case: Any, **options: Any) -> dict[str, str]:
    return {
      name: self._reason(name, *case, **options) or f'{chosen} comes first on a {platform()}'
      for name in self.table
      if name != chosen
    }


@contextlib.contextmanager
def implementation(**names: str) -> Generator[None]:
  """Within, `implementation(attention='chunked')` makes attention run that implementation in all
  programs that are traced; `every='naive'` does so for all operations that have one of this name.

  Raises:
    InputError: a keyword is no operation, or no operation has the implementation of `every`.
  """
  for operation, name in names.items():
    if operation != 'every' and operation not in OPERATIONS:
      raise InputError('operation', operation, f'one of {", ".join(OPERATIONS)}')
    if operation == 'every' and name not in _NAMES:
      raise InputError('implementation', name, f'one of {", ".join(sorted(_NAMES))}')
  token = _FORCED.set({**_FORCED.get(), **names})
  try:
    yield
  finally:
    _FORCED.reset(token)


@contextlib.contextmanager
def record_choices() -> Generator[Choices]:
  """Within, the implementations chosen by programs that are traced are collected in the value
  yielded: for each operation the implementations that ran, with the reasons why others did not."""
  choices: Choices = {}
  token = _RECORD.set(choices)
  try:
    yield choices
  finally:
    _RECORD.reset(token)
