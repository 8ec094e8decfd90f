"""Beam search on the device: one program from the source's tokens to the best hypotheses. A beam of
width 1 is greedy decoding.

Dims: B batch, S source, K width of the beam, N most new tokens, V vocabulary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformer.config import Config, InputError
from jaxformer.inference.decoding import STEP, tokens_only
from jaxformer.inference.token_rules import FREE, TokenRules
from jaxformer.models.encoder_decoder import DecoderState, EncoderDecoder
from jaxformer.models.params import Definition, Params
from jaxformer.task_type import IGNORE


class Beam(Config):
  """Beam search (Sutskever et al. 2014, section 3.2) with the penalties of GNMT (Wu et al. 2016,
  section 7).

  The `width` most likely hypotheses are kept; a finished one stays in the beam, and the search
  continues with the others until all are finished. The best has the largest

    log p(Y | X) / lp(Y) + cp(X, Y),  lp = ((5 + |Y|) / 6)^length_penalty,  cp = coverage_penalty
    sum_i log min(sum_j a_ij, 1)

  where |Y| includes the end and a_ij is the attention of step j to source token i, averaged over
  layers; an unfinished hypothesis ranks below every finished one.

  Attributes:
    width: 1 is greedy decoding.
    length_penalty: 0 for none; GNMT's alpha, 0.2 there and 0.6 in Vaswani et al. 2017.
    coverage_penalty: 0 for none; GNMT's beta, 0.2 there.
  """

  width: int = 4
  length_penalty: float = 0.0
  coverage_penalty: float = 0.0

  def validate(self):
    self.require_positive('width')
    for field in ('length_penalty', 'coverage_penalty'):
      self.require(0 <= getattr(self, field) < float('inf'), field, 'at least 0')


GREEDY_BEAM = Beam(width=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hypotheses:
  """Results of a search, for each source the best first.

  Attributes:
    tokens_BKN: without the end, then -1 as padding.
    length_BK: tokens, the end included.
    log_p_BK: log p(tokens and end | source), in nats.
    score_BK: with the penalties.
    finished_BK: whether the hypothesis has its end; False where it reached the limit.
  """

  tokens_BKN: Int[Array, 'B K N']
  length_BK: Int[Array, 'B K']
  log_p_BK: Float[Array, 'B K']
  score_BK: Float[Array, 'B K']
  finished_BK: Bool[Array, 'B K']

  def done_BK(self, limit_B: Array) -> Array:
    """Which hypotheses no longer change: they are finished or have reached their limit."""
    return self.finished_BK | (self.length_BK >= limit_B[:, None])


SearchState = tuple[Hypotheses, Array, Array | None, DecoderState, Array]
"""Loop state of a search: the hypotheses so far; the last token of each, not yet read, `B K`; the
attention that each source token has received so far, `B K S`, None without a coverage penalty; the
decoder's state after all tokens but the last; and the number of steps."""


@functools.partial(
  jax.jit, static_argnames=('definition', 'beam', 'max_new_tokens', 'vocab_size', 'rules', 'where')
)
def beam_search(
  definition: Definition[EncoderDecoder],
  params: Params,
  source_BS: Int[Array, 'B S'],
  begin: Int[Array, ''],
  end: Int[Array, ''],
  limit_B: Int[Array, ' B'],
  *,
  beam: Beam,
  max_new_tokens: int,
  vocab_size: int | None = None,
  rules: TokenRules = FREE,
  where: Any = None,
) -> Hypotheses:
  """Search for the best translations of every source, in one program. Width 1 is greedy decoding.

  Args:
    source_BS: padded with -1 at the end of a row.
    begin, end: the token that the decoder reads first, and the one that ends a hypothesis.
    limit_B: maximum number of tokens for each source, the end included.
    max_new_tokens: N, the length of the token buffer.
    vocab_size: tokens from here on are never chosen; None if every row of the head is a token.
    rules: of which tokens may come, and which end a hypothesis besides `end`.
    where: mesh and rules, on which the program depends.
  """
  model = definition.merge(params)
  start = _initial_search(definition, model, params, source_BS, begin, beam, max_new_tokens)

  def keep_going(carry: SearchState) -> Array:
    """Whether any hypothesis still changes."""
    found, *_, count = carry
    done_BK = found.done_BK(limit_B) | jnp.isneginf(found.log_p_BK)
    return ~done_BK.all() & (count < max_new_tokens)

  def step(carry: SearchState) -> SearchState:
    found, token_BK, coverage_BKS, decoder, count = carry
    (B, K), covers = token_BK.shape, coverage_BKS is not None
    out = model.step(token_BK.reshape(-1), STEP.replace(align=covers), decoder)
    # rows of the head that are no tokens have their share of the mass
    log_p = jax.nn.log_softmax(out.y.astype(jnp.float32), axis=-1)
    at_limit_B = jnp.repeat(count == limit_B - 1, K)
    log_p = rules.allowed(tokens_only(log_p, vocab_size), count, at_limit_B)
    log_p_BKV = log_p.reshape(B, K, -1)
    parent_BK, token_BK, log_p_BK = _extend(log_p_BKV, found.log_p_BK, found.done_BK(limit_B))
    decoder = out.state
    attention: Any = _mean_attention(out.alignments).reshape(B, K, -1) if covers else None
    if parent_BK is not None:
      rows = (parent_BK + K * jnp.arange(B)[:, None]).reshape(-1)
      decoder = model.select_rows(decoder, rows, same_source=True)
      found, coverage_BKS, attention = _take((found, coverage_BKS, attention), parent_BK)
    done_BK = found.done_BK(limit_B)
    ends_BK = ~done_BK & rules.is_end(token_BK, end)
    new_BK = jnp.where(done_BK | ends_BK, IGNORE, token_BK)
    at = (0, 0, count)
    if coverage_BKS is not None:
      coverage_BKS = coverage_BKS + jnp.where(done_BK[:, :, None], 0.0, attention)
    found = Hypotheses(
      jax.lax.dynamic_update_slice(found.tokens_BKN, new_BK[:, :, None], at),
      found.length_BK + ~done_BK,
      log_p_BK,
      found.score_BK,
      found.finished_BK | ends_BK,
    )
    token_BK = jnp.where(done_BK, end, token_BK).astype(jnp.int32)
    return found, token_BK, coverage_BKS, decoder, count + 1

  found, _, coverage_BKS, *_ = jax.lax.while_loop(keep_going, step, start)
  return _ranked(found, coverage_BKS, source_BS, beam)


