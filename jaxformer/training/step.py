"""One training step as a pure function of a state and a batch: of one run, or of several runs on a
leading member axis; compiled for arrays, or lowered from shapes alone."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from jaxformer import hardware
from jaxformer.config import InputError
from jaxformer.layers.layer import Context
from jaxformer.models.params import Definition, Params, define, options_for_one_call
from jaxformer.ops.loss import LossSums
from jaxformer.sharding import Parallel, use_mesh
from jaxformer.task_type import IGNORE, Batch
from jaxformer.training.batch_placement import abstract_batch
from jaxformer.training.experiment import Experiment, TrainingConfig, check_fit
from jaxformer.training.optimizer import Optimizer, OptimizerConfig
from jaxformer.training.schedule import Constant

Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a training run carries from one step to the next.

  Attributes:
    step: number of completed updates.
    params: fp32, by name.
    opt_state: state of the optimizer.
    key: random key of the run; a step uses `fold_in(key, step)`.
  """

  step: Array
  params: Params
  opt_state: Any
  key: Array


def compute_dtype(name: str, parallel: Parallel) -> Any:
  """Return the dtype of activations; 'auto' is bfloat16 on hardware that supports it, float32 on
  CPU."""
  if name == 'auto':
    name = 'float32' if parallel.platform == 'cpu' else 'bfloat16'
  return jnp.dtype(name)


def step_config(experiment: Experiment, parallel: Parallel) -> TrainingConfig:
  """Return the training settings of an experiment on a mesh: with its dtype in place of 'auto', and
  all options of the compiler. Raises `InputError` for options that it does not take."""
  t, kind = experiment.training, parallel.mesh.devices.flat[0].device_kind
  options = hardware.compiler_options(kind, t.compiler_options)
  if options != hardware.compiler_options(kind):  # those of the table are known to be right
    _check_options(t.compiler_options, options, parallel)
  return t.replace(
    dtype=compute_dtype(t.dtype, parallel).name,
    compiler_options=tuple(f'{name}={value}' for name, value in options.items()),
  )


def _check_options(given: tuple[str, ...], options: dict[str, str], parallel: Parallel) -> None:
  """Compile next to nothing with these options, so that wrong ones are refused before a run."""
  nothing = jax.jit(lambda: 0, out_shardings=parallel.replicated, compiler_options=options)
  try:
    nothing.trace().lower(lowering_platforms=(parallel.platform,)).compile()
  except jax.errors.JaxRuntimeError as e:
    problem = str(e).splitlines()[0].removeprefix('INVALID_ARGUMENT: ')
    raise InputError('training.compiler_options', ' '.join(given), problem=problem) from e


def init_state(
  definition: Definition, optimizer: Optimizer, seed: int, parallel: Parallel
) -> TrainState:
  """Return the state before the first step, created sharded; equal on all meshes."""
  params = definition.init(jax.random.key(seed), parallel)
  return first_state(definition, optimizer, params, seed, parallel)


def first_state(
  definition: Definition, optimizer: Optimizer, params: Params, seed: int, parallel: Parallel
) -> TrainState:
  """Return the state before the first step of a run that begins with `params`."""
  rest = _rest_of_state(definition, optimizer.config, parallel)
  step, opt_state, key = rest(params, np.uint32(seed))
  return TrainState(step, params, opt_state, key)


@functools.lru_cache(maxsize=64)
def _rest_of_state(
  definition: Definition, config: OptimizerConfig, parallel: Parallel
) -> Callable[[Params, np.uint32], tuple[Array, Any, Array]]:
  """Compiled once for all seeds."""
  optimizer = Optimizer(config, Constant(), 1, definition.info)
  where = state_shardings(definition, optimizer, parallel)

  def rest(params: Params, seed: Array) -> tuple[Array, Any, Array]:
    # A random stream separate from that of parameter initialization.
    key = jax.random.fold_in(jax.random.key(seed), 1)
    return jnp.int32(0), optimizer.init(params), key

  return jax.jit(
    rest,
    out_shardings=(where.step, where.opt_state, where.key),
    compiler_options=options_for_one_call(parallel.mesh.devices.flat[0]),
  )


