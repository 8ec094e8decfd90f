"""Mixtures of experts: a router, feed-forward layers of which each token uses a few, and a way for
tokens to reach them."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.config import Config, InputError
from jaxformer.layers.layer import Context, Layer, LayerConfig, LayerPosition, Memory, Output
from jaxformer.layers.mlp import ACTIVATIONS, ActivationName, GatedMlp, Mlp, MlpConfig
from jaxformer.layers.router import (
  BiasBalanced,
  Choice,
  ExpertChoice,
  NoisyTopK,
  Places,
  RouterConfig,
  SoftmaxTopK,
  SwitchRouter,
  TopKSoftmax,
)
from jaxformer.ops import moe
from jaxformer.ops.routing import load_of, places, within
from jaxformer.ops.sequence_parallel import time_axes
from jaxformer.sharding import param


class DispatchConfig(Config, abstract=True):
  """Base of the ways for tokens to reach the experts that they have chosen."""

  def run(
    self, x_BTD: Array, choice: Choice, experts: moe.Experts, activation: moe.Activation
  ) -> tuple[Array, dict[str, Array]]:
    """The experts' weighted sum, and diagnostics."""
    raise NotImplementedError


class Dropless(DispatchConfig):
  """Every token reaches all its experts, however many others do (`ops.moe.dropless`)."""

  def run(self, x_BTD, choice, experts, activation):
    return moe.dropless(x_BTD, choice.expert_BTK, choice.weight_BTK, experts, activation), {}


class Capacity(DispatchConfig):
  """An expert takes at most C = ceil(factor T K / E) tokens of a sequence of T, those that come
  first; a token whose expert is full does without it, and the residual stream carries it (Fedus et
  al. 2022, section 2.2, whose groups of tokens are here the sequences).

  No place depends on later tokens. But C grows with the length, and tokens before, of whatever
  document, take places: with drops, a sequence is not what its parts are apart. A single token
  (decoding) is never dropped, nor is any with a factor of E / K.

  Attributes:
    factor: the paper trains with 1.0 to 1.25 and evaluates with 2.0.
  """

  factor: float = 1.25

  def validate(self):
    self.require(self.factor > 0, 'factor', 'positive')

  def run(self, x_BTD, choice, experts, activation):
    (_, T, K), E = choice.expert_BTK.shape, experts.w_in.shape[0]
    if T == 1:
      return Dropless().run(x_BTD, choice, experts, activation)
    capacity = min(T, math.ceil(self.factor * T * K / E))
    # places are those of whole sequences; what has one is computed where the token is
    if time_axes(T):
      kept_BTK = within(choice.expert_BTK, E, capacity)
      kept = dataclasses.replace(choice, weight_BTK=jnp.where(kept_BTK, choice.weight_BTK, 0.0))
      return Dropless().run(x_BTD, kept, experts, activation)[0], {
        'moe/dropped': 1.0 - jnp.mean(kept_BTK.astype(jnp.float32))
      }
    token, weight, dropped = places(choice.expert_BTK, choice.weight_BTK, E, capacity)
    return moe.placed(x_BTD, token, weight, experts, activation), {'moe/dropped': dropped}


class ExpertWeights(nnx.Module):
  """The weights of E feed-forward layers, stacked; each is drawn by itself."""

  def __init__(
    self,
    config: MlpConfig,
    experts: int,
    active: float,
    width: int,
    rngs: nnx.Rngs,
    position: LayerPosition,
  ):
    F = config.hidden

    def weight(init, shape: tuple[int, int], *axes: str) -> nnx.Param:
      drawn = jax.vmap(lambda key: init(key, shape, shape[0], position))(
        jax.random.split(rngs.params(), experts)
      )
      return param(drawn, ('experts', *axes), active=active)

    self.w_in = weight(config.init, (width, F), 'embed', 'mlp')
    self.w_gate = (
      weight(config.init, (width, F), 'embed', 'mlp')
      if isinstance(config, GatedMlp.Config)
      else None
    )
    self.w_out = weight(config.out_init, (F, width), 'mlp', 'embed')

  def __call__(self) -> moe.Experts:
    return moe.Experts(
      self.w_in[...], None if self.w_gate is None else self.w_gate[...], self.w_out[...]
    )


