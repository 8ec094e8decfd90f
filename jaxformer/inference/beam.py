"""Search for a translation on the device: the likeliest token at each step, or a beam; each one
program, from the source's tokens to the best hypotheses.

Dims: B batch, S source, K width of the beam, N most new tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformer.config import Config, InputError
from jaxformer.inference.decoding import STEP
from jaxformer.models.encoder_decoder import DecoderState, EncoderDecoder
from jaxformer.models.params import Definition, Params
from jaxformer.task_type import IGNORE


class Beam(Config):
  """Beam search (Sutskever et al. 2014, section 3.2) with the penalties of GNMT (Wu et al. 2016,
  section 7).

  The `width` likeliest hypotheses are kept; one that ends keeps its place, and the search goes on
  with the others until all have ended. The best has the largest

    log p(Y | X) / lp(Y) + cp(X, Y),  lp = ((5 + |Y|) / 6)^length_penalty,  cp = coverage_penalty
    sum_i log min(sum_j a_ij, 1)

  where |Y| counts the end and a_ij is the attention of step j to source token i, the mean over
  layers; of hypotheses that did not end none is taken while there is another.

  Attributes:
    width: 1 takes the likeliest token at each step.
    length_penalty: 0 for none; GNMT's alpha, 0.2 there and 0.6 in Vaswani et al. 2017.
    coverage_penalty: 0 for none; GNMT's beta, 0.2 there.
  """

  width: int = 4
  length_penalty: float = 0.0
  coverage_penalty: float = 0.0

  def validate(self):
    self.require(self.width > 0, 'width', 'positive')
    for field in ('length_penalty', 'coverage_penalty'):
      self.require(0 <= getattr(self, field) < float('inf'), field, 'at least 0')


GREEDY_BEAM = Beam(width=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hypotheses:
  """The results of a search, for each source the best first.

  Attributes:
    tokens_BKN: without the end, then -1.
    length_BK: tokens, the end counted.
    log_p_BK: log p(tokens and end | source), in nats.
    score_BK: with the penalties.
    finished_BK: the hypothesis ended; False where the limit cut it off.
  """

  tokens_BKN: Int[Array, 'B K N']
  length_BK: Int[Array, 'B K']
  log_p_BK: Float[Array, 'B K']
  score_BK: Float[Array, 'B K']
  finished_BK: Bool[Array, 'B K']


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Search:
  """Where a search stands: the decoder's state after all tokens but the last, the last, and the
  hypotheses; `coverage_BKS` is what each source token has had of attention, None where nobody
  asks."""

  state: DecoderState
  token_BK: Array
  tokens_BKN: Array
  length_BK: Array
  log_p_BK: Array
  finished_BK: Array
  coverage_BKS: Array | None
  count: Array

  def done_BK(self, limit_B: Array) -> Array:
    """Which hypotheses stay as they are: they ended, or have as many tokens as they may."""
    return self.finished_BK | (self.length_BK >= limit_B[:, None])

  def goes_on(self, limit_B: Array) -> Array:
    return ~(self.done_BK(limit_B) | jnp.isneginf(self.log_p_BK)).all() & (
      self.count < self.tokens_BKN.shape[2]
    )


_STATIC = ('definition', 'beam', 'max_new_tokens', 'vocab_size', 'where')


@functools.partial(jax.jit, static_argnames=_STATIC)
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
  where: Any = None,
) -> Hypotheses:
  """The hypotheses of a beam for every source.

  Args:
    source_BS: padded with -1 at the end of a row.
    begin, end: the token that the decoder reads first, and the one that ends a hypothesis.
    limit_B: at most so many tokens for each source, the end counted.
    max_new_tokens: room for tokens, N.
    vocab_size: tokens from here on are never taken; None where every row of the head is a token.
    where: mesh and rules, which the program depends on.
  """
  model, K = definition.merge(params), beam.width
  search = _begun(
    definition, model, params, source_BS, begin, K, max_new_tokens, beam.coverage_penalty > 0
  )

  def one(s: _Search) -> _Search:
    B, V = s.token_BK.shape[0], definition.config.vocab_size
    out = model.step(
      s.token_BK.reshape(-1), STEP.replace(align=s.coverage_BKS is not None), s.state
    )
    total_BKV = s.log_p_BK[:, :, None] + _log_p(out.y, vocab_size).reshape(B, K, V)
    # What is done has one way to go on, which changes nothing and comes before all others.
    done_BK = s.done_BK(limit_B)
    stays_BKV = done_BK[:, :, None] & (jnp.arange(V) == 0)[None, None]
    total_BKV = jnp.where(
      done_BK[:, :, None], jnp.where(stays_BKV, s.log_p_BK[:, :, None], -jnp.inf), total_BKV
    )
    _, best_BK = jax.lax.top_k(jnp.where(stays_BKV, jnp.inf, total_BKV).reshape(B, -1), K)
    parent_BK, token_BK = best_BK // V, best_BK % V
    rows = (parent_BK + K * jnp.arange(B)[:, None]).reshape(-1)

    def of_parents(x: Array) -> Array:
      return jnp.take_along_axis(x, parent_BK.reshape(B, K, *(1,) * (x.ndim - 2)), axis=1)

    had_BK = of_parents(done_BK)
    ends_BK = ~had_BK & (token_BK == end)
    tokens = jax.lax.dynamic_update_slice(
      of_parents(s.tokens_BKN),
      jnp.where(had_BK | ends_BK, IGNORE, token_BK)[:, :, None],
      (0, 0, s.count),
    )
    coverage = s.coverage_BKS
    if coverage is not None:
      seen = _attended(out.alignments).reshape(coverage.shape)
      coverage = of_parents(coverage) + jnp.where(had_BK[:, :, None], 0.0, of_parents(seen))
    log_p_BK = jnp.take_along_axis(total_BKV.reshape(B, -1), best_BK, axis=1)
    return _Search(
      _select_rows(model, out.state, rows, same_source=True),
      jnp.where(had_BK, end, token_BK).astype(jnp.int32),
      tokens,
      of_parents(s.length_BK) + ~had_BK,
      log_p_BK,
      of_parents(s.finished_BK) | ends_BK,
      coverage,
      s.count + 1,
    )

  return _best(jax.lax.while_loop(lambda s: s.goes_on(limit_B), one, search), source_BS, beam)


@functools.partial(jax.jit, static_argnames=_STATIC)
def greedy_search(
  definition: Definition[EncoderDecoder],
  params: Params,
  source_BS: Int[Array, 'B S'],
  begin: Int[Array, ''],
  end: Int[Array, ''],
  limit_B: Int[Array, ' B'],
  *,
  beam: Beam = GREEDY_BEAM,
  max_new_tokens: int,
  vocab_size: int | None = None,
  where: Any = None,
) -> Hypotheses:
  """One hypothesis for every source, of the likeliest token at each step: `beam_search` of width 1,
  without its sorting. The penalties of `beam` bear on its score."""
  model = definition.merge(params)
  search = _begun(
    definition, model, params, source_BS, begin, 1, max_new_tokens, beam.coverage_penalty > 0
  )

  def one(s: _Search) -> _Search:
    out = model.step(s.token_BK[:, 0], STEP.replace(align=s.coverage_BKS is not None), s.state)
    log_p_BV = _log_p(out.y, vocab_size)
    token_BK = jnp.argmax(log_p_BV, axis=-1).astype(jnp.int32)[:, None]
    had_BK = s.done_BK(limit_B)
    ends_BK = ~had_BK & (token_BK == end)
    tokens = jax.lax.dynamic_update_slice(
      s.tokens_BKN, jnp.where(had_BK | ends_BK, IGNORE, token_BK)[:, :, None], (0, 0, s.count)
    )
    coverage = s.coverage_BKS
    if coverage is not None:
      coverage = coverage + jnp.where(had_BK[:, :, None], 0.0, _attended(out.alignments)[:, None])
    log_p_BK = s.log_p_BK + jnp.where(had_BK, 0.0, jnp.take_along_axis(log_p_BV, token_BK, axis=1))
    return _Search(
      out.state,
      token_BK,
      tokens,
      s.length_BK + ~had_BK,
      log_p_BK,
      s.finished_BK | ends_BK,
      coverage,
      s.count + 1,
    )

  return _best(jax.lax.while_loop(lambda s: s.goes_on(limit_B), one, search), source_BS, beam)


# ---- pieces ------------------------------------------------------------------------------------


def _log_p(logits: Array, vocab_size: int | None) -> Array:
  """log p of every token; what is no token is as likely as the model says, and never taken."""
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  return (
    log_p
    if vocab_size is None
    else jnp.where((jnp.arange(log_p.shape[-1]) < vocab_size)[None], log_p, -jnp.inf)
  )


def _attended(alignments: tuple[Array, ...]) -> Array:
  """The mean over layers of the attention of one step, [B K, S]."""
  if not alignments:
    raise InputError('coverage_penalty: must be 0 for a model without attention to the source')
  return jnp.mean(jnp.stack([a[:, 0] for a in alignments]), axis=0)


def _select_rows(
  model: EncoderDecoder, state: DecoderState, index: Array, same_source: bool = False
) -> DecoderState:
  """`Layer.select_rows` of the decoder's state."""
  return DecoderState(
    model.decoder.select_rows(state.stack, index, same_source),
    jnp.take(state.position_B, index, axis=0),
  )


