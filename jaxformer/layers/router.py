"""Routers: which experts a token goes to, and how much each counts. Logits, probabilities and
losses are fp32.

Each way of routing is a config type. Dims as everywhere, and K experts a token, C places of an
expert in a sequence."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformer.config import Config, InputError
from jaxformer.layers.init import Init, Normal, Zeros
from jaxformer.layers.layer import Context, LayerPosition
from jaxformer.ops.routing import balance_loss, cv_squared, load_of, noisy_load, nudge, z_loss
from jaxformer.sharding import param


@dataclasses.dataclass(frozen=True)
class Choice:
  """Tokens have chosen experts.

  Attributes:
    expert_BTK: which; the experts of one token differ.
    weight_BTK: the factor on what each gives.
    logits_BTE: of the router, without noise.
    probabilities_BTE: what losses and the entropy are taken of.
    losses: by name, weighted.
  """

  expert_BTK: Int[Array, 'B T K']
  weight_BTK: Float[Array, 'B T K']
  logits_BTE: Float[Array, 'B T E']
  probabilities_BTE: Float[Array, 'B T E']
  losses: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Places:
  """Experts have chosen tokens: as `Choice`, with the token in each place of each expert."""

  token_BEC: Int[Array, 'B E C']
  weight_BEC: Float[Array, 'B E C']
  logits_BTE: Float[Array, 'B T E']
  probabilities_BTE: Float[Array, 'B T E']
  losses: dict[str, Array]


class RouterConfig(Config, abstract=True):
  """Base of the routers.

  Attributes:
    balance: weight of `ops.routing.balance_loss`; None for none. A balanced layer costs `balance`
      times the experts a token.
    z_loss: weight of `ops.routing.z_loss`; None for none.
    init: of the logits' weights.
  """

  balance: float | None = None
  z_loss: float | None = None
  init: Init = Normal()

  def validate(self):
    for field in ('balance', 'z_loss'):
      self.require(
        getattr(self, field) is None or getattr(self, field) > 0, field, 'positive, or none'
      )

  def build(self, width: int, experts: int, rngs: nnx.Rngs, position: LayerPosition) -> Router:
    raise NotImplementedError

  @property
  def causal(self) -> bool:
    """Whether a token's experts depend on no later token."""
    return True

  def check(self, experts: int) -> None:
    """Raises `InputError` where it cannot choose among so many experts."""

  def per_token(self, experts: int) -> float:
    """Experts a token, on average."""
    raise NotImplementedError


class Router(nnx.Module):
  """Base of the routers: logits = x W, fp32."""

  def __init__(
    self, config: RouterConfig, width: int, experts: int, rngs: nnx.Rngs, position: LayerPosition
  ):
    self.config: Any = config  # of the subclass
    self.experts = experts
    # Replicated over the experts' mesh axis: all are compared for each token.
    self.w = param(
      config.init(rngs.params(), (width, experts), width, position),
      ('embed', None),
      full_precision=True,
    )

  def __call__(self, x_BTD: Float[Array, 'B T D'], ctx: Context) -> Choice | Places:
    raise NotImplementedError

  def logits(self, x_BTD: Array, w: nnx.Param | None = None) -> Float[Array, 'B T E']:
    w_DE = (self.w if w is None else w)[...].astype(jnp.float32)
    return jnp.einsum(
      'btd,de->bte', x_BTD.astype(jnp.float32), w_DE, precision=jax.lax.Precision.HIGHEST
    )

  def chosen(
    self,
    expert_BTK: Array,
    weight_BTK: Array,
    logits_BTE: Array,
    probabilities_BTE: Array,
    losses: dict[str, Array],
  ) -> Choice:
    c = self.config
    if c.balance is not None:
      losses = losses | {
        'balance': c.balance * balance_loss(load_of(expert_BTK, self.experts), probabilities_BTE)
      }
    return Choice(
      expert_BTK, weight_BTK, logits_BTE, probabilities_BTE, losses | self._z_loss(logits_BTE)
    )

  def _z_loss(self, logits_BTE: Array) -> dict[str, Array]:
    return (
      {} if self.config.z_loss is None else {'router_z': self.config.z_loss * z_loss(logits_BTE)}
    )


class TokenChoiceConfig(RouterConfig, abstract=True):
  """Base of the routers by which each token chooses its experts.

  Attributes:
    k: experts a token.
  """

  k: int = 2

  def validate(self):
    super().validate()
    self.require(self.k > 0, 'k', 'positive')

  def check(self, experts: int) -> None:
    if self.k > experts:
      raise InputError(f'{self.tag}.k = {self.k}: must be at most the number of experts, {experts}')

  def per_token(self, experts: int) -> float:
    return self.k


