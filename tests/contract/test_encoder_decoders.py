"""The contract of encoder-decoders, for every tiny preset, beyond what test_models.py checks for
all models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.layer import Context
from jaxformer.models.stack import layers_with_widths
from tests.contract.cases import BATCH, PAIRS, close, model
from tests.contract.test_models import LENGTH, pairs_of
from tests.helpers import state_bytes
from tests.tiers import families, newest

every = pytest.mark.parametrize('name', families(PAIRS))


def logits_of(case):
  return jax.jit(
    lambda p, source, tokens: case.definition.merge(p)(source, tokens, Context(unroll=False)).y
  )


@newest
@every
@pytest.mark.parametrize('prefill', [0, 17])
def test_teacher_forced_equals_prefill_and_steps(name, prefill):
  case = model(name)
  batch, merge = pairs_of(case), case.definition.merge
  x = batch.inputs[:, :24]
  whole = logits_of(case)(case.params, batch.source_BS, x)
  memory = jax.jit(lambda p: merge(p).encode(batch.source_BS, Context(unroll=False)))(case.params)
  state, ys = jax.jit(lambda p: merge(p).init_state(memory, LENGTH))(case.params), []

  def read(p, x, state):
    out = merge(p).hidden(x, None, Context(unroll=False), state)
    return merge(p).logits(out.y), out.state

  final = jax.jit(read)(case.params, x, state)[1]
  if prefill:
    y, state = jax.jit(read)(case.params, x[:, :prefill], state)
    ys.append(y)
  step = jax.jit(lambda p, token, state: merge(p).step(token, Context(unroll=False), state))
  for t in range(prefill, x.shape[1]):
    out = step(case.params, x[:, t], state)
    state = out.state
    ys.append(out.y[:, None])
  close(jnp.concatenate(ys, axis=1), whole, 1e-5)
  close(state, final, 1e-5, 'state')


@every
def test_padding_and_order_of_a_batch_change_nothing(name):
  case = model(name)
  batch, logits = pairs_of(case), logits_of(case)
  together = logits(case.params, batch.source_BS, batch.inputs)
  for i in (1, 7):
    source = batch.source_BS[i : i + 1, : 24 - 2 * i]
    assert np.all(np.asarray(source) >= 0)
    close(logits(case.params, source, batch.inputs[i : i + 1])[0], together[i], 1e-5)
  order = np.random.default_rng(0).permutation(BATCH)
  close(logits(case.params, batch.source_BS[order], batch.inputs[order]), together[order], 1e-5)


@every
def test_outputs_depend_on_all_of_the_source_and_on_no_later_token(name):
  case = model(name)
  model_of = case.definition.merge
  source_table = (
    'embedder.input.table' if case.definition.config.shared_embedding else 'source_input.table'
  )

  def influence(table, rows):
    """How much each id of `rows` bears on the outputs at the first ten positions; each id stands in
    one place alone."""

    def total(p):
      out = model_of(p).hidden(
        tokens, model_of(p).encode(source, Context(unroll=False)), Context(unroll=False)
      )
      return jnp.sum(jnp.sin(out.y[:, :10]))

    return np.abs(np.asarray(jax.jit(jax.grad(total))(case.params)[table]))[rows].sum(-1)

  tokens, source = jnp.arange(100, 120)[None], jnp.arange(200, 216)[None]
  later = influence('embedder.input.table', np.arange(100, 120))
  assert np.all(later[:10] > 0)
  assert np.all(later[10:] == 0)
  assert np.all(influence(source_table, np.arange(200, 216)) > 0)


@every
def test_loss_equals_that_of_the_logits(name):
  case = model(name)
  batch, smoothing = pairs_of(case), 0.1
  sums, _ = jax.jit(
    lambda p: case.definition.merge(p).loss(batch, Context(unroll=False), label_smoothing=smoothing)
  )(case.params)
  logits = np.asarray(logits_of(case)(case.params, batch.source_BS, batch.inputs), np.float64)
  targets = np.asarray(batch.targets_BT)
  log_p = (
    logits
    - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    - logits.max(-1, keepdims=True)
  )
  nll = -np.take_along_axis(log_p, np.maximum(targets, 0)[..., None], -1)[..., 0]
  counted = targets != -1
  np.testing.assert_allclose(float(sums.nll), nll[counted].sum(), rtol=1e-5)
  smoothed = (1 - smoothing) * nll - smoothing * log_p.mean(-1)
  np.testing.assert_allclose(float(sums.loss), smoothed[counted].sum(), rtol=1e-5)
  nll_BT, hit_BT = jax.jit(lambda p: case.definition.merge(p).scores(batch, Context(unroll=False)))(
    case.params
  )
  close(nll_BT, np.where(counted, nll, 0), 1e-5)
  assert np.array_equal(np.asarray(hit_BT), counted & (logits.argmax(-1) == targets))


@every
def test_state_is_as_declared(name):
  definition = model(name).definition
  memory = jax.eval_shape(
    lambda p: definition.merge(p).encode(jnp.zeros((1, 32), jnp.int32)), definition.abstract()
  )
  state = jax.eval_shape(
    lambda p, m: definition.merge(p).init_state(m, 32), definition.abstract(), memory
  )
  numbers = sum(s.size for s in jax.tree.leaves(state) if jnp.issubdtype(s.dtype, jnp.floating))
  assert numbers == definition.config.state_size(32)
  assert state_bytes(definition, 1, 32) == 2 * numbers


@newest
@every
def test_alignments_are_distributions_over_the_tokens_of_the_source(name):
  case = model(name)
  batch, config = pairs_of(case), case.definition.config
  attending = sum(
    n
    for layer, width, n in layers_with_widths(config.decoder, config.width)
    if layer.memory_width(width) is not None
  )
  for unroll in (False, True):
    out = jax.jit(
      lambda p, c=Context(unroll=unroll, align=True): case.definition.merge(p)(
        batch.source_BS, batch.inputs, c
      )
    )(case.params)
    assert len(out.alignments) == attending
    for a in map(np.asarray, out.alignments):
      assert a.shape == (BATCH, LENGTH, 24)
      np.testing.assert_allclose(a.sum(-1), 1, atol=1e-5)
      assert np.all(a[np.broadcast_to(np.asarray(batch.source_BS == -1)[:, None], a.shape)] == 0)
