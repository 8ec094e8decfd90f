"""Optimizers: gradients to updates, with a learning rate and weight decay per parameter.

An optimizer is a config whose `direction` is an optax transformation on the flat dictionary of
parameters, for a learning rate of 1. What all share (clipping, schedule, decoupled weight decay,
the parameters' own factors) is in `Optimizer.update`. The state is arrays named after parameters,
so it is sharded as they are."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxformer.config import Config
from jaxformer.models.params import Definition, ParamInfo, Params
from jaxformer.sharding import Parallel
from jaxformer.training.schedule import ScheduleConfig, Step

Learning = float | Float[Array, '']


class OptimizerConfig(Config, abstract=True):
  """Base of the optimizers.

  Attributes:
    learning_rate: at the peak of the schedule.
    weight_decay: decoupled: each step subtracts learning_rate * weight_decay * p from a parameter
      p, except where its metadata say `decay=False`.
    clip: largest global norm of the gradients, which are scaled down to it; None for no clipping.
  """

  learning_rate: float
  weight_decay: float = 0.1
  clip: float | None = 1.0

  def validate(self):
    self.require_positive('learning_rate', 'clip')
    self.require_not_negative('weight_decay')
    averages = ('beta1', 'beta2', 'momentum', 'adam_beta1', 'adam_beta2')
    self.require_rate(*(field for field in averages if hasattr(self, field)))

  def direction(self, info: dict[str, ParamInfo]) -> optax.GradientTransformation:
    """Return the map from gradients to what is subtracted at a learning rate of 1, without weight
    decay."""
    raise NotImplementedError

  def peak(self, info: ParamInfo, learning_rate: Learning) -> Learning:
    """Return the peak learning rate of one parameter, before its `lr_scale`, where that of the run
    is `learning_rate`."""
    return learning_rate


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
  algorithm 2). The paper uses a learning rate 3 to 10 times below AdamW's and a weight decay larger
  by the same factor."""

  learning_rate: float = 1e-4
  weight_decay: float = 1.0
  beta1: float = 0.9
  beta2: float = 0.99

  def direction(self, info):
    return optax.scale_by_lion(self.beta1, self.beta2)