class Moe(Layer):
  """y = act(sum over the chosen experts e of weight_e(x) expert_e(x)) + shared(x) (Shazeer et al.
  2017, eq. 1).

  `aux` has the router's losses, and diagnostics, one number a layer: `moe/load_ratio`, the load of
  the busiest expert over the mean (1 at balance, E / K where the same experts serve all);
  `moe/entropy` of the router's probabilities, a token, in nats (at most log E; 0 where it has made
  up its mind); `moe/router_logits`, the largest in magnitude; `moe/dropped`, the fraction of
  choices dropped, where the dispatch may drop, or of tokens that no expert took, where experts
  choose."""

  class Config(LayerConfig):
    """
    Attributes:
      experts: E.
      expert: the feed-forward layer that each expert is, without offsets and dropout.
      router: which experts a token goes to.
      dispatch: how it gets there; None for a router that fills the experts' places itself
        (`ExpertChoice`).
      shared: a feed-forward layer that all tokens use (DeepSeek-AI 2024); None for none.
      out_activation: on the weighted sum (sigmoid in Shazeer et al. 2017, appendix C.1).
    """

    experts: int = 8
    expert: MlpConfig = GatedMlp.Config()
    router: RouterConfig = TopKSoftmax.Config()
    dispatch: DispatchConfig | None = Dropless()
    shared: MlpConfig | None = None
    out_activation: ActivationName = 'identity'

    def validate(self):
      self.require(self.experts > 1, 'experts', 'at least 2')
      if self.expert.bias or self.expert.dropout:
        field = 'bias' if self.expert.bias else 'dropout'
        raise InputError(
          f'{self.tag}.expert.{field} = {getattr(self.expert, field)}: experts have no offsets and '
          'no dropout'
        )
      self.router.check(self.experts)
      chooses = isinstance(self.router, ExpertChoice.Config)
      accepted = (
        'none: experts that choose fill their own places' if chooses else 'Dropless or Capacity'
      )
      self.require((self.dispatch is None) == chooses, 'dispatch', accepted)

    def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> Moe:
      return Moe(self, width, rngs, position)

    @property
    def decodes(self) -> bool:
      return self.router.causal

    @property
    def expert_count(self) -> int:
      return self.experts

    @property
    def experts_per_token(self) -> float:
      return self.router.per_token(self.experts)

    @classmethod
    def examples(cls) -> tuple[Moe.Config, ...]:
      """Every router and every dispatch. Places suffice for all tokens, as what is dropped depends
      on the rest of a row; of noise and jitter there is none without a key."""
      gated, plain = GatedMlp.Config(hidden=24), Mlp.Config(hidden=24, activation='relu')
      return (
        cls(experts=4, expert=gated, router=TopKSoftmax.Config(balance=0.01, z_loss=0.001)),
        cls(
          experts=4,
          expert=plain,
          router=SwitchRouter.Config(jitter=0.01, balance=0.01),
          dispatch=Capacity(factor=4.0),
        ),
        cls(experts=4, expert=gated, router=SoftmaxTopK.Config(), dispatch=Capacity(factor=2.0)),
        cls(experts=6, expert=plain, router=NoisyTopK.Config(k=3), out_activation='sigmoid'),
        cls(
          experts=4,
          expert=gated,
          router=BiasBalanced.Config(scale=2.5, bias_rate=3.0),
          shared=plain,
        ),
        cls(experts=4, expert=gated, router=ExpertChoice.Config(choices=4.0), dispatch=None),
      )

  def __init__(self, config: Moe.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    c = config
    self.config = c
    self.router = c.router.build(width, c.experts, rngs, position)
    active = c.experts_per_token / c.experts
    self.experts = ExpertWeights(c.expert, c.experts, active, width, rngs, position)
    self.shared = None if c.shared is None else c.shared.build(width, rngs, position)

  def init_state(self, batch: int, max_len: int, memory: Memory | None = None) -> tuple[()]:
    if not self.config.decodes:
      raise InputError(
        f'{self.config.tag}.router = {self.config.router.tag}: experts that choose among all '
        'tokens cannot decode'
      )
    return ()

  def __call__(self, x_BTD: Float[Array, 'B T D'], ctx: Context, state=None) -> Output:
    c, routed, weights = self.config, self.router(x_BTD, ctx), self.experts()
    activation = ACTIVATIONS[c.expert.activation]
    if isinstance(routed, Places):
      y, aux = (
        moe.placed(x_BTD, routed.token_BEC, routed.weight_BEC, weights, activation),
        {'moe/dropped': _left_out(routed)},
      )
    else:
      assert c.dispatch is not None
      y, aux = c.dispatch.run(x_BTD, routed, weights, activation)
      load_E = load_of(routed.expert_BTK, c.experts)
      aux['moe/load_ratio'] = jnp.max(load_E) / jnp.mean(load_E)
    y = ACTIVATIONS[c.out_activation](y)
    if self.shared is not None:
      y = y + self.shared(x_BTD, ctx.fold(1)).y
    p = routed.probabilities_BTE
    aux['moe/entropy'] = jnp.mean(jnp.sum(-p * jnp.log(p + 1e-20), axis=-1))
    aux['moe/router_logits'] = jnp.max(jnp.abs(routed.logits_BTE))
    aux = {name: jax.lax.stop_gradient(v) for name, v in aux.items()}
    return Output(y, state, aux | {f'loss/{name}': v for name, v in routed.losses.items()})


def _left_out(routed: Places) -> Array:
  B, T, _ = routed.logits_BTE.shape
  taken = (
    jnp.zeros((B, T), bool).at[jnp.arange(B)[:, None], routed.token_BEC.reshape(B, -1)].set(True)
  )
  return 1.0 - jnp.mean(taken.astype(jnp.float32))
