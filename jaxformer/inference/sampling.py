"""From logits to a token: greedy, or sampled after the usual filters.

Dims: B batch, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxformer.config import Config

OFF = {'repetition_penalty': 1.0, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0}
"""Values that change nothing, as in other libraries; they are the same as None."""


class Sampling(Config):
  """How the next token is chosen. The filters apply in the order of the fields below, as in Hugging
  Face transformers.

  Attributes:
    repetition_penalty: divides the positive and multiplies the negative logits of all tokens of the
      prompt and the text so far (CTRL, Keskar et al. 2019, section 4.1); None or 1 for none.
    temperature: divides the logits; 0 is greedy decoding.
    top_k: keep the k most likely tokens, with ties at the last of them (Fan et al. 2018);
      None or 0 for all.
    top_p: keep the smallest set of most likely tokens with mass at least p (nucleus sampling,
      Holtzman et al. 2020); None or 1 for all.
    min_p: keep tokens with at least min_p times the probability of the argmax (Nguyen et al.
      2024); None or 0 for all.
  """

  repetition_penalty: float | None = None
  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None
  min_p: float | None = None

  def validate(self):
    # Comparisons are written so that NaN fails them; numbers beyond these are not finite in fp32.
    self.require(
      self.temperature == 0 or 1e-6 <= self.temperature <= 1e6,
      'temperature',
      'at least 0, where 0 is greedy, and else from 1e-6 to 1e6',
    )
    rules = (
      ('repetition_penalty', lambda r: 1e-6 <= r <= 1e6, 'from 1e-6 to 1e6'),
      ('top_k', lambda k: k >= 0, 'at least 0'),
      ('top_p', lambda p: 0 < p <= 1, 'above 0 and at most 1'),
      ('min_p', lambda m: 0 <= m <= 1, 'at least 0 and at most 1'),
    )
    for field, holds, accepted in rules:
      value = getattr(self, field)
      self.require(value is None or holds(value), field, f'{accepted}, or none')
      self.require(
        value in (None, OFF[field]) or self.temperature > 0 or field == 'repetition_penalty',
        field,
        'none at temperature 0, where it has no effect (greedy)',
      )

  def simplified(self) -> 'Sampling':
    """Return this with None for every setting that changes nothing."""
    return self.replace(**{f: None for f, off in OFF.items() if getattr(self, f) == off})


PLAIN = Sampling()  # from the model's distribution
GREEDY = Sampling(temperature=0.0)


def sample(
  keys_B: Key[Array, ' B'] | None,
  logits_BV: Float[Array, 'B V'],
  seen_BV: Bool[Array, 'B V'] | None,
  sampling: Sampling,
) -> Int[Array, ' B']:
  """Sample a token for each row with its own key, so that a row does not depend on the others.

  `seen_BV` marks the tokens that the row already has; it may be None without a repetition penalty,
  and `keys_B` at temperature 0."""
  logits_BV = filtered(logits_BV, seen_BV, sampling)
  if sampling.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  if keys_B is None:
    raise ValueError('a draw needs a key for each row')
  return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def filtered(
  logits_BV: Float[Array, 'B V'], seen_BV: Bool[Array, 'B V'] | None, sampling: Sampling
) -> Float[Array, 'B V']:
  """The logits, fp32, whose softmax is the distribution that `sample` draws from: -inf for excluded
  tokens."""
  s, logits_BV = sampling.simplified(), logits_BV.astype(jnp.float32)
  if s.repetition_penalty is not None:
    if seen_BV is None:
      raise ValueError('a repetition penalty needs to know which tokens were seen')
    penalised = jnp.where(
      logits_BV > 0, logits_BV / s.repetition_penalty, logits_BV * s.repetition_penalty
    )
    logits_BV = jnp.where(seen_BV, penalised, logits_BV)
  if s.temperature == 0:
    return logits_BV
  logits_BV = logits_BV / s.temperature
  if s.top_k is not None:
    logits_BV = _top_k(logits_BV, s.top_k)
  if s.top_p is not None:
    logits_BV = _top_p(logits_BV, s.top_p)
  if s.min_p is not None:
    probabilities = jax.nn.softmax(logits_BV, axis=-1)
    logits_BV = jnp.where(
      probabilities >= s.min_p * probabilities.max(-1, keepdims=True), logits_BV, -jnp.inf
    )
  return logits_BV


def _top_k(logits_BV: Array, k: int) -> Array:
  last = jax.lax.top_k(logits_BV, min(k, logits_BV.shape[-1]))[0][:, -1:]
  return jnp.where(logits_BV >= last, logits_BV, -jnp.inf)


def _top_p(logits_BV: Array, p: float) -> Array:
  # ties: the lower id first
  order = jnp.argsort(-logits_BV, axis=-1, stable=True)
  sorted_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order, axis=-1), axis=-1)
  # a token is kept while those before it have mass below p; the first always is
  before = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
  rank = jnp.argsort(order, axis=-1)  # the inverse permutation
  kept = (
    jnp.take_along_axis(before < p, rank, axis=-1).at[jnp.arange(len(order)), order[:, 0]].set(True)
  )
  return jnp.where(kept, logits_BV, -jnp.inf)
