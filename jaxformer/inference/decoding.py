"""Continuations of prompts: one program that reads the prompts (prefill), and one with the loop
over new tokens.

They are separate so that a prompt of another length does not recompile the loop, and the loop runs
to its end or in pieces, for streaming, as the same program. Nothing between them waits for the
host.

Dims: B batch, T padded length of the prompts, N maximum number of new tokens, V vocabulary.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from jaxformer.config import InputError
from jaxformer.inference.finite import require_finite
from jaxformer.inference.sampling import GREEDY, PLAIN, Sampling, sample
from jaxformer.inference.token_rules import FREE, TokenRules
from jaxformer.layers.layer import Context, State
from jaxformer.memory import check_fits
from jaxformer.models.autoregressive import AutoregressiveConfig
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.params import Definition, Params
from jaxformer.sharding import Parallel, use_mesh
from jaxformer.task_type import IGNORE

STEP = Context()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
  """Decoding loop state.

  Attributes:
    state: the model's, after all tokens but the last sampled.
    token_B: the last token sampled, not yet read.
    tokens_BN: tokens sampled so far, without the end of document, then -1 as padding.
    count: tokens sampled for each row, those of finished rows included.
    finished_B: whether the row has its end of document, or was stopped by the host.
    seen_BV: tokens of the prompt and those sampled; None without a repetition penalty.
    keys_B: random key of each row.
    finite_B: whether the logits of the row, until it was finished, were finite.
  """

  state: State
  token_B: Int[Array, ' B']
  tokens_BN: Int[Array, 'B N']
  count: Int[Array, '']
  finished_B: Bool[Array, ' B']
  seen_BV: Bool[Array, 'B V'] | None
  keys_B: Key[Array, ' B']
  finite_B: Bool[Array, ' B']


@functools.partial(
  jax.jit,
  static_argnames=(
    'definition',
    'sampling',
    'max_len',
    'max_new_tokens',
    'vocab_size',
    'rules',
    'where',
  ),
)
def begin(
  definition: Definition[LanguageModel],
  params: Params,
  tokens_BT: Int[Array, 'B T'],
  segments_BT: Int[Array, 'B T'],
  seed: Int[Array, ''],
  end: Int[Array, ''],
  *,
  sampling: Sampling,
  max_len: int,
  max_new_tokens: int,
  vocab_size: int | None = None,
  rules: TokenRules = FREE,
  where: Any = None,
) -> Decoding:
  """Read the prompts (prefill) and sample the first new token of each.

  Args:
    tokens_BT, segments_BT: from `left_padded`.
    end: the end of document, -1 for none.
    max_len: of the model's state: T and the new tokens.
    max_new_tokens: N, the length of the token buffer.
    vocab_size: tokens from here on are never sampled; None if every row of the head is a token.
    rules: of which tokens may come.
    where: mesh and rules, on which the program depends.
  """
  model, (B, _) = definition.merge(params), tokens_BT.shape
  ctx = Context(segments_BT=segments_BT, fresh=True)
  out = model.hidden(tokens_BT, ctx, model.init_state(B, max_len))
  rows = jnp.arange(B)
  keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), rows)
  seen = None
  if sampling.simplified().repetition_penalty is not None:
    V = definition.config.vocab_size
    seen = (
      jnp.zeros((B, V + 1), bool)
      .at[rows[:, None], jnp.where(segments_BT == 1, tokens_BT, V)]
      .set(True)[:, :V]
    )
  empty = jnp.full((B, max_new_tokens), IGNORE, jnp.int32)
  state = model.unstacked_state(out.state, STEP)  # so that the loop updates it in place
  start = Decoding(
    state,
    jnp.zeros((B,), jnp.int32),
    empty,
    jnp.int32(0),
    jnp.zeros((B,), bool),
    seen,
    keys,
    jnp.ones((B,), bool),
  )
  return _drawn(start, model.logits(out.y[:, -1]), end, sampling, vocab_size, rules)


@functools.partial(
  jax.jit,
  static_argnames=('definition', 'sampling', 'vocab_size', 'rules', 'where'),
  donate_argnames='decoding',
)
def advance(
  definition: Definition[LanguageModel],
  params: Params,
  decoding: Decoding,
  limit: Int[Array, ''],
  end: Int[Array, ''],
  *,
  sampling: Sampling,
  vocab_size: int | None = None,
  rules: TokenRules = FREE,
  where: Any = None,
) -> Decoding:
  """Sample tokens until there are `limit` for each row, or all rows are finished. `decoding` is
  donated."""
  model = definition.merge(params)
  model.unstack(STEP)

  def more(d: Decoding) -> Array:
    return (d.count < limit) & ~d.finished_B.all()

  def one(d: Decoding) -> Decoding:
    out = model.step(d.token_B, STEP, d.state)
    return _drawn(dataclasses.replace(d, state=out.state), out.y, end, sampling, vocab_size, rules)

  return jax.lax.while_loop(more, one, decoding)


def _drawn(
  d: Decoding,
  logits_BV: Array,
  end: Array,
  sampling: Sampling,
  vocab_size: int | None,
  rules: TokenRules,
) -> Decoding:
  """One more token for each row; that of a finished row is discarded."""
  logits_BV = tokens_only(logits_BV, vocab_size)
  # The largest logit is NaN where any is; -inf may stand for a token that never comes.
  finite_B = d.finite_B & (d.finished_B | jnp.isfinite(logits_BV.max(axis=-1)))
  logits_BV = rules.allowed(logits_BV, d.count)
  token_B = sample(
    jax.vmap(jax.random.fold_in, in_axes=(0, None))(d.keys_B, d.count),
    logits_BV,
    d.seen_BV,
    sampling,
  )
  finished_B = d.finished_B | rules.is_end(token_B, end)
  tokens_BN = jax.lax.dynamic_update_slice(
    d.tokens_BN, jnp.where(finished_B, IGNORE, token_B)[:, None], (0, d.count)
  )
  seen_BV = None if d.seen_BV is None else d.seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
  return Decoding(d.state, token_B, tokens_BN, d.count + 1, finished_B, seen_BV, d.keys_B, finite_B)


def tokens_only(scores_BV: Array, vocab_size: int | None) -> Array:
  """Logits or log p with -inf from `vocab_size` on, where rows of the head are no tokens."""
  if vocab_size is None or vocab_size >= scores_BV.shape[-1]:
    return scores_BV
  return jnp.where((jnp.arange(scores_BV.shape[-1]) < vocab_size)[None], scores_BV, -jnp.inf)


# ---- from the host -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Request:
  """A validated request: the arguments of `begin` and `advance`.

  Attributes:
    prompts: with the end of document in place of an empty one.
    padded: T.
    max_len: positions in the model's state.
    room: N, at least `max_new_tokens`.
  """

  definition: Definition[LanguageModel]
  params: Params
  prompts: list[list[int]]
  max_new_tokens: int
  sampling: Sampling
  seed: int
  end: int
  padded: int
  max_len: int
  room: int
  parallel: Parallel | None
  vocab_size: int | None
  rules: TokenRules

  def begin(self) -> Decoding:
    """Read the prompts and sample one token."""
    tokens_BT, segments_BT = left_padded(self.prompts, self.padded)
    with use_mesh(self.parallel):
      return begin(
        self.definition,
        self.params,
        tokens_BT,
        segments_BT,
        np.uint32(self.seed),
        np.int32(self.end),
        sampling=self.sampling,
        max_len=self.max_len,
        max_new_tokens=self.room,
        vocab_size=self.vocab_size,
        rules=self.rules,
        where=self.parallel,
      )

  def advance(self, decoding: Decoding, limit: int) -> Decoding:
    """Sample up to `limit` tokens in total, never more than `max_new_tokens`."""
    with use_mesh(self.parallel):
      return advance(
        self.definition,
        self.params,
        decoding,
        np.int32(min(limit, self.max_new_tokens)),
        np.int32(self.end),
        sampling=self.sampling,
        vocab_size=self.vocab_size,
        rules=self.rules,
        where=self.parallel,
      )

  def check(self, decoding: Decoding) -> None:
    """Raise `NotFiniteError` for tokens that were chosen by logits that are not finite."""
    require_finite('logits', decoding.finite_B, self.params)


def request(
  definition: Definition[LanguageModel],
  params: Params,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  sampling: Sampling = PLAIN,
  seed: int = 0,
  end_of_document: int | None = None,
  dtype: Any = None,
  parallel: Parallel | None = None,
  vocab_size: int | None = None,
  rules: TokenRules = FREE,
) -> Request:
  """Return a request to continue each prompt, for `generate` and the functions of
  `jaxformer.inference.text`. Its sizes are rounded up, so that requests of similar sizes share
  compiled programs.

  A result depends on its prompt, the seed and its index in the list, not on the other prompts.

  Args:
    prompts: token ids, of any lengths; an empty one starts from the end of document.
    max_new_tokens: maximum number of new tokens per prompt. The loop runs until all have ended.
    end_of_document: the token that ends a continuation; None if the vocabulary has none.
    dtype: compute dtype; None for that of the parameters.
    parallel: mesh and rules of the parameters; None for one device.
    vocab_size: of the tokenizer, where the model's is padded: the rows beyond it are never sampled.
    rules: of which tokens may come, and which end a continuation besides `end_of_document`.

  Raises:
    InputError: token ids out of range, an empty prompt without an end of document, or more tokens
      than the model has positions.
  """
  config = definition.config
  check_positive(max_new_tokens=max_new_tokens, vocab_size=vocab_size)
  if not 0 <= seed < 2**32:
    raise InputError('seed', seed, 'at least 0 and below 2^32')
  rules.check(config.vocab_size)
  if rules.last is not None:
    raise InputError('rules.last', rules.last, 'none: only translations have one')
  end = IGNORE if end_of_document is None else end_of_document
  if end_of_document is not None and not 0 <= end < config.vocab_size:
    accepted = f'at least 0 and below the vocabulary of {config.vocab_size}'
    raise InputError('end_of_document', end, accepted)
  tokens, started = min(vocab_size or config.vocab_size, config.vocab_size), []
  for i, prompt in enumerate(prompts):
    if not len(prompt) and end_of_document is None:
      raise InputError(
        f'prompt {i} is empty, and the tokenizer has no end of document to start from: give at '
        'least one token'
      )
    started.append(token_ids(f'prompt {i}', prompt, tokens) or [end])
  if not started:
    raise InputError('prompts: must be at least one')
  longest = max(range(len(started)), key=lambda i: len(started[i]))
  length, room, most = len(started[longest]), bucket(max_new_tokens), config.max_len or sys.maxsize
  if length + max_new_tokens > most:
    raise InputError(
      f'prompt {longest} has {length} tokens; with max_new_tokens = {max_new_tokens} that is more '
      f'than the {most} learned positions of the model'
    )
  padded = min(bucket(length), most - max_new_tokens)
  check_state(
    config, len(started), min(padded + room, most), parallel, max_new_tokens=max_new_tokens
  )
  if dtype is not None:
    params = definition.cast(params, dtype)
  return Request(
    definition,
    params,
    started,
    max_new_tokens,
    sampling.simplified(),  # what is off shares the programs of what is not given
    seed,
    end,
    padded,
    min(padded + room, most),
    room,
    parallel,
    vocab_size,
    rules,
  )


class Generated(NamedTuple):
  """A continuation.

  Attributes:
    tokens: the new tokens, without the end of document; of text with stop strings, up to the one
      that completed a stop string.
    finished: whether it has the end of document or a stop string; False where `max_new_tokens` was
      reached.
    text: up to the stop string, if there is one; '' where none was asked for.
  """

  tokens: list[int]
  finished: bool
  text: str = ''


def generate(r: Request) -> list[Generated]:
  """Return the continuation of each prompt of a `request`, as tokens."""
  last = r.advance(r.begin(), r.max_new_tokens)
  r.check(last)
  tokens_BN, finished_B = np.asarray(last.tokens_BN), np.asarray(last.finished_B)
  return [Generated(row[row != IGNORE].tolist(), bool(f)) for row, f in zip(tokens_BN, finished_B)]


def check_positive(**given: int | None) -> None:
  """Raise `InputError` for a number below 1, or one that no array can have elements."""
  for field, value in given.items():
    if value is not None and not 1 <= value < 2**31:
      raise InputError(field, value, 'at least 1' if value < 1 else 'below 2^31')


def check_state(
  config: AutoregressiveConfig,
  rows: int,
  length: int,
  parallel: Parallel | None,
  more: int = 0,
  **given: Any,
) -> None:
  """Raise `InputError` for decoding whose state does not fit the memory of the devices, at 2 bytes
  per number and 4 per token, and `more` bytes.

  Args:
    rows: sequences at once.
    length: tokens of each.
    given: what is too large, by its name.
  """
  (field, value), devices = given.popitem(), 1 if parallel is None else parallel.mesh.size
  needed = rows * (2 * (config.state_size(length) or 0) + 4 * length) + more
  what = f'{rows:,} sequences of {length:,} tokens'
  check_fits(needed / devices, field, value, what, 'fewer tokens, or fewer sequences at once')


def token_ids(name: str, ids: Iterable[int], vocab_size: int) -> list[int]:
  """Return ids as a list. Raises `InputError` for one that is out of range."""
  tokens = [int(t) for t in ids]
  if wrong := [t for t in tokens if not 0 <= t < vocab_size]:
    raise InputError(
      f'{name} has token {wrong[0]}: must be at least 0 and below the vocabulary of {vocab_size}'
    )
  return tokens


def bucket(n: int) -> int:
  """The next power of two from 16 to 256, beyond that the next multiple of 256."""
  return max(16, 1 << (n - 1).bit_length()) if n <= 256 else -(-n // 256) * 256


def left_padded(prompts: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
  """Left-pad prompts to `length`. Returns tokens and segments, both int32: the padding is document
  0 and the prompt document 1, so that no layer carries anything over from the padding."""
  tokens_BT = np.zeros((len(prompts), length), np.int32)
  segments_BT = np.zeros_like(tokens_BT)
  for i, prompt in enumerate(prompts):
    tokens_BT[i, length - len(prompt) :] = prompt
    segments_BT[i, length - len(prompt) :] = 1
  return tokens_BT, segments_BT


# ---- lowered, from shapes alone: what serving a model compiles ---------------------------------


def lowered_prefill(
  definition: Definition[LanguageModel],
  parallel: Parallel,
  batch: int,
  context_length: int,
  prompt: int | None = None,
  dtype: Any = jnp.bfloat16,
) -> jax.stages.Lowered:
  """Lower the program that reads `batch` prompts and samples one token for each.

  Args:
    context_length: maximum number of positions in the model's state.
    prompt: tokens of each prompt; None for `context_length`.
    dtype: compute dtype, in which the parameters are.
  """
  T = context_length if prompt is None else prompt
  check_positive(batch=batch, context_length=context_length, prompt=T)
  definition.config.check_length(context_length)
  ids = _array((batch, T), jnp.int32, parallel)
  numbers = _array((), jnp.uint32, parallel), _array((), jnp.int32, parallel)
  with use_mesh(parallel):
    return begin.trace(
      definition,
      definition.abstract(parallel, dtype),
      ids,
      ids,
      *numbers,
      sampling=GREEDY,
      max_len=context_length,
      max_new_tokens=1,
      where=parallel,
    ).lower(lowering_platforms=(parallel.platform,))


def lowered_decode(
  definition: Definition[LanguageModel],
  parallel: Parallel,
  batch: int,
  context_length: int,
  dtype: Any = jnp.bfloat16,
) -> jax.stages.Lowered:
  """Lower the decode loop: one token per step for each of `batch` sequences, with a state of
  `context_length` positions.

  The sharding of the state is what prefill leaves, so that program is compiled first, for a short
  prompt."""
  reading = lowered_prefill(
    definition, parallel, batch, context_length, min(bucket(1), context_length), dtype
  )
  read: Any = reading.compile()
  decoding = jax.tree.map(
    lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
    reading.out_info,
    read.output_shardings,
  )
  number = _array((), jnp.int32, parallel)
  with use_mesh(parallel):
    return advance.trace(
      definition,
      definition.abstract(parallel, dtype),
      decoding,
      number,
      number,
      sampling=GREEDY,
      where=parallel,
    ).lower(lowering_platforms=(parallel.platform,))


def _array(shape: tuple[int, ...], dtype: Any, parallel: Parallel) -> Any:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=parallel.replicated)
