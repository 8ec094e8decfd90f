"""Optimizers: what turns gradients into updates, with each parameter's own learning rate and weight
decay.

An optimizer is a config whose `direction` is an optax transformation on the flat dictionary of
parameters: it says where to go, for a learning rate of 1. What all have in common (clipping,
schedule, decoupled weight decay, the parameters' own factors) stands once, in `Optimizer.update`.
Its state is arrays named after parameters, so that it is divided over a mesh as they are."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxformer.config import Config
from jaxformer.models.params import Definition, ParamInfo, Params
from jaxformer.sharding import replicated
from jaxformer.training.schedule import ScheduleConfig, Step


class OptimizerConfig(Config, abstract=True):
  """Base of the optimizers.

  Attributes:
    learning_rate: at the peak of the schedule.
    weight_decay: decoupled: a parameter loses learning_rate * weight_decay of itself at each step,
      those whose metadata say `decay=False` excepted.
    clip: the gradients are scaled down to this global norm; None for never.
  """

  learning_rate: float
  weight_decay: float = 0.1
  clip: float | None = 1.0

  def validate(self):
    self.require(self.learning_rate > 0, 'learning_rate', 'positive')
    self.require(self.weight_decay >= 0, 'weight_decay', 'at least 0')
    self.require(self.clip is None or self.clip > 0, 'clip', 'positive, or none')
    for field in ('beta1', 'beta2', 'momentum', 'adam_beta1', 'adam_beta2'):
      if hasattr(self, field):
        self.require(0 <= getattr(self, field) < 1, field, 'at least 0 and below 1')

  def direction(self, info: dict[str, ParamInfo]) -> optax.GradientTransformation:
    """Gradients to updates for a learning rate of 1, without weight decay, to be subtracted."""
    raise NotImplementedError

  def rate(self, info: ParamInfo) -> float:
    """The factor on the learning rate of one parameter."""
    return info.lr_scale


class AdamW(OptimizerConfig):
  """m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  update = m' / (sqrt(v') + eps) + weight_decay
  p, where m' = m / (1 - b1^t) and v' = v / (1 - b2^t) (Kingma and Ba 2015; Loshchilov and Hutter
  2019)."""

  learning_rate: float = 1e-3
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8

  def direction(self, info):
    return optax.scale_by_adam(self.beta1, self.beta2, self.eps)


class Lion(OptimizerConfig):
  """update = sign(b1 m + (1 - b1) g) + weight_decay p;  m = b2 m + (1 - b2) g (Chen et al. 2023,
  algorithm 2). The paper takes a learning rate three to ten times below AdamW's and a weight decay
  as much above."""

  learning_rate: float = 1e-4
  weight_decay: float = 1.0
  beta1: float = 0.9
  beta2: float = 0.99

  def direction(self, info):
    return optax.scale_by_lion(self.beta1, self.beta2)


class Muon(OptimizerConfig):
  """Momentum, orthogonalised: m = b m + g;  update = scale * orthogonal(g + b m) (Jordan et al.
  2024), for the weight matrices of the blocks; AdamW with `adam_*` for embeddings, heads, vectors,
  and the parameters of recurrences.

  `orthogonal` is `steps` rounds of Newton-Schulz (see there), for each layer and each expert by
  itself.

  Attributes:
    momentum: b.
    steps: rounds of Newton-Schulz.
    scale: 'adam' is 0.2 sqrt(max(d_in, d_out)), which makes updates as large as AdamW's, so that
      one learning rate serves both (Liu et al. 2025, section 2.2); 'shape' is sqrt(max(1, d_out /
      d_in)) (Jordan).
    adam_learning_rate: None for the same.
  """

  learning_rate: float = 1e-3
  momentum: float = 0.95
  steps: int = 5
  scale: Literal['adam', 'shape'] = 'adam'
  adam_learning_rate: float | None = None
  adam_beta1: float = 0.9
  adam_beta2: float = 0.95
  adam_eps: float = 1e-8

  def validate(self):
    super().validate()
    self.require(self.steps > 0, 'steps', 'positive')
    self.require(
      self.adam_learning_rate is None or self.adam_learning_rate > 0,
      'adam_learning_rate',
      'positive, or none',
    )

  def orthogonalised(self, info: ParamInfo) -> bool:
    """Whether a parameter is a weight matrix inside the blocks: two axes beside the stacked ones,
    neither of them a table's rows, the taps of a convolution nor a recurrence's state."""
    axes = info.matrix_axes
    return (
      len(axes) == 2
      and info.matmul
      and info.decay
      and not {'vocab', 'positions', 'state', 'norm', 'head_dim'} & set(axes)
    )

  def rate(self, info):
    same = self.adam_learning_rate is None or self.orthogonalised(info)
    return info.lr_scale * (1.0 if same else self.adam_learning_rate / self.learning_rate)

  def direction(self, info):
    matrices = [name for name, i in info.items() if self.orthogonalised(i)]
    momentum: Any = optax.trace(self.momentum, nesterov=True)
    adam: Any = optax.scale_by_adam(self.adam_beta1, self.adam_beta2, self.adam_eps)

    def parts(tree: Params) -> tuple[Params, Params]:
      return {n: tree[n] for n in matrices}, {n: p for n, p in tree.items() if n not in matrices}

    def init(params):
      muon, others = parts(params)
      return {'muon': momentum.init(muon), 'adam': adam.init(others)}

    def update(updates, state, params=None):
      muon, others = parts(updates)
      muon, muon_state = momentum.update(muon, state['muon'])
      others, adam_state = adam.update(others, state['adam'])
      muon = {name: self._scale(g.shape) * newton_schulz(g, self.steps) for name, g in muon.items()}
      return {name: (muon if name in muon else others)[name] for name in updates}, {
        'muon': muon_state,
        'adam': adam_state,
      }

    return optax.GradientTransformation(init, update)

  def _scale(self, shape: tuple[int, ...]) -> float:
    d_in, d_out = shape[-2:]
    return 0.2 * max(d_in, d_out) ** 0.5 if self.scale == 'adam' else max(1.0, d_out / d_in) ** 0.5


def newton_schulz(g: Float[Array, '*L M N'], steps: int) -> Float[Array, '*L M N']:
  """Nearly U V^T of every matrix g = U S V^T: X <- a X + (b A + c A^2) X with A = X X^T, from X = g
  / |g|, where (a, b, c) = (3.4445, -4.7750, 2.0315) make small singular values grow fastest and
  leave all in about 0.7 .. 1.2 (Jordan et al. 2024)."""
  wide = g.shape[-2] <= g.shape[-1]
  x = g if wide else jnp.swapaxes(g, -1, -2)  # the smaller Gram matrix
  x = x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=(-1, -2), keepdims=True)) + 1e-7)
  for _ in range(steps):
    gram = x @ jnp.swapaxes(x, -1, -2)
    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
  return x if wide else jnp.swapaxes(x, -1, -2)


class AdafactorState(NamedTuple):
  """Second moments: of large matrices their means over the last axis (`row`) and the one before
  (`col`), of others all (`full`)."""

  count: Array
  row: Params
  col: Params
  full: Params


class Adafactor(OptimizerConfig):
  """V = R C^T / mean(R), with R and C moving averages of the row and column means of g^2 + 1e-30,
  and b2 = 1 - t^-decay; u = g / sqrt(V);  update = u / max(1, rms(u) / threshold) + weight_decay p
  (Shazeer and Stern 2018, algorithm 4, without relative step sizes and first moment), for each
  layer and each expert by itself.

  Attributes:
    decay: the exponent.
    threshold: the paper's d.
    factored_from: matrices with both sides at least so large are factored; of others the whole
      second moment is kept.
  """

  learning_rate: float = 1e-3
  decay: float = 0.8
  threshold: float = 1.0
  factored_from: int = 128

  def validate(self):
    super().validate()
    self.require(self.decay > 0, 'decay', 'positive')
    self.require(self.threshold > 0, 'threshold', 'positive')

  def direction(self, info):
    def factored(name: str) -> bool:
      return len(info[name].matrix_axes) == 2 and min(info[name].shape[-2:]) >= self.factored_from

    def init(params):
      large = {n: p for n, p in params.items() if factored(n)}
      return AdafactorState(
        jnp.zeros((), jnp.int32),
        {n: jnp.zeros_like(p[..., 0]) for n, p in large.items()},
        {n: jnp.zeros_like(p[..., 0, :]) for n, p in large.items()},
        {n: jnp.zeros_like(p) for n, p in params.items() if n not in large},
      )

    def update(updates, state, params=None):
      count = state.count + 1
      beta = 1.0 - count.astype(jnp.float32) ** -self.decay
      row, col, full, out = {}, {}, {}, {}
      for name, g in updates.items():
        square = jnp.square(g) + 1e-30
        if factored(name):
          row[name] = beta * state.row[name] + (1 - beta) * square.mean(-1)
          col[name] = beta * state.col[name] + (1 - beta) * square.mean(-2)
          r = row[name] / row[name].mean(-1, keepdims=True)
          u = g * jax.lax.rsqrt(r)[..., None] * jax.lax.rsqrt(col[name])[..., None, :]
        else:
          full[name] = beta * state.full[name] + (1 - beta) * square
          u = g * jax.lax.rsqrt(full[name])
        # One parameter is what is not stacked: its axes are the last.
        axes = tuple(range(-len(info[name].matrix_axes), 0))
        rms = jnp.sqrt(jnp.mean(jnp.square(u), axis=axes, keepdims=True))
        out[name] = u / jnp.maximum(1.0, rms / self.threshold)
      return out, AdafactorState(count, row, col, full)

    return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """An optimizer for the parameters of one model, over one training.

  Attributes:
    config, schedule: what it does.
    steps: of the training, which the schedule needs.
    info: the parameters.
    peak: a learning rate in place of the config's, where one program trains several
      (`training.population`).
  """

  config: OptimizerConfig
  schedule: ScheduleConfig
  steps: int
  info: dict[str, ParamInfo]
  peak: Float[Array, ''] | None = None

  @classmethod
  def of(
    cls, config: OptimizerConfig, schedule: ScheduleConfig, steps: int, definition: Definition
  ) -> Optimizer:
    return cls(config, schedule, steps, definition.info)

  def init(self, params: Params) -> Any:
    """The state before the first update."""
    return self.config.direction(self.info).init(params)

  def learning_rate(self, step: Step) -> Float[Array, '']:
    """At a step, counted from 0."""
    peak = self.config.learning_rate if self.peak is None else self.peak
    return peak * self.schedule.factor(step, self.steps)

  def update(
    self, grads: Params, state: Any, params: Params, step: Step
  ) -> tuple[Params, Any, dict[str, Array]]:
    """p - learning_rate * lr_scale * (direction + weight_decay p); the new parameters and state,
    and `grad_norm` (before clipping) and `learning_rate`."""
    c, rate = self.config, self.learning_rate(step)
    norm = optax.tree.norm(grads)
    if c.clip is not None:
      factor = jnp.minimum(1.0, c.clip / (norm + 1e-6))
      grads = {name: g * factor for name, g in grads.items()}
    transformation: Any = c.direction(self.info)
    direction, state = transformation.update(grads, state, params)

    def new(name: str, p: Array) -> Array:
      decay = c.weight_decay if self.info[name].decay else 0.0
      return p - rate * c.rate(self.info[name]) * (
        direction[name] + decay * p if decay else direction[name]
      )

    return (
      {name: new(name, p) for name, p in params.items()},
      state,
      {'grad_norm': norm, 'learning_rate': rate},
    )

  def shardings(self, mesh: Mesh, params: dict[str, NamedSharding]) -> Any:
    """Where the state lives: what belongs to a parameter is divided as the parameter is, on the
    axes that both have."""
    abstract = jax.eval_shape(
      self.init, {n: jax.ShapeDtypeStruct(i.shape, i.dtype) for n, i in self.info.items()}
    )

    def where(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
      name = next(
        (k.key for k in reversed(path) if isinstance(k, jax.tree_util.DictKey) and k.key in params),
        None,
      )
      if name is None:
        return replicated(mesh)
      spec, missing = params[name].spec, len(self.info[name].shape) - leaf.ndim
      if missing == 0:
        return NamedSharding(mesh, spec)
      last = spec[-2] if any(getattr(k, 'name', None) == 'row' for k in path) else spec[-1]
      return NamedSharding(mesh, PartitionSpec(*spec[:-2], last))

    return jax.tree_util.tree_map_with_path(where, abstract)