class TopKSoftmax(Router):
  """The k largest logits, and the softmax over these (Jiang et al. 2024, section 2.1: Mixtral),
  which is the softmax over all, the chosen ones scaled to add up to 1."""

  class Config(TokenChoiceConfig):
    def validate(self):
      super().validate()
      self.require(self.k > 1, 'k', 'at least 2: the weight of a single expert would always be 1')

    def build(
      self, width: int, experts: int, rngs: nnx.Rngs, position: LayerPosition
    ) -> TopKSoftmax:
      return TopKSoftmax(self, width, experts, rngs, position)

  def __call__(self, x_BTD: Float[Array, 'B T D'], ctx: Context) -> Choice:
    logits = self.logits(x_BTD)
    top, expert = jax.lax.top_k(logits, self.config.k)
    return self.chosen(
      expert, jax.nn.softmax(top, axis=-1), logits, jax.nn.softmax(logits, axis=-1), {}
    )


class SoftmaxTopK(Router):
  """The softmax over all logits, and the k largest of it as they are (Lieber et al. 2024:
  Jamba)."""

  class Config(TokenChoiceConfig):
    def build(
      self, width: int, experts: int, rngs: nnx.Rngs, position: LayerPosition
    ) -> SoftmaxTopK:
      return SoftmaxTopK(self, width, experts, rngs, position)

  def __call__(self, x_BTD: Float[Array, 'B T D'], ctx: Context) -> Choice:
    logits = self.logits(x_BTD)
    probabilities = jax.nn.softmax(logits, axis=-1)
    weight, expert = jax.lax.top_k(probabilities, self.config.k)
    return self.chosen(expert, weight, logits, probabilities, {})


class SwitchRouter(Router):
  """One expert a token: the likeliest of the softmax, weighted with its probability (Fedus et al.
  2022, eq. 1-2). In training the router sees x u with u uniform in [1 - jitter, 1 + jitter] (their
  section 2.4), where the context has a key for dropout."""

  class Config(RouterConfig):
    """
    Attributes:
      jitter: 1e-2 in the paper.
    """

    jitter: float = 0.0

    def validate(self):
      super().validate()
      self.require(0 <= self.jitter < 1, 'jitter', 'at least 0 and below 1')

    def build(
      self, width: int, experts: int, rngs: nnx.Rngs, position: LayerPosition
    ) -> SwitchRouter:
      return SwitchRouter(self, width, experts, rngs, position)

    def per_token(self, experts: int) -> float:
      return 1

  def __call__(self, x_BTD: Float[Array, 'B T D'], ctx: Context) -> Choice:
    x, jitter = x_BTD.astype(jnp.float32), self.config.jitter
    if jitter and ctx.dropout_key is not None:
      x = x * jax.random.uniform(ctx.dropout_key, x.shape, minval=1 - jitter, maxval=1 + jitter)
    logits = self.logits(x)
    probabilities = jax.nn.softmax(logits, axis=-1)
    weight, expert = jax.lax.top_k(probabilities, 1)
    return self.chosen(expert, weight, logits, probabilities, {})


class NoisyTopK(Router):
  """H = x W + eps softplus(x W_noise), eps ~ N(0, 1); the softmax over the k largest of H (Shazeer
  et al. 2017, eq. 3-5).

  Two losses balance it: w CV(importance)^2 with importance_e the sum of e's weights over the batch
    (eq. 6-7), and w CV(load)^2 with
  the load in closed form (`ops.routing.noisy_load`). Noise is drawn where the context has a key for
  dropout; without one H = x W."""

  class Config(TokenChoiceConfig):
    """
    Attributes:
      importance, load: the losses' weights; None for none.
      floor: added to the noise's standard deviation, as in the authors' code.
    """

    k: int = 4
    init: Init = Zeros()
    importance: float | None = 0.1
    load: float | None = 0.1
    floor: float = 1e-2

    def validate(self):
      super().validate()
      for field in ('importance', 'load'):
        self.require(
          getattr(self, field) is None or getattr(self, field) > 0, field, 'positive, or none'
        )
      self.require(self.floor >= 0, 'floor', 'at least 0')

    def check(self, experts: int) -> None:
      if self.k >= experts:
        raise InputError(f'{self.tag}.k = {self.k}: must be below the number of experts, {experts}')

    def build(self, width: int, experts: int, rngs: nnx.Rngs, position: LayerPosition) -> NoisyTopK:
      return NoisyTopK(self, width, experts, rngs, position)

  def __init__(
    self,
    config: NoisyTopK.Config,
    width: int,
    experts: int,
    rngs: nnx.Rngs,
    position: LayerPosition,
  ):
    super().__init__(config, width, experts, rngs, position)
    self.w_noise = param(
      config.init(rngs.params(), (width, experts), width, position),
      ('embed', None),
      full_precision=True,
    )

  def __call__(self, x_BTD: Float[Array, 'B T D'], ctx: Context) -> Choice:
    c, clean = self.config, self.logits(x_BTD)
    std = jax.nn.softplus(self.logits(x_BTD, self.w_noise)) + c.floor
    noisy = (
      clean
      if ctx.dropout_key is None
      else clean + std * jax.random.normal(ctx.dropout_key, clean.shape)
    )
    top, expert = jax.lax.top_k(noisy, c.k)
    weight, losses = jax.nn.softmax(top, axis=-1), {}
    if c.importance is not None:
      chosen = expert[..., None] == jnp.arange(self.experts).reshape(1, 1, 1, -1)
      losses['importance'] = c.importance * cv_squared(
        jnp.sum(jnp.where(chosen, weight[..., None], 0.0), axis=(0, 1, 2))
      )
    if c.load is not None:
      losses['load'] = c.load * cv_squared(noisy_load(clean, noisy, std, c.k))
    return self.chosen(expert, weight, clean, jax.nn.softmax(clean, axis=-1), losses)


