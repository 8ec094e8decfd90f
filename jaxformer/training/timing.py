"""Timing of the compiled training step on one batch."""

import time
from collections.abc import Callable

import jax

from jaxformer.models.params import Params
from jaxformer.sharding import use_mesh
from jaxformer.task_type import Batch
from jaxformer.training.experiment import Experiment
from jaxformer.training.optimizer import Optimizer
from jaxformer.training.setup import check
from jaxformer.training.step import compiled_train_step, first_state, init_state, step_config


def timed_step(
  experiment: Experiment, batch: Batch, params: Params | None = None
) -> tuple[Callable[[], float], float, jax.stages.Compiled]:
  """Compile the training step of an experiment for a batch. Return a function that runs it once and
  returns its seconds, the seconds that compilation took, and the program. The first step begins
  with `params`, by default the initial ones. Raises `InputError` for parts that do not fit."""
  e, t = experiment, experiment.training
  definition, parallel = check(e)
  optimizer = Optimizer(e.optimizer, e.schedule, t.steps, definition.info)
  with use_mesh(parallel):
    placed = jax.device_put(batch, parallel.batch)
    if params is None:
      state = init_state(definition, optimizer, t.seed, parallel)
    else:
      state = first_state(definition, optimizer, params, t.seed, parallel)
    step = compiled_train_step(definition, optimizer, step_config(e, parallel), parallel)
    began = time.perf_counter()
    program = step.lower(state, placed).compile()
    compile_seconds = time.perf_counter() - began

  def run() -> float:
    nonlocal state
    with use_mesh(parallel):
      began = time.perf_counter()
      state, metrics = program(state, placed)
      jax.block_until_ready(metrics)
      return time.perf_counter() - began

  return run, compile_seconds, program
