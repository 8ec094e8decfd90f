"""Mixtures of experts: a router, feed-forward layers of which each token uses a few, and the
dispatch of tokens to them."""

from __future__ import annotations

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.config import InputError
from jaxformer.layers.dense import Dense, ExpertDense
from jaxformer.layers.layer import Context, Layer, LayerConfig, LayerPosition, Output
from jaxformer.layers.mlp import ACTIVATIONS, ActivationName, GatedMlp, Mlp
from jaxformer.layers.router import (
  BiasBalanced,
  ExpertChoice,
  NoisyTopK,
  RouterConfig,
  Routing,
  SigmoidTopK,
  SoftmaxTopK,
  TopKSoftmax,
)
from jaxformer.ops import moe
from jaxformer.ops.routing import load_of


class Moe(Layer):
  """y = act(sum over the chosen experts e of weight_e(x) expert_e(x)) + shared(x) (Shazeer et al.
  2017, eq. 1).

  With `shared_gate` the last term is sigmoid(x w) shared(x), with w `[D, 1]` (Qwen Team 2024,
  Qwen1.5-MoE).

  `aux` has the router's losses, and diagnostics, one scalar per layer: `moe/load_ratio`, the load
  of the busiest expert over the mean (1 if balanced, E / K if all tokens use the same experts);
  `moe/entropy` of the router's probabilities, mean over tokens, in nats (at most log E);
  `moe/router_logits`, the largest magnitude; `moe/dropped`, the fraction of choices dropped, if
  there is a capacity, or of tokens that no expert took, if experts choose."""

  class Config(LayerConfig):
    """
    Attributes:
      experts: E.
      expert: the feed-forward layer that each expert is, without dropout.
      router: how experts are chosen.
      capacity_factor: an expert takes at most C = ceil(factor T K / E) tokens of a sequence of T,
        the first ones; a token whose expert is full skips it, and the residual stream carries it
        (Fedus et al. 2022, section 2.2, whose groups of tokens are here the sequences; 1.0 to 1.25
        in training there, 2.0 in evaluation). None: dropless, every token reaches all its experts.
        No slot depends on later tokens. But C grows with the length, and earlier tokens, of any
        document, take slots: if tokens are dropped, a packed sequence differs from its parts. A
        single token (decoding) is never dropped, nor is any with a factor of E / K.
      weighted: what the router's weight multiplies, an expert's output or its input (Llama 4).
      shared: a feed-forward layer that all tokens use (DeepSeek-AI 2024); None for none.
      shared_gate: whether a sigmoid of one number per token multiplies its output.
      out_activation: on the weighted sum (sigmoid in Shazeer et al. 2017, appendix C.1).
    """

    experts: int = 8
    expert: Mlp.Config = GatedMlp.Config()
    router: RouterConfig = TopKSoftmax()
    capacity_factor: float | None = None
    weighted: Literal['output', 'input'] = 'output'
    shared: Mlp.Config | None = None
    shared_gate: bool = False
    out_activation: ActivationName = 'identity'

    def validate(self):
      self.require(self.experts > 1, 'experts', 'at least 2')
      if self.expert.dropout:
        problem = 'experts have no dropout'
        raise InputError(f'{self.tag}.expert.dropout', self.expert.dropout, problem=problem)
      self.router.check(self.experts)
      gates = self.shared is not None or not self.shared_gate
      self.require(gates, 'shared_gate', 'False without a shared layer')
      self.require_positive('capacity_factor')
      self.require(
        self.capacity_factor is None or not self.router.experts_choose,
        'capacity_factor',
        'none: experts that choose fill their own slots',
      )

    @property
    def decodes(self) -> bool:
      return not self.router.experts_choose

    @property
    def expert_count(self) -> int:
      return self.experts

    @property
    def experts_per_token(self) -> float:
      return self.router.per_token(self.experts)

    @classmethod
    def examples(cls):
      """Every router, dropless and with a capacity that suffices for all tokens, since what is
      dropped depends on the rest of a row; without a key there is no noise and no jitter."""
      gated, plain = GatedMlp.Config(hidden=24), Mlp.Config(hidden=24, activation='relu')
      switch = SoftmaxTopK(k=1, jitter=0.01, balance=0.01)
      biased = BiasBalanced(scale=2.5, bias_rate=3.0)
      grouped = SoftmaxTopK(
        groups=3, groups_per_token=2, scale=2.0, normalized=True, sequence_balance=0.01
      )
      clamped = gated.replace(activation='gelu_sigmoid', bias=True, limit=0.05, up_offset=1.0)
      on_input = cls(experts=4, expert=clamped, router=SigmoidTopK(k=1), weighted='input')
      return (
        cls(experts=4, expert=gated, router=TopKSoftmax(pooled_balance=0.01, z_loss=0.001)),
        cls(experts=4, expert=plain, router=switch, capacity_factor=4.0),
        cls(experts=4, expert=gated, router=SoftmaxTopK(), capacity_factor=2.0),
        cls(experts=6, expert=plain, router=NoisyTopK(k=3), out_activation='sigmoid'),
        cls(experts=4, expert=gated, router=biased, shared=plain),
        cls(experts=4, expert=gated, router=ExpertChoice(choices=4.0)),
        cls(experts=6, expert=plain, router=grouped, shared=gated, shared_gate=True),
        cls(experts=8, expert=gated, router=biased.replace(groups=4, groups_per_token=2)),
        cls(experts=4, expert=clamped, router=TopKSoftmax(logit_bias=True)),
        on_input,
        on_input.replace(capacity_factor=4.0),
      )

  def __init__(self, config: Moe.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    c, e, E = config, config.expert, config.experts
    self.config = c
    self.router = c.router.build(width, E, rngs, position)
    active = c.experts_per_token / E
    dense = functools.partial(ExpertDense, rngs=rngs, position=position, active=active, bias=e.bias)
    self.expert_up = dense(e.init, (E, width, e.hidden), ('embed', 'mlp'))
    self.expert_gate = dense(e.init, (E, width, e.hidden), ('embed', 'mlp')) if e.gated else None
    self.expert_down = dense(e.out_init, (E, e.hidden, width), ('mlp', 'embed'))
    self.shared = None if c.shared is None else c.shared.build(width, rngs, position)
    self.shared_gate = (
      Dense(c.shared.init, (width, 1), ('embed', None), rngs=rngs, position=position)
      if c.shared is not None and c.shared_gate
      else None
    )

  def __call__(self, x_BTD: Float[Array, 'B T D'], ctx: Context, state=None) -> Output:
    c, routed = self.config, self.router(x_BTD, ctx)
    y, aux = self._dispatched(x_BTD, routed)
    y = ACTIVATIONS[c.out_activation](y)
    if self.shared is not None:
      shared = self.shared(x_BTD, ctx.fold(1)).y
      if self.shared_gate is not None:
        shared = jax.nn.sigmoid(self.shared_gate(x_BTD)) * shared
      y = y + shared
    p = routed.probabilities_BTE
    aux['moe/entropy'] = jnp.mean(jnp.sum(-p * jnp.log(p + 1e-20), axis=-1))
    aux['moe/router_logits'] = jnp.max(jnp.abs(routed.logits_BTE))
    aux = {name: jax.lax.stop_gradient(v) for name, v in aux.items()}
    return Output(y, state, aux | routed.losses)

  def _experts(self) -> moe.Experts:
    up, gate, down = self.expert_up, self.expert_gate, self.expert_down
    biases = (None if p is None or p.bias is None else p.bias[...] for p in (up, gate, down))
    w_gate = None if gate is None else gate.kernel[...]
    return moe.Experts(up.kernel[...], w_gate, down.kernel[...], *biases)

  def _dispatched(self, x_BTD: Array, r: Routing) -> tuple[Array, dict[str, Array]]:
    """The experts' weighted sum, and diagnostics of the dispatch."""
    c, (B, T, _), E = self.config, x_BTD.shape, self.config.experts
    experts, form = self._experts(), moe.Form(c.expert.hidden_units, c.weighted == 'input')
    if c.router.experts_choose:
      y = moe.from_slots(x_BTD, r.index, r.weight, experts, form)
      taken_BT = (
        jnp.zeros((B, T), bool).at[jnp.arange(B)[:, None], r.index.reshape(B, -1)].set(True)
      )
      return y, {'moe/dropped': 1.0 - jnp.mean(taken_BT.astype(jnp.float32))}
    load_E = load_of(r.index, E)
    aux = {'moe/load_ratio': jnp.max(load_E) / jnp.mean(load_E)}
    if c.capacity_factor is None or T == 1:
      return moe.dropless(x_BTD, r.index, r.weight, experts, form), aux
    capacity = min(T, math.ceil(c.capacity_factor * T * r.index.shape[2] / E))
    y, dropped = moe.dispatch_with_capacity(x_BTD, r.index, r.weight, experts, form, capacity)
    return y, aux | {'moe/dropped': dropped}