class BiasBalanced(Router):
  """Balance without a loss (DeepSeek-AI 2024, section 2.1.2; DeepSeek-V3): scores s = sigmoid(x W);
  the k largest of s + bias are chosen; their weights are scale s / (sum of the chosen s), in which
  the bias has no part.

  The bias of an expert with more than the mean load falls and that of one with less rises, each
  step by nearly
  learning rate * `bias_rate`: see `ops.routing.nudge`. (The paper's step is 0.001, whatever the
    schedule.)
  """

  class Config(TokenChoiceConfig):
    """
    Attributes:
      scale: of the weights; 2.5 in DeepSeek-V3.
      bias_rate: factor on the learning rate of the biases.
    """

    scale: float = 1.0
    bias_rate: float = 1.0

    def validate(self):
      super().validate()
      self.require(self.scale > 0, 'scale', 'positive')
      self.require(self.bias_rate > 0, 'bias_rate', 'positive')

    def build(
      self, width: int, experts: int, rngs: nnx.Rngs, position: LayerPosition
    ) -> BiasBalanced:
      return BiasBalanced(self, width, experts, rngs, position)

  def __init__(
    self,
    config: BiasBalanced.Config,
    width: int,
    experts: int,
    rngs: nnx.Rngs,
    position: LayerPosition,
  ):
    super().__init__(config, width, experts, rngs, position)
    self.bias = param(
      jnp.zeros(experts),
      (None,),
      decay=False,
      lr_scale=config.bias_rate,
      full_precision=True,
      matmul=False,
    )

  def __call__(self, x_BTD: Float[Array, 'B T D'], ctx: Context) -> Choice:
    logits, bias = self.logits(x_BTD), self.bias[...]
    score = jax.nn.sigmoid(logits)
    expert = jax.lax.top_k(jax.lax.stop_gradient(score + bias.reshape(1, 1, -1)), self.config.k)[1]
    s = jnp.take_along_axis(score, expert, axis=-1)
    weight = self.config.scale * s / (jnp.sum(s, axis=-1, keepdims=True) + 1e-20) + nudge(
      bias, load_of(expert, self.experts)
    )
    return self.chosen(expert, weight, logits, score / jnp.sum(score, axis=-1, keepdims=True), {})


class ExpertChoice(Router):
  """Experts choose: each takes, of every sequence, the C = ceil(T choices / E) tokens to which the
  softmax gives it most, weighted with their probabilities (Zhou et al. 2022, section 3.1, whose
  groups of tokens are here the sequences). Always balanced.

  Whether a token is taken depends on later ones, and on the other documents of its row, so a layer
  with it does not decode. With `choices` = E every expert takes every token."""

  class Config(RouterConfig):
    """
    Attributes:
      choices: experts a token, on average (the paper's capacity factor).
    """

    choices: float = 2.0

    def validate(self):
      super().validate()
      self.require(self.choices > 0, 'choices', 'positive')
      self.require(self.balance is None, 'balance', 'none: experts that choose are always balanced')

    def build(
      self, width: int, experts: int, rngs: nnx.Rngs, position: LayerPosition
    ) -> ExpertChoice:
      return ExpertChoice(self, width, experts, rngs, position)

    @property
    def causal(self) -> bool:
      return False

    def check(self, experts: int) -> None:
      if self.choices > experts:
        raise InputError(
          f'{self.tag}.choices = {self.choices}: must be at most the number of experts, {experts}'
        )

    def per_token(self, experts: int) -> float:
      return self.choices

  def __call__(self, x_BTD: Float[Array, 'B T D'], ctx: Context) -> Places:
    logits, T = self.logits(x_BTD), x_BTD.shape[1]
    probabilities = jax.nn.softmax(logits, axis=-1)
    weight, token = jax.lax.top_k(
      jnp.swapaxes(probabilities, 1, 2), math.ceil(T * self.config.choices / self.experts)
    )
    return Places(token, weight, logits, probabilities, self._z_loss(logits))