def abstract_train_state(
  definition: Definition, optimizer: Optimizer, parallel: Parallel
) -> TrainState:
  """Return the shapes, dtypes and shardings of a training state."""
  scalar = functools.partial(jax.ShapeDtypeStruct, (), sharding=parallel.replicated)
  key = jax.eval_shape(lambda: jax.random.key(0))
  abstract: Any = definition.abstract(parallel)  # stands where a state has arrays
  return TrainState(
    scalar(jnp.int32), abstract, optimizer.abstract_state(definition, parallel), scalar(key.dtype)
  )


def state_shardings(definition: Definition, optimizer: Optimizer, parallel: Parallel) -> TrainState:
  """Return the sharding of each array of the state."""
  abstract = abstract_train_state(definition, optimizer, parallel)
  return jax.tree.map(lambda a: a.sharding, abstract)


def microbatches(batch: Batch, n: int) -> Batch:
  """Split a batch into n on a leading axis. Microbatch i has the rows i, n + i, ..., so that rows
  of a sharded batch stay on their devices."""
  return jax.tree.map(
    lambda x: jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1), batch
  )


def loss_and_grads(
  definition: Definition, config: TrainingConfig, params: Params, batch: Batch, key: Array
) -> tuple[LossSums, Metrics, Params]:
  """Return the sums of the loss over a batch, auxiliary scalars, and the gradient of the objective:
  loss / count + sum of `loss/...`.

  Accumulated microbatches have the gradient of the full batch, however the counted targets are
  distributed: each is divided by the count of the full batch. (An auxiliary loss that is not a mean
  over tokens becomes the mean over microbatches.)"""
  n = config.accumulate
  count = jnp.maximum(jnp.sum(batch.targets_BT != IGNORE).astype(jnp.float32), 1.0)

  def objective(params: Params, batch: Batch, key: Array) -> tuple[Array, tuple[LossSums, Metrics]]:
    model = definition.merge(definition.cast(params, jnp.dtype(config.dtype)))
    sums, aux = model.loss(
      batch,
      Context(dropout_key=key, remat=config.remat),
      z_loss=config.z_loss,
      max_logit_loss=config.max_logit_loss,
      label_smoothing=config.label_smoothing,
    )
    extra = sum((v for name, v in aux.items() if name.startswith('loss/')), jnp.zeros(()))
    return sums.loss / count + extra / n, (sums, aux)

  grad = jax.grad(objective, has_aux=True)
  if n == 1:
    grads, (sums, aux) = grad(params, batch, key)
    return sums, aux, grads

  def add(total: Any, micro: Any) -> tuple[Any, None]:
    i, batch = micro
    grads, (sums, aux) = grad(params, batch, jax.random.fold_in(key, i))
    return jax.tree.map(jnp.add, total, (sums, aux, grads)), None

  split = microbatches(batch, n)
  zero = jax.tree.map(
    lambda s: jnp.zeros(s.shape, s.dtype),
    jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], split), key),
  )
  zero = (zero[1][0], zero[1][1], zero[0])
  (sums, aux, grads), _ = jax.lax.scan(add, zero, (jnp.arange(n), split))
  return sums, {name: v / n for name, v in aux.items()}, grads


def over_layers(aux: Metrics) -> Metrics:
  """Reduce diagnostics of several layers to three numbers each: `name` is the mean, `name_min` and
  `name_max` the extremes, which show one collapsing router or growing logit at any depth."""
  many = {name: v for name, v in aux.items() if v.size > 1}
  ends = {f'{name}_min': jnp.min(v) for name, v in many.items()} | {
    f'{name}_max': jnp.max(v) for name, v in many.items()
  }
  return {name: jnp.mean(v) for name, v in aux.items()} | ends