class Muon(OptimizerConfig):
  """Momentum, orthogonalized (Jordan et al. 2024): update = scale * orthogonal(b m' + (1 - b) g')
  for the weight matrices of the blocks, of each layer and each expert on its own; AdamW with
  `adam_*` for embeddings, heads, vectors, and the parameters of recurrences.

  As in `optax.contrib.scale_by_muon`, m = b m + (1 - b) g, m' and g' are corrected for bias as in
  Adam, and `orthogonal` is `steps` Newton-Schulz iterations, which leave all singular values near
  1.

  Attributes:
    momentum: b.
    steps: Newton-Schulz iterations.
    scale: 'adam' is 0.2 sqrt(max(d_in, d_out)), which makes updates as large as AdamW's, so that
      one learning rate serves both (Liu et al. 2025, section 2.2); 'shape' is sqrt(max(1, d_out /
      d_in)) (Jordan).
    adam_learning_rate: None for `learning_rate`.
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
    self.require_positive('steps', 'adam_learning_rate')

  def orthogonalized(self, info: ParamInfo) -> bool:
    """Return whether a parameter is a weight matrix inside the blocks: two axes apart from the
    stacked ones, none of them the rows of a table, a kernel of a convolution or the state of a
    recurrence."""
    axes = info.matrix_axes
    return (
      len(axes) == 2
      and info.matmul
      and info.decay
      and not {'vocab', 'positions', 'state', 'norm', 'head_dim'} & set(axes)
    )

  def peak(self, info, learning_rate):
    if self.adam_learning_rate is None or self.orthogonalized(info):
      return learning_rate
    return self.adam_learning_rate

  def direction(self, info):
    def of(i: ParamInfo) -> optax.GradientTransformation:
      if not self.orthogonalized(i):
        return optax.scale_by_adam(self.adam_beta1, self.adam_beta2, self.adam_eps)
      d_in, d_out = i.shape[-2:]
      adam, shape = 0.2 * max(d_in, d_out) ** 0.5, max(1.0, d_out / d_in) ** 0.5
      return optax.chain(
        optax.contrib.scale_by_muon(ns_steps=self.steps, beta=self.momentum),
        optax.scale(adam if self.scale == 'adam' else shape),
      )

    return per_matrix(info, of)


class Adafactor(OptimizerConfig):
  """V = R C^T / mean(R), with R and C moving averages of the row and column means of g^2 + 1e-30,
  and b2 = 1 - t^-decay; u = g / sqrt(V);  update = u / max(1, rms(u) / threshold) + weight_decay p
  (Shazeer and Stern 2018, algorithm 4, without relative step sizes and first moment), by
  `optax.scale_by_factored_rms`, for each layer and each expert on its own.

  Attributes:
    decay: the exponent.
    threshold: the paper's d.
    factored_from: a matrix is factored if both its dimensions are at least this; other parameters
      keep the full second moment.
  """

  learning_rate: float = 1e-3
  decay: float = 0.8
  threshold: float = 1.0
  factored_from: int = 128

  def validate(self):
    super().validate()
    self.require_positive('decay', 'threshold')

  def direction(self, info):
    one = optax.chain(
      optax.scale_by_factored_rms(decay_rate=self.decay, min_dim_size_to_factor=self.factored_from),
      optax.clip_by_block_rms(self.threshold),
    )
    return per_matrix(info, lambda i: one)


class SGD(OptimizerConfig):
  """u = g + momentum u;  update = u + weight_decay p (`optax.trace`)."""

  learning_rate: float = 0.1
  weight_decay: float = 0.0
  momentum: float = 0.0

  def direction(self, info):
    return optax.trace(self.momentum) if self.momentum else optax.identity()


class Adadelta(OptimizerConfig):
  """G = rho G + (1 - rho) g^2;  u = sqrt(U + eps) / sqrt(G + eps) g;  U = rho U + (1 - rho) u^2;
  update = u + weight_decay p (Zeiler 2012, algorithm 1), by `optax.scale_by_adadelta`. The paper
  has a learning rate of 1."""

  learning_rate: float = 1.0
  weight_decay: float = 0.0
  rho: float = 0.95
  eps: float = 1e-6

  def validate(self):
    super().validate()
    self.require_rate('rho')
    self.require_positive('eps')

  def direction(self, info):
    return optax.scale_by_adadelta(self.rho, self.eps)


class AdamThenSGD(OptimizerConfig):
  """Adam for the first `adam_steps` updates, then plain SGD (Wu et al. 2016, section 8.3).

  Attributes:
    learning_rate: of SGD, and what a run records.
    adam_learning_rate: of the updates by Adam, under the same schedule.
    beta1, beta2, eps: of Adam; see `AdamW`.
  """

  learning_rate: float = 0.5
  weight_decay: float = 0.0
  adam_steps: int
  adam_learning_rate: float = 2e-4
  beta1: float = 0.9
  beta2: float = 0.999
  eps: float = 1e-8

  def validate(self):
    super().validate()
    self.require_positive('adam_steps', 'adam_learning_rate', 'eps')

  def direction(self, info):
    adam: Any = optax.scale_by_adam(self.beta1, self.beta2, self.eps)
    scale = self.adam_learning_rate / self.learning_rate

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
      directions, state = adam.update(updates, state, params)
      by_adam = state.count <= self.adam_steps
      return jax.tree.map(lambda d, g: jnp.where(by_adam, scale * d, g), directions, updates), state

    return optax.GradientTransformation(adam.init, update)


def per_matrix(
  info: dict[str, ParamInfo], of: Callable[[ParamInfo], optax.GradientTransformation]
) -> optax.GradientTransformation:
  """Transform each parameter by `of(info)` on its own, and of stacked ones every layer and expert,
  so that stacking changes no update (optax's own transformations take the stack for one array)."""

  def apply(method: Literal['init', 'update'], name: str, *arguments: Any) -> Any:
    f = getattr(of(info[name]), method)
    for _ in range(len(info[name].shape) - len(info[name].matrix_axes)):
      f = jax.vmap(f)
    return f(*arguments)

  def init(params: Any) -> dict[str, Any]:
    return {name: apply('init', name, p) for name, p in params.items()}

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    both = {n: apply('update', n, u, state[n], params[n]) for n, u in updates.items()}
    return {n: u for n, (u, _) in both.items()}, {n: s for n, (_, s) in both.items()}

  return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """An optimizer for the parameters of one model, over one run.

  Attributes:
    config, schedule: settings.
    steps: number of steps of the run, which the schedule depends on.
    info: the parameters.
    peak: learning rate that replaces the config's, where one program trains several runs
      (`step.population_step`).
  """

  config: OptimizerConfig
  schedule: ScheduleConfig
  steps: int
  info: dict[str, ParamInfo]
  peak: Float[Array, ''] | None = None

  def init(self, params: Params) -> Any:
    """Return the state before the first update."""
    return self.config.direction(self.info).init(params)

  @jax.named_scope('Optimizer')
  def update(
    self, grads: Params, state: Any, params: Params, step: Step
  ) -> tuple[Params, Any, dict[str, Array]]:
    """Return p - learning_rate * lr_scale * (direction + weight_decay p) for every parameter p, the
    new state, and `grad_norm` (before clipping) and `learning_rate` at this step, counted from 0.

    A parameter with a `learning_rate` of its own has that one, under the same schedule; one with an
    `lr_scale` of 0 is not trained and has no part in the norm."""
    c, factor = self.config, self.schedule.factor(step, self.steps)
    peak = c.learning_rate if self.peak is None else self.peak
    grads = {n: g if self.info[n].lr_scale else jnp.zeros_like(g) for n, g in grads.items()}
    norm = optax.tree.norm(grads)
    if c.clip is not None:
      shrink = jnp.minimum(1.0, c.clip / (norm + 1e-6))
      grads = {name: g * shrink for name, g in grads.items()}
    transformation: Any = c.direction(self.info)
    direction, state = transformation.update(grads, state, params)

    def new(name: str, p: Array) -> Array:
      i = self.info[name]
      decay = c.weight_decay if i.decay else 0.0
      rate = c.peak(i, peak) if i.learning_rate is None else i.learning_rate
      return p - rate * factor * i.lr_scale * (
        direction[name] + decay * p if decay else direction[name]
      )

    return (
      {name: new(name, p) for name, p in params.items()},
      state,
      {'grad_norm': norm, 'learning_rate': peak * factor},
    )

  def abstract_state(self, definition: Definition, parallel: Parallel) -> Any:
    """Return the shapes, dtypes and shardings of the state: an array that belongs to a parameter is
    sharded as the parameter is, along the axes that both have."""
    where = definition.shardings(parallel)

    def placed(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
      name = next((n for k in reversed(path) if (n := getattr(k, 'key', None)) in where), None)
      shape, sharding = () if name is None else self.info[name].shape, where.get(name)
      if sharding is None:
        sharding = parallel.replicated
      elif leaf.shape != shape:
        axes = itertools.zip_longest(shape, sharding.spec)
        common = (next((a for size, a in axes if size == n), None) for n in leaf.shape)
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*common))
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(
      placed, jax.eval_shape(self.init, definition.abstract())
    )
