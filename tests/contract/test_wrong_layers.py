"""Layers that compute a mean over the document so far, each with one fault: the check of the
property that it violates says so, and where."""

import jax
import jax.numpy as jnp
import pytest

from jaxformer.layers.init import FanInUniform
from jaxformer.layers.layer import Layer, LayerConfig, Output, starts_BT
from jaxformer.ops.linear import linear
from jaxformer.sharding import param
from jaxformer.testing import check_layer
from jaxformer.testing.case import Alone, Broken, Case
from jaxformer.testing.contract import CHECKS
from tests.helpers import temporary_types

SEQUENCE, DOCUMENTS, ROWS, CAUSAL, GRADIENTS, BFLOAT16 = (
  'a long sequence equals its tokens one by one',
  'packed documents equal separate ones',
  'no row depends on the others of its batch',
  'no output depends on a later input',
  'gradients equal differences of outputs',
  'bfloat16 is close to float32, with finite gradients',
)


def mean_layer(base):
  """Define the layer and its config, of types that are forgotten after the test."""

  class Mean(base):
    class Config(LayerConfig):
      chunk: int = 64

      def state_size(self, width, max_len):
        return width + 1

    def __init__(self, config, width, rngs, position):
      self.chunk = config.chunk
      drawn = FanInUniform()(rngs.params(), (width, width), width, position)
      self.kernel = param(drawn, ('embed', 'heads'))

  return Mean.Config


class Right(Layer):
  """y_t = (x_s + ... + x_t) W / (t - s + 1) for a document that starts at s."""

  def init_state(self, batch, max_len, memory=None):
    return jnp.zeros((batch, self.kernel.shape[-1])), jnp.zeros(batch)

  def values(self, x_BTD):
    return linear(x_BTD, self.kernel[...]).astype(jnp.float32)

  def starts(self, segments_BT, B, T):
    return starts_BT(segments_BT, B, T)

  def carried(self, state, t):
    """The state before position t."""
    return state

  def outputs(self, y_BTD, v_BTD):
    return y_BTD

  def last(self, states, T):
    """The state after T tokens, of those after each."""
    return jax.tree.map(lambda s: s[-1], states)

  def __call__(self, x_BTD, ctx, state=None):
    B, T, _ = x_BTD.shape
    v_BTD, starts = self.values(x_BTD), self.starts(ctx.segments_BT, B, T)

    def step(before, now):
      v_BD, start_B, t = now
      total_BD, n_B = self.carried(before, t)
      total_BD = jnp.where(start_B[:, None], 0.0, total_BD) + v_BD
      n_B = jnp.where(start_B, 0.0, n_B) + 1
      after = total_BD.astype(v_BD.dtype), n_B
      return after, (after, total_BD / n_B[:, None])

    first = self.init_state(B, T) if state is None else state
    first = first[0].astype(v_BTD.dtype), first[1]
    _, (states, y_TBD) = jax.lax.scan(
      step, first, (jnp.swapaxes(v_BTD, 0, 1), starts.T, jnp.arange(T))
    )
    y_BTD = self.outputs(jnp.swapaxes(y_TBD, 0, 1), v_BTD).astype(x_BTD.dtype)
    return Output(y_BTD, None if state is None else self.last(states, T))


class ForgetsAtChunks(Right):
  def carried(self, state, t):
    return jax.tree.map(lambda s: jnp.where((t > 0) & (t % self.chunk == 0), 0.0, s), state)


class LeaksAtChunks(Right):
  def outputs(self, y_BTD, v_BTD):
    t = jnp.arange(y_BTD.shape[1])[None, :, None]
    ends = (t % self.chunk == self.chunk - 1) & (t + 1 < y_BTD.shape[1])
    return y_BTD + jnp.where(ends, 1e-3 * jnp.roll(v_BTD, -1, 1), 0.0)


class LeaksWithoutGradient(Right):
  """All outputs have the mean of the inputs, through which no gradient flows."""

  def outputs(self, y_BTD, v_BTD):
    return y_BTD - 0.01 * jax.lax.stop_gradient(jnp.mean(v_BTD, axis=1, keepdims=True))


class RepeatsTheTail(Right):
  """Outputs after the last of several complete chunks are those at its end."""

  def outputs(self, y_BTD, v_BTD):
    T = y_BTD.shape[1]
    complete = T // self.chunk * self.chunk
    if complete < self.chunk:
      return y_BTD
    return jnp.take(y_BTD, jnp.minimum(jnp.arange(T), complete - 1), axis=1)


class LosesTheTailOfTheState(Right):
  def last(self, states, T):
    end = T if self.chunk > T else T // self.chunk * self.chunk
    return jax.tree.map(lambda s: s[end - 1], states)


class DocumentsOfTheFirstRow(Right):
  def starts(self, segments_BT, B, T):
    return jnp.broadcast_to(starts_BT(segments_BT, B, T)[:1], (B, T))


class DocumentsByIdentity(Right):
  """A document with the number of the first one continues the document before it."""

  def starts(self, segments_BT, B, T):
    starts = starts_BT(segments_BT, B, T)
    return starts if segments_BT is None else starts & (segments_BT != segments_BT[:, :1])


class DocumentsByOrder(Right):
  """Only a larger number starts a document."""

  def starts(self, segments_BT, B, T):
    if segments_BT is None:
      return starts_BT(None, B, T)
    return jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1]) > 0


class AddsTheNextRow(Right):
  def values(self, x_BTD):
    v_BTD = super().values(x_BTD)
    return v_BTD + 1e-3 * jnp.roll(v_BTD, -1, 0)


