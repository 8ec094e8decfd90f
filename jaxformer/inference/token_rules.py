"""Rules of which tokens may be generated, whatever the model predicts.

Dims: B rows (beam search: each hypothesis), V vocabulary.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxformer.config import Config, InputError


class TokenRules(Config):
  """Tokens that are never generated, that are forced, and that end a text, as weights of other
  libraries are published with. All are token ids.

  Attributes:
    ends: tokens that end a text, besides the one that is given with each request.
    never: tokens that are never chosen.
    first: the first new token; None for the model's choice.
    never_first: tokens that are not chosen as the first new token, or as the one after `first`.
    last: the token at the limit of new tokens; None for the model's choice.
  """

  ends: tuple[int, ...] = ()
  never: tuple[int, ...] = ()
  never_first: tuple[int, ...] = ()
  first: int | None = None
  last: int | None = None

  def check(self, vocab_size: int) -> None:
    """Raise `InputError` for a token that is not in the vocabulary."""
    single = {'first': self.first, 'last': self.last}
    several = {'ends': self.ends, 'never': self.never, 'never_first': self.never_first}
    given = several | {field: () if t is None else (t,) for field, t in single.items()}
    for field, tokens in given.items():
      if wrong := [t for t in tokens if not 0 <= t < vocab_size]:
        accepted = f'at least 0 and below the vocabulary of {vocab_size}'
        raise InputError(f'{self.tag}.{field}', wrong[0], accepted)

  def is_end(self, token_B: Int[Array, ' B'], end: Int[Array, '']) -> Bool[Array, ' B']:
    """Return which tokens end a text."""
    found = token_B == end
    for other in self.ends:
      found |= token_B == other
    return found

  def allowed(
    self,
    scores_BV: Float[Array, 'B V'],
    count: Int[Array, ''],
    at_limit_B: Bool[Array, ' B'] | None = None,
  ) -> Float[Array, 'B V']:
    """Return logits or log p with -inf for tokens that may not come, and 0 for a token that must.

    Args:
      count: new tokens before this one.
      at_limit_B: whether this is the last new token of a row; None if no token is forced there.
    """
    V = scores_BV.shape[-1]
    if self.never:
      scores_BV = jnp.where(_mask(self.never, V)[None], -jnp.inf, scores_BV)
    if self.never_first:
      barred = (count == (0 if self.first is None else 1)) & _mask(self.never_first, V)
      scores_BV = jnp.where(barred[None], -jnp.inf, scores_BV)
    if self.first is not None:
      scores_BV = jnp.where(count == 0, _forced(self.first, scores_BV), scores_BV)
    if self.last is not None and at_limit_B is not None:
      scores_BV = jnp.where(at_limit_B[:, None], _forced(self.last, scores_BV), scores_BV)
    return scores_BV


FREE = TokenRules()
"""No rules."""


def _mask(tokens: Sequence[int], V: int) -> Array:
  return jnp.asarray(np.isin(np.arange(V), tokens))


def _forced(token: int, scores_BV: Array) -> Array:
  V = scores_BV.shape[-1]
  return jnp.where(jnp.arange(V) == token, 0.0, -jnp.inf)[None].astype(scores_BV.dtype)
