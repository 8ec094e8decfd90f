"""What several test files share."""

from __future__ import annotations

import contextlib
import functools

from jaxformer.config import Config, forget, types_of
from jaxformer.ops.implementation import implementation


def forced(f, **names):
  """`f` traced with the implementations of operations that `implementation` would be given."""

  @functools.wraps(f)
  def wrapped(*args, **options):
    with implementation(**names):
      return f(*args, **options)

  return wrapped


@contextlib.contextmanager
def temporary_types():
  """Within, config types may be defined; at the end they leave the registry."""
  before = types_of(Config)
  try:
    yield
  finally:
    for cls in types_of(Config):
      if cls not in before:
        forget(cls)
