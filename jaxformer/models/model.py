"""The interface of every model: a config that says what it reads, predicts and costs, and a module
with `loss` and `scores`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxformer.config import Config, InputError
from jaxformer.layers.layer import Context, LayerConfig, Output
from jaxformer.layers.position import PositionConfig
from jaxformer.models.head import Head
from jaxformer.models.stack import Group, layers_with_widths
from jaxformer.ops.loss import LossSums
from jaxformer.task_type import Batch, TaskType


class ModelConfig(Config, abstract=True):
  """Base of all model configs: `build` makes the module, `jaxformer.models.params.define` its
  structure without arrays.

  Define `task`, `stacks` and `build`; the rest follows from them.

  Attributes:
    context_length: the longest sequence that the model is meant for; the size of a table of learned
      positions.
    width: of the residual stream.
    positions: added to the embeddings; None where layers encode positions themselves, or none are
      used.
  """

  context_length: int
  width: int
  positions: PositionConfig | None = None

  def validate(self):
    self.require_positive('context_length', 'width')

  def build(self, rngs: nnx.Rngs) -> BaseModel:
    """Make the module, with initialized parameters."""
    raise NotImplementedError

  @property
  def task(self) -> TaskType:
    """What the model reads and predicts."""
    raise NotImplementedError

  @property
  def stacks(self) -> tuple[tuple[Group, ...], ...]:
    """The groups of each stack; the last stack is the one that decodes."""
    raise NotImplementedError

  @property
  def max_len(self) -> int | None:
    """The longest sequence that the model can read; None if unlimited."""
    bounded = self.positions is not None and self.positions.bounded
    return self.context_length if bounded else None

  def check_length(self, length: int) -> None:
    """Raise `InputError` for a sequence longer than `max_len`."""
    if self.max_len is not None and length > self.max_len:
      raise InputError(
        f'a sequence of {length} tokens is longer than the {self.max_len} learned positions of the '
        'model'
      )

  def layers_with_widths(self) -> Iterator[tuple[LayerConfig, int, int]]:
    """Every layer's config, the width of its input, and how many times it occurs in the model."""
    for groups in self.stacks:
      yield from layers_with_widths(groups, self.width)

  def layers(self) -> Iterator[tuple[LayerConfig, int]]:
    """Every layer's config, and how many times it occurs in the model."""
    return ((layer, n) for layer, _, n in self.layers_with_widths())

  def state_size(self, max_len: int) -> int | None:
    """Numbers in the decoding state of one sequence of up to `max_len` tokens, with what is kept of
    a source of `max_len` tokens; None for a model that does not decode."""
    return self._of_state(lambda layer, width: layer.state_size(width, max_len))

  def state_bytes(self, max_len: int) -> int | None:
    """Bytes of the same state as `LayerConfig.state_bytes` has them."""
    return self._of_state(lambda layer, width: layer.state_bytes(width, max_len))

  def _of_state(self, of: Callable[[LayerConfig, int], int]) -> int | None:
    """Sum over the layers that decode."""
    if self.task.predicts != 'next_token':
      return None
    layers = layers_with_widths(self.stacks[-1], self.width)
    return sum(n * of(layer, width) for layer, width, n in layers)

  def mixing_flops_per_token(self, length: int, causal: bool) -> float:
    """Forward FLOPs per token other than products with parameters
    (`LayerConfig.mixing_flops_per_token`), over all layers; for pairs, per token of the target with
    one of the source, both of `length` tokens."""
    return sum(
      n * layer.mixing_flops_per_token(width, length, causal)
      for layer, width, n in self.layers_with_widths()
    )


class BaseModel(nnx.Module):
  """Base of all models. Define `read` and a `head`; training needs `loss`, evaluation `scores`."""

  head: Head

  def read(self, batch: Batch, ctx: Context) -> Output:
    """Return what the head reads, `[B, T, D]`, and the layers' auxiliary values."""
    raise NotImplementedError

  def targets(self, batch: Batch) -> Int[Array, 'B T']:
    """The target of each position that `read` returns."""
    return jnp.asarray(batch.targets_BT)

  @property
  def tied_VD(self) -> nnx.Param | None:
    """The token table that a tied head shares."""
    return None

  def loss(
    self, batch: Batch, ctx: Context = Context(), **weights: float
  ) -> tuple[LossSums, dict[str, Array]]:
    """Sums of the loss over a batch, and auxiliary values; `weights` are those of `Head.loss`."""
    out = self.read(batch, ctx)
    sums = self.head.loss(out.y, self.targets(batch), self.tied_VD, **weights)
    return sums, out.aux

  def scores(
    self, batch: Batch, ctx: Context = Context()
  ) -> tuple[Float[Array, 'B T'], Bool[Array, 'B T']]:
    """-log p(target) of every position in nats, fp32, and whether the target is an argmax; 0 and
    False where there is no target."""
    return self.head.scores(self.read(batch, ctx).y, self.targets(batch), self.tied_VD)
