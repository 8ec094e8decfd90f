"""What several test files share."""

from __future__ import annotations

import functools

from jaxformer.ops.implementation import implementation


def forced(f, **names):
  """`f` traced with the implementations of operations that `implementation` would be given."""

  @functools.wraps(f)
  def wrapped(*args, **options):
    with implementation(**names):
      return f(*args, **options)

  return wrapped