def train_step(
  definition: Definition,
  optimizer: Optimizer,
  config: TrainingConfig,
  state: TrainState,
  batch: Batch,
) -> tuple[TrainState, Metrics]:
  """Return the state after one update, and its metrics: `train/loss` (cross-entropy per target,
  nats), `train/grad_norm`, `learning_rate`, `finite`, and the layers' auxiliary values as
  `train/...` (`over_layers`)."""
  key = jax.random.fold_in(state.key, state.step)
  sums, aux, grads = loss_and_grads(definition, config, state.params, batch, key)
  params, opt_state, did = optimizer.update(grads, state.opt_state, state.params, state.step)
  loss = sums.nll / jnp.maximum(sums.count, 1.0)
  metrics = {
    'train/loss': loss,
    'train/grad_norm': did['grad_norm'],
    'learning_rate': did['learning_rate'],
  }
  metrics |= {f'train/{name}': v for name, v in over_layers(aux).items()}
  metrics['finite'] = jnp.isfinite(sums.loss) & jnp.isfinite(did['grad_norm'])
  return TrainState(state.step + 1, params, opt_state, state.key), metrics


def compiled_train_step(
  definition: Definition, optimizer: Optimizer, config: TrainingConfig, parallel: Parallel
) -> jax.stages.Wrapped:
  """Return the jitted `train_step`, `(state, batch) -> (state, metrics)`, for a mesh; the state is
  donated. Call it inside `use_mesh`."""
  where = state_shardings(definition, optimizer, parallel)

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    return train_step(definition, optimizer, config, state, batch)

  return jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(where, parallel.batch),
    out_shardings=(where, parallel.replicated),
    compiler_options=_compiler_options(config),
  )


def _compiler_options(config: TrainingConfig) -> dict[str, str] | None:
  """The options of `step_config` as JAX takes them."""
  return dict(o.split('=', 1) for o in config.compiler_options) or None


def population_step(
  definition: Definition, optimizer: Optimizer, config: TrainingConfig, mesh: Mesh
) -> jax.stages.Wrapped:
  """Return the jitted `train_step` of several runs, `(states, batches, peak_learning_rates, active)
  -> (states, metrics)`, all with a leading member axis sharded over `mesh`'s axis `members`.

  A member that is not `active` is left unchanged. The states are donated."""

  def one(state: TrainState, batch: Any, rate: Array, active: Array) -> tuple[TrainState, Any]:
    after, metrics = train_step(
      definition, dataclasses.replace(optimizer, peak=rate), config, state, batch
    )
    kept = {
      name: jax.tree.map(
        lambda new, old: jnp.where(active, new, old), getattr(after, name), getattr(state, name)
      )
      for name in ('step', 'params', 'opt_state')
    }
    return TrainState(**kept, key=state.key), metrics

  spec = PartitionSpec('members')
  every = jax.shard_map(jax.vmap(one), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  return jax.jit(every, donate_argnums=0, compiler_options=_compiler_options(config))


def lowered_train_step(experiment: Experiment, mesh: Mesh) -> jax.stages.Lowered:
  """Lower the training step of an experiment for the devices of a mesh, from shapes alone. The
  devices may be those of a described machine (`planning.topology_mesh`).

  Raises `InputError` if data and model, or a mesh axis and a dimension, do not fit."""
  e, parallel = experiment, Parallel(mesh, experiment.mesh.rules)
  check_fit(e.model, e.data)
  definition = define(e.model)
  optimizer = Optimizer(e.optimizer, e.schedule, e.training.steps, definition.info)
  state = abstract_train_state(definition, optimizer, parallel)
  abstract_batch(e.data, e.training.batch_size // e.training.accumulate, parallel)
  batch = abstract_batch(e.data, e.training.batch_size, parallel)
  with use_mesh(parallel):
    step = compiled_train_step(definition, optimizer, step_config(e, parallel), parallel)
    return step.trace(state, batch).lower(lowering_platforms=(mesh.devices.flat[0].platform,))