class CentersTheBatch(Right):
  def values(self, x_BTD):
    v_BTD = super().values(x_BTD)
    return v_BTD - 0.5 * jnp.mean(v_BTD, axis=0, keepdims=True)


class StopsGradientsAtChunks(Right):
  def carried(self, state, t):
    return jax.tree.map(
      lambda s: jnp.where((t > 0) & (t % self.chunk == 0), jax.lax.stop_gradient(s), s), state
    )


class StopsGradientsWithoutDocuments(Right):
  def __call__(self, x_BTD, ctx, state=None):
    x_BTD = jax.lax.stop_gradient(x_BTD) if ctx.segments_BT is None else x_BTD
    return super().__call__(x_BTD, ctx, state)


class ScaledGradient(Right):
  """The gradient of the parameter is 1.5 times what it should be."""

  def values(self, x_BTD):
    w = self.kernel[...]
    return linear(x_BTD, 1.5 * w - jax.lax.stop_gradient(0.5 * w)).astype(jnp.float32)


class SumsInTheTypeOfTheInputs(Right):
  def values(self, x_BTD):
    return jnp.abs(super().values(x_BTD)).astype(x_BTD.dtype)


class SumsOfSigns(Right):
  """As before, of values that nearly cancel, so the error stays small."""

  def values(self, x_BTD):
    return super().values(x_BTD).astype(x_BTD.dtype)


class RoundsTheSum(Right):
  """The sum has the precision of bfloat16, whatever the type of the inputs."""

  def carried(self, state, t):
    return state[0].astype(jnp.bfloat16).astype(jnp.float32), state[1]


class FourierTransforms(Right):
  """Right: without documents and a state, sums are convolutions by Fourier transforms."""

  def __call__(self, x_BTD, ctx, state=None):
    if state is not None or ctx.segments_BT is not None:
      return super().__call__(x_BTD, ctx, state)
    T = x_BTD.shape[1]
    ones_F = jnp.fft.rfft(jnp.ones(T), 2 * T)
    v_BFD = jnp.fft.rfft(self.values(x_BTD), 2 * T, axis=1)
    total_BTD = jnp.fft.irfft(v_BFD * ones_F[None, :, None], 2 * T, axis=1)[:, :T]
    y_BTD = total_BTD / jnp.arange(1, T + 1)[None, :, None]
    return Output(y_BTD.astype(x_BTD.dtype))


CHUNKS = 16, 64, 256
WRONG = [
  *((ForgetsAtChunks, c, SEQUENCE, f'first at position {c} of row 0') for c in CHUNKS),
  *(
    (LeaksAtChunks, c, CAUSAL, f'at position {c - 1} depends on the input at position {c}')
    for c in CHUNKS
  ),
  (LeaksWithoutGradient, 64, CAUSAL, 'at position 0 depends on the input at position 299'),
  (RepeatsTheTail, 32, SEQUENCE, 'a sequence of 300 .* first at position 288 of row 0'),
  (RepeatsTheTail, 256, SEQUENCE, 'a sequence of 300 .* first at position 256 of row 0'),
  (
    LosesTheTailOfTheState,
    128,
    SEQUENCE,
    '4 steps after a prefill of 300, .* first at position 300',
  ),
  (
    DocumentsOfTheFirstRow,
    64,
    DOCUMENTS,
    'documents of 1, 1, 17, 1 .* first at position 1 of row 2',
  ),
  (DocumentsOfTheFirstRow, 64, ROWS, 'a row in a batch of 8 .* first at position 2 of row 1'),
  (DocumentsByIdentity, 64, DOCUMENTS, 'first at position 2 of row 0'),
  (DocumentsByOrder, 64, DOCUMENTS, 'first at position 1 of row 0'),
  (AddsTheNextRow, 64, ROWS, 'a row in a batch of 8 against by itself: .* first at position 0'),
  (CentersTheBatch, 64, ROWS, 'a row in a batch of 8 against by itself: .* first at position 0'),
  *(
    (StopsGradientsAtChunks, c, GRADIENTS, 'the gradient is .*, and differences of outputs give')
    for c in (16, 256)
  ),
  (StopsGradientsWithoutDocuments, 64, GRADIENTS, 'without segments .* the gradient of the inputs'),
  (ScaledGradient, 64, GRADIENTS, 'in parameter kernel the gradient is'),
  (RoundsTheSum, 64, GRADIENTS, 'rounded more coarsely than in float32: .* first at position 1 of'),
  (SumsOfSigns, 64, BFLOAT16, 'grows with the length: .* at positions 64 to 127'),
  (SumsInTheTypeOfTheInputs, 64, BFLOAT16, 'a row of 300 in bfloat16 against float32: the output'),
]


@pytest.mark.parametrize(
  ('kind', 'chunk', 'check', 'words'), WRONG, ids=lambda v: v.__name__ if isinstance(v, type) else v
)
def test_a_wrong_layer_fails(kind, chunk, check, words):
  with temporary_types():
    case = Case(Alone(layer=mean_layer(kind)(chunk=chunk)))
    with pytest.raises(Broken, match=words):
      CHECKS[check](case)


@pytest.mark.parametrize('kind', [Right, FourierTransforms])
def test_a_right_layer_holds(kind):
  with temporary_types():
    verdicts = list(check_layer(mean_layer(kind)()))
  assert [v.line for v in verdicts if v.word != 'holds'] == []