# ---- pieces ------------------------------------------------------------------------------------


def _extend(next_BKV: Array, log_p_BK: Array, done_BK: Array) -> tuple[Array | None, Array, Array]:
  """The K most likely extensions of the hypotheses by one token: the parent of each (None where
  each is its own), the token, and log p. A hypothesis that is done has one extension, which
  changes nothing and comes before all others."""
  B, K, V = next_BKV.shape
  if K == 1:  # greedy decoding needs no sort
    token_BK = jnp.argmax(next_BKV, axis=-1).astype(jnp.int32)
    chosen_BK = jnp.take_along_axis(next_BKV, token_BK[:, :, None], axis=2)[:, :, 0]
    return None, token_BK, log_p_BK + jnp.where(done_BK, 0.0, chosen_BK)
  kept_BKV = done_BK[:, :, None] & (jnp.arange(V) == 0)[None, None]
  total_BKV = jnp.where(
    done_BK[:, :, None],
    jnp.where(kept_BKV, log_p_BK[:, :, None], -jnp.inf),
    log_p_BK[:, :, None] + next_BKV,
  )
  _, best_BK = jax.lax.top_k(jnp.where(kept_BKV, jnp.inf, total_BKV).reshape(B, -1), K)
  log_p_BK = jnp.take_along_axis(total_BKV.reshape(B, -1), best_BK, axis=1)
  return best_BK // V, best_BK % V, log_p_BK


def _take(tree: Any, index_BK: Array) -> Any:
  """Arrays `[B, K, ...]`, of each source the hypotheses `index_BK`."""

  def take(x: Array) -> Array:
    return jnp.take_along_axis(x, index_BK.reshape(*index_BK.shape, *(1,) * (x.ndim - 2)), axis=1)

  return jax.tree.map(take, tree)


def _mean_attention(alignments: tuple[Array, ...]) -> Array:
  """The attention of one step, averaged over layers, `[B K, S]`."""
  if not alignments:
    raise InputError('coverage_penalty: must be 0 for a model without attention to the source')
  return jnp.mean(jnp.stack([a[:, 0] for a in alignments]), axis=0)


def _initial_search(
  definition: Definition[EncoderDecoder],
  model: EncoderDecoder,
  params: Params,
  source_BS: Array,
  begin: Array,
  beam: Beam,
  N: int,
) -> SearchState:
  """The search before its first token. Unstacks the decoder of `model`, so that the loop updates
  each layer's state in place."""
  (B, S), K = source_BS.shape, beam.width
  reader = definition.merge(params)
  state = model.unstacked_state(reader.init_state(reader.encode(source_BS), N), STEP)
  model.unstack(STEP)
  if K > 1:
    state = model.select_rows(state, jnp.repeat(jnp.arange(B), K))
  live_K = jnp.where(jnp.arange(K) == 0, 0.0, -jnp.inf)  # the others are the same hypothesis
  zeros_BK = jnp.zeros((B, K), jnp.int32)
  found = Hypotheses(
    jnp.full((B, K, N), IGNORE, jnp.int32),
    zeros_BK,
    jnp.broadcast_to(live_K[None], (B, K)),
    jnp.zeros((B, K)),
    jnp.zeros((B, K), bool),
  )
  coverage_BKS = jnp.zeros((B, K, S)) if beam.coverage_penalty > 0 else None
  return found, zeros_BK + begin, coverage_BKS, state, jnp.int32(0)


def _ranked(
  found: Hypotheses, coverage_BKS: Array | None, source_BS: Array, beam: Beam
) -> Hypotheses:
  """The hypotheses with their scores, by descending score, finished ones first."""
  score_BK = found.log_p_BK / ((5.0 + found.length_BK) / 6.0) ** beam.length_penalty
  if coverage_BKS is not None:
    covered = jnp.log(jnp.clip(coverage_BKS, 1e-10, 1.0))
    source_B1S = (source_BS != IGNORE)[:, None]
    score_BK = score_BK + beam.coverage_penalty * jnp.where(source_B1S, covered, 0.0).sum(-1)
  order_BK = jnp.lexsort((-score_BK, ~found.finished_BK), axis=-1)
  return _take(dataclasses.replace(found, score_BK=score_BK), order_BK)