def _begun(
  definition: Definition,
  model: EncoderDecoder,
  params: Params,
  source_BS: Array,
  begin: Array,
  K: int,
  N: int,
  covers: bool,
) -> _Search:
  """The search before its first token. The model's decoder is separated, so that the loop updates
  each layer's state in place."""
  stack = model.decoder

  def state_of(params: Params, source_BS: Array) -> DecoderState:
    fresh = definition.merge(params)
    state = fresh.init_state(fresh.encode(source_BS), N)
    return dataclasses.replace(state, stack=stack.separate_state(state.stack, STEP))

  B, S = source_BS.shape
  state = state_of(params, source_BS)
  model.decoder = stack.separated(STEP)
  if K > 1:
    state = _select_rows(model, state, jnp.repeat(jnp.arange(B), K))
  live_K = jnp.where(jnp.arange(K) == 0, 0.0, -jnp.inf)  # the others are the same hypothesis
  zeros_BK = jnp.zeros((B, K), jnp.int32)
  return _Search(
    state,
    zeros_BK + begin,
    jnp.full((B, K, N), IGNORE, jnp.int32),
    zeros_BK,
    jnp.broadcast_to(live_K[None], (B, K)),
    jnp.zeros((B, K), bool),
    jnp.zeros((B, K, S)) if covers else None,
    jnp.int32(0),
  )


def _best(s: _Search, source_BS: Array, beam: Beam) -> Hypotheses:
  """The hypotheses in the order of their scores, those that ended first."""
  score = s.log_p_BK / ((5.0 + s.length_BK) / 6.0) ** beam.length_penalty
  if s.coverage_BKS is not None:
    covered = jnp.log(jnp.clip(s.coverage_BKS, 1e-10, 1.0))
    score = score + beam.coverage_penalty * jnp.where(
      (source_BS != IGNORE)[:, None], covered, 0.0
    ).sum(-1)
  order_BK = jnp.lexsort((-score, ~s.finished_BK), axis=-1)
  parts = s.tokens_BKN, s.length_BK, s.log_p_BK, score, s.finished_BK
  return Hypotheses(
    *(
      jnp.take_along_axis(p, order_BK.reshape(*order_BK.shape, *(1,) * (p.ndim - 2)), axis=1)
      for p in parts
    )
  )
