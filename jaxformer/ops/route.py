"""Which form of an operation runs: each chooses by platform and shape, and `route` overrules it,
for tests and experiments."""

from __future__ import annotations

import contextlib
import contextvars
import types
from collections.abc import Generator, Mapping

_FORCED: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar(
  'route', default=types.MappingProxyType({})
)


@contextlib.contextmanager
def route(**forms: str) -> Generator[None]:
  """Within, `route(attention='chunked')` makes attention take that form while a program is traced;
  `every='naive'` goes for all operations. A function that was jitted and traced before keeps the
  form that it was traced with."""
  token = _FORCED.set({**_FORCED.get(), **forms})
  try:
    yield
  finally:
    _FORCED.reset(token)


def forced(operation: str) -> str | None:
  """The form that `route` asks for, or None where the operation shall choose."""
  forms = _FORCED.get()
  return forms.get(operation, forms.get('every'))
