"""From hidden vectors to logits, losses and scores."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxformer.config import InputError
from jaxformer.layers.init import Init, Normal
from jaxformer.layers.layer import LayerPosition
from jaxformer.ops.linear import linear
from jaxformer.ops.loss import LossSums, cross_entropy, token_scores
from jaxformer.ops.softcap import scaled_and_capped
from jaxformer.sharding import param


class Head(nnx.Module):
  """logits = softcap tanh(logit_scale (y W + b) / softcap), in fp32.

  Where the head is tied, W is the transpose of a token table, which the methods take as `tied_VD`.
  Losses and scores are computed in chunks and never hold all logits.

  Args:
    init: of the kernel W; None for N(0, 0.02^2).
    tied: the kernel is not a parameter of the head.
    bias: initialization of b, with the fan-in of W; None for no bias.
    logit_scale: None for 1.
    softcap: None for none.
    per_token: False for the head of a few classes that reads one vector per sequence: it is not
      sharded over its outputs, and not a product per token in counts of FLOPs.
  """

  def __init__(
    self,
    width: int,
    vocab_size: int,
    rngs: nnx.Rngs,
    *,
    init: Init | None = None,
    tied: bool = False,
    bias: Init | None = None,
    logit_scale: float | None = None,
    softcap: float | None = None,
    per_token: bool = True,
  ):
    axis = 'vocab' if per_token else None
    self.kernel = (
      None
      if tied
      else param(
        (init or Normal())(rngs.params(), (width, vocab_size), width, LayerPosition()),
        ('embed', axis),
        matmul=per_token,
      )
    )
    self.bias = (
      None
      if bias is None
      else param(bias(rngs.params(), (vocab_size,), width, LayerPosition()), (axis,), decay=False)
    )
    self.logit_scale, self.softcap = logit_scale, softcap

  @jax.named_scope('Head')
  def __call__(
    self, y: Float[Array, '*B D'], tied_VD: nnx.Param | None = None
  ) -> Float[Array, '*B V']:
    """Logits of hidden vectors."""
    logits = linear(y, self._weights(tied_VD)).astype(jnp.float32)
    if self.bias is not None:
      logits = logits + self.bias[...].astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
    return scaled_and_capped(logits, self.logit_scale, self.softcap)[0]

  @jax.named_scope('Head')
  def loss(
    self,
    y_BTD: Float[Array, 'B T D'],
    targets_BT: Int[Array, 'B T'],
    tied_VD: nnx.Param | None = None,
    *,
    z_loss: float = 0.0,
    max_logit_loss: float = 0.0,
    label_smoothing: float = 0.0,
  ) -> LossSums:
    """Sums of the loss over all targets (`ops.loss.cross_entropy`)."""
    if label_smoothing and self.softcap is not None:
      raise InputError('training.label_smoothing', label_smoothing, '0 where model.softcap is set')
    return cross_entropy(
      y_BTD,
      self._weights(tied_VD),
      targets_BT,
      z_loss=z_loss,
      max_logit_loss=max_logit_loss,
      label_smoothing=label_smoothing,
      **self._options(),
    )

  def scores(
    self,
    y_BTD: Float[Array, 'B T D'],
    targets_BT: Int[Array, 'B T'],
    tied_VD: nnx.Param | None = None,
  ) -> tuple[Float[Array, 'B T'], Bool[Array, 'B T']]:
    """-log p(target) of every position in nats, fp32, and whether the target is an argmax; 0 and
    False where there is no target."""
    return token_scores(y_BTD, self._weights(tied_VD), targets_BT, **self._options())

  def _weights(self, tied_VD: nnx.Param | None) -> Array:
    if self.kernel is not None:
      return self.kernel[...]
    if tied_VD is None:
      raise ValueError('a tied head needs the token table')
    return tied_VD[...].T

  def _options(self) -> dict[str, Any]:
    bias = None if self.bias is None else self.bias[...]
    return {
      'bias_V': bias,
      'logit_scale': self.logit_scale,
      'softcap': self.softcap,
      'transposed': self.kernel is None,
    }
