"""Routers: the experts that each token is sent to, and their weights. Logits, probabilities and
losses are fp32.

Each way of routing is a type of config; all share one module, `Router`. Dims: K experts per token,
C slots of an expert in a sequence."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformer.config import Config
from jaxformer.layers.init import Init, Normal, Zeros
from jaxformer.layers.layer import Context, LayerPosition
from jaxformer.ops.routing import (
  balance_factors,
  balance_loss,
  cv_squared,
  in_best_groups,
  load_balancing_bias_gradient,
  load_of,
  noisy_load,
  sequence_balance_loss,
  z_loss,
)
from jaxformer.sharding import param


@dataclasses.dataclass(frozen=True)
class Routing:
  """Result of routing.

  Attributes:
    index: where tokens choose, the experts of each token, `[B, T, K]`, all different; where experts
      choose, the token in each slot of each expert, `[B, E, C]`.
    weight: the factor on each of these outputs.
    logits_BTE: of the router, without noise.
    probabilities_BTE: what the losses and the entropy are computed from.
    losses: weighted, by their names in `Output.aux`.
  """

  index: Int[Array, 'B _ _']
  weight: Float[Array, 'B _ _']
  logits_BTE: Float[Array, 'B T E']
  probabilities_BTE: Float[Array, 'B T E']
  losses: dict[str, Array] = dataclasses.field(default_factory=dict)


class RouterConfig(Config, abstract=True):
  """Base of the routers.

  Attributes:
    balance: weight of `ops.routing.balance_loss`, one loss per layer, which are added (Fedus et al.
      2022, section 2.2); None for none. Each balanced layer has a loss of `balance` times the
      experts per token.
    pooled_balance: weight of the same loss of the tokens of all layers of the stack together, as
      transformers computes it for Mixtral and Jamba; None for none. A balanced stack of any depth
      has a loss of `pooled_balance` times the experts per token. Layers with another number of
      experts have a loss of their own.
    sequence_balance: weight of `ops.routing.sequence_balance_loss`, one loss per layer, which are
      added; None for none. Each balanced layer has a loss of `sequence_balance`.
    z_loss: weight of `ops.routing.z_loss`; None for none.
    logit_bias: whether the logits have a bias (gpt-oss).
    init: of the kernel and of the bias on the logits.
  """

  balance: float | None = None
  pooled_balance: float | None = None
  sequence_balance: float | None = None
  z_loss: float | None = None
  logit_bias: bool = False
  init: Init = Normal()

  noisy: ClassVar[bool] = False  # whether there is a second kernel, of the noise's scale
  experts_choose: ClassVar[bool] = False  # then a token's experts depend on later tokens

  def validate(self):
    self.require_positive('balance', 'pooled_balance', 'sequence_balance', 'z_loss')

  def build(self, width: int, experts: int, rngs: nnx.Rngs, position: LayerPosition) -> Router:
    return Router(self, width, experts, rngs, position)

  def bias(self, experts: int) -> nnx.Param | None:
    """The bias on the choice, if there is one."""
    return None

  def check(self, experts: int) -> None:
    """Raise `InputError` if the router cannot choose among this many experts."""

  def per_token(self, experts: int) -> float:
    """Mean number of experts per token."""
    raise NotImplementedError

  def route(self, router: Router, x_BTD: Float[Array, 'B T D'], ctx: Context) -> Routing:
    """Choose; the losses are those that this router alone has."""
    raise NotImplementedError


class Router(nnx.Module):
  """logits = x W, perhaps + b, in fp32, and the choice that the config makes of them."""

  def __init__(
    self, config: RouterConfig, width: int, experts: int, rngs: nnx.Rngs, position: LayerPosition
  ):
    def kernel() -> nnx.Param:
      # Replicated over the experts' mesh axis: all are compared for each token.
      drawn = config.init(rngs.params(), (width, experts), width, position)
      return param(drawn, ('embed', None), full_precision=True)

    self.config, self.experts = config, experts
    self.kernel = kernel()
    self.noise = kernel() if config.noisy else None
    drawn = config.init(rngs.params(), (experts,), width, position) if config.logit_bias else None
    self.logit_bias = (
      None if drawn is None else param(drawn, (None,), decay=False, full_precision=True)
    )
    self.bias = config.bias(experts)

  def __call__(self, x_BTD: Float[Array, 'B T D'], ctx: Context) -> Routing:
    c, r = self.config, self.config.route(self, x_BTD, ctx)
    losses = dict(r.losses)
    if c.balance is not None:
      load_E = load_of(r.index, self.experts)
      losses['loss/balance'] = c.balance * balance_loss(load_E, r.probabilities_BTE)
    if c.pooled_balance is not None:
      f, p = balance_factors(load_of(r.index, self.experts), r.probabilities_BTE)
      losses[f'pooled/balance/{self.experts}'] = jnp.stack([f, c.pooled_balance * p])[None]
    if c.sequence_balance is not None:
      loss = sequence_balance_loss(r.index, r.probabilities_BTE)
      losses['loss/sequence_balance'] = c.sequence_balance * loss
    if c.z_loss is not None:
      losses['loss/router_z'] = c.z_loss * z_loss(r.logits_BTE)
    return dataclasses.replace(r, losses=losses)

  def logits(self, x_BTD: Array, kernel: nnx.Param | None = None) -> Float[Array, 'B T E']:
    w_DE = (self.kernel if kernel is None else kernel)[...].astype(jnp.float32)
    logits = jnp.einsum(
      'btd,de->bte', x_BTD.astype(jnp.float32), w_DE, precision=jax.lax.Precision.HIGHEST
    )
    if self.logit_bias is None or kernel is not None:
      return logits
    return logits + self.logit_bias[...].astype(jnp.float32).reshape(1, 1, -1)


class TokenChoiceConfig(RouterConfig, abstract=True):
  """Base of the routers in which each token chooses its experts.

  Attributes:
    k: experts per token.
  """

  k: int = 2

  def validate(self):
    super().validate()
    self.require_positive('k')

  def check(self, experts: int) -> None:
    self.require(self.k <= experts, 'k', f'at most the number of experts, {experts}')

  def per_token(self, experts: int) -> float:
    return self.k


class GroupedConfig(TokenChoiceConfig, abstract=True):
  """Base of the routers in which each token chooses its experts among those of a few groups, which
  limits the number of devices that it is sent to.

  Attributes:
    groups: groups of consecutive experts; 1 for no such limit.
    groups_per_token: groups among whose experts a token chooses; their score is that of
      `ops.routing.in_best_groups`.
    normalized: whether the weights of the chosen experts are divided by their sum.
    scale: factor on the weights.
  """

  groups: int = 1
  groups_per_token: int = 1
  normalized: bool = False
  scale: float = 1.0

  group_top: ClassVar[int] = 1  # of how many scores a group's is the sum

  def validate(self):
    super().validate()
    self.require_positive('groups', 'groups_per_token', 'scale')
    accepted = f'at most groups = {self.groups}'
    self.require(self.groups_per_token <= self.groups, 'groups_per_token', accepted)

  def check(self, experts: int) -> None:
    super().check(experts)
    self.require(experts % self.groups == 0, 'groups', f'a divisor of the experts, {experts}')
    if self.groups > 1:
      size = experts // self.groups
      accepted = f'at least {self.group_top} experts per group, not {size}'
      self.require(size >= self.group_top, 'groups', accepted)
      enough = f'enough groups of {size} experts for k = {self.k}'
      self.require(self.groups_per_token * size >= self.k, 'groups_per_token', enough)

  def chosen(self, score_BTE: Float[Array, 'B T E']) -> Int[Array, 'B T K']:
    """The experts with the k largest scores in the best groups."""
    score_BTE = jax.lax.stop_gradient(score_BTE)
    if self.groups > 1:
      best = in_best_groups(score_BTE, self.groups, self.groups_per_token, self.group_top)
      score_BTE = jnp.where(best, score_BTE, -jnp.inf)
    return jax.lax.top_k(score_BTE, self.k)[1]

  def weights(self, chosen_BTK: Float[Array, 'B T K']) -> Float[Array, 'B T K']:
    """The weights, from the scores of the chosen experts."""
    if not self.normalized:
      return self.scale * chosen_BTK
    return self.scale * chosen_BTK / (jnp.sum(chosen_BTK, axis=-1, keepdims=True) + 1e-20)


class TopKSoftmax(TokenChoiceConfig):
  """The k largest logits, weighted with the softmax over these (Jiang et al. 2024, section 2.1:
  Mixtral). That equals the softmax over all, renormalized over the chosen ones."""

  def validate(self):
    super().validate()
    self.require(self.k > 1, 'k', 'at least 2: the weight of a single expert would always be 1')

  def route(self, router, x_BTD, ctx):
    logits = router.logits(x_BTD)
    top, expert = jax.lax.top_k(logits, self.k)
    weight, probabilities = jax.nn.softmax(top, axis=-1), jax.nn.softmax(logits, axis=-1)
    return Routing(expert, weight, logits, probabilities)


class SoftmaxTopK(GroupedConfig):
  """The k largest probabilities of the softmax over all logits, not renormalized (Lieber et al.
  2024: Jamba). With k = 1 it is the router of Switch: the argmax, weighted with its probability
  (Fedus et al. 2022, eq. 1-2). With groups it is that of DeepSeek-V2 (DeepSeek-AI 2024, section
  2.2.2), where a group's score is its largest probability.

  Attributes:
    jitter: in training the router reads x u with u uniform in [1 - jitter, 1 + jitter], if the
      context has a key for dropout (Fedus et al. 2022, section 2.4: 1e-2).
  """

  jitter: float = 0.0

  def validate(self):
    super().validate()
    self.require_rate('jitter')

  def route(self, router, x_BTD, ctx):
    x, jitter = x_BTD.astype(jnp.float32), self.jitter
    if jitter and ctx.dropout_key is not None:
      x = x * jax.random.uniform(ctx.dropout_key, x.shape, minval=1 - jitter, maxval=1 + jitter)
    logits = router.logits(x)
    probabilities = jax.nn.softmax(logits, axis=-1)
    expert = self.chosen(probabilities)
    weight = self.weights(jnp.take_along_axis(probabilities, expert, axis=-1))
    return Routing(expert, weight, logits, probabilities)


class SigmoidTopK(TokenChoiceConfig):
  """The k largest logits, each weighted with its own sigmoid (Llama 4, with k = 1)."""

  k: int = 1

  def route(self, router, x_BTD, ctx):
    logits = router.logits(x_BTD)
    top, expert = jax.lax.top_k(logits, self.k)
    return Routing(expert, jax.nn.sigmoid(top), logits, jax.nn.softmax(logits, axis=-1))


class NoisyTopK(TokenChoiceConfig):
  """H = x W + eps softplus(x W_noise), eps ~ N(0, 1); the softmax over the k largest of H (Shazeer
  et al. 2017, eq. 3-5).

  Two losses balance it: w CV(importance)^2, with importance_e the sum of e's weights over the batch
  (eq. 6-7), and w CV(load)^2, with the load in closed form (`ops.routing.noisy_load`). Noise is
  drawn if the context has a key for dropout; otherwise H = x W.

  Attributes:
    importance, load: weights of the losses; None for none.
    floor: added to the noise's standard deviation, as in the authors' code.
  """

  k: int = 4
  init: Init = Zeros()
  importance: float | None = 0.1
  load: float | None = 0.1
  floor: float = 1e-2

  noisy: ClassVar[bool] = True

  def validate(self):
    super().validate()
    self.require_positive('importance', 'load')
    self.require_not_negative('floor')

  def check(self, experts: int) -> None:
    self.require(self.k < experts, 'k', f'below the number of experts, {experts}')

  def route(self, router, x_BTD, ctx):
    clean, noisy = router.logits(x_BTD), router.logits(x_BTD, router.noise)
    std = jax.nn.softplus(noisy) + self.floor
    noisy = (
      clean
      if ctx.dropout_key is None
      else clean + std * jax.random.normal(ctx.dropout_key, clean.shape)
    )
    top, expert = jax.lax.top_k(noisy, self.k)
    weight, losses = jax.nn.softmax(top, axis=-1), {}
    if self.importance is not None:
      chosen = expert[..., None] == jnp.arange(router.experts).reshape(1, 1, 1, -1)
      losses['loss/importance'] = self.importance * cv_squared(
        jnp.sum(jnp.where(chosen, weight[..., None], 0.0), axis=(0, 1, 2))
      )
    if self.load is not None:
      losses['loss/load'] = self.load * cv_squared(noisy_load(clean, noisy, std, self.k))
    return Routing(expert, weight, clean, jax.nn.softmax(clean, axis=-1), losses)


class BiasBalanced(GroupedConfig):
  """Balance without a loss: scores s = sigmoid(x W); the k largest of s + bias are chosen, weighted
  with scale s / (sum of the chosen s), without the bias (DeepSeek-AI 2024, section 2.1.2:
  DeepSeek-V3). With groups, the score of a group is the sum of the two largest s + bias in it.

  The bias of an expert with more than the mean load falls and that of one with less rises, in each
  step by about learning rate * `bias_rate`: see `ops.routing.load_balancing_bias_gradient`. (The
  paper's step is 0.001, independent of the schedule.)

  Attributes:
    bias_rate: factor on the learning rate of the biases.
  """

  normalized: bool = True
  bias_rate: float = 1.0

  group_top: ClassVar[int] = 2

  def validate(self):
    super().validate()
    self.require_positive('bias_rate')

  def bias(self, experts: int) -> nnx.Param:
    metadata: dict[str, Any] = {'decay': False, 'full_precision': True, 'matmul': False}
    return param(jnp.zeros(experts), (None,), lr_scale=self.bias_rate, **metadata)

  def route(self, router, x_BTD, ctx):
    logits, bias = router.logits(x_BTD), router.bias[...]
    score = jax.nn.sigmoid(logits)
    expert = self.chosen(score + bias.reshape(1, 1, -1))
    weight = self.weights(jnp.take_along_axis(score, expert, axis=-1))
    weight += load_balancing_bias_gradient(bias, load_of(expert, router.experts))
    return Routing(expert, weight, logits, score / jnp.sum(score, axis=-1, keepdims=True))


class ExpertChoice(RouterConfig):
  """Experts choose: each takes, of every sequence, the C = ceil(T choices / E) tokens to which its
  softmax gives most, weighted with their probabilities (Zhou et al. 2022, section 3.1, whose
  groups of tokens are here the sequences). Always balanced.

  Whether a token is taken depends on later ones, and on the other documents of its row, so a layer
  with this router does not decode. With `choices` = E every expert takes every token.

  Attributes:
    choices: mean number of experts per token (the paper's capacity factor).
  """

  choices: float = 2.0

  experts_choose: ClassVar[bool] = True

  def validate(self):
    super().validate()
    self.require_positive('choices')
    for name in ('balance', 'pooled_balance', 'sequence_balance'):
      problem = 'none: experts that choose are always balanced'
      self.require(getattr(self, name) is None, name, problem)

  def check(self, experts: int) -> None:
    self.require(self.choices <= experts, 'choices', f'at most the number of experts, {experts}')

  def per_token(self, experts: int) -> float:
    return self.choices

  def route(self, router, x_BTD, ctx):
    logits, T = router.logits(x_BTD), x_BTD.shape[1]
    probabilities = jax.nn.softmax(logits, axis=-1)
    slots = math.ceil(T * self.choices / router.experts)
    weight, token = jax.lax.top_k(jnp.swapaxes(probabilities, 1, 2), slots)
    return Routing(token, weight, logits, probabilities)
