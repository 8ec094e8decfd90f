"""What XLA would compute while it compiles: a running sum over constants takes minutes there, since
it is evaluated for the rows of all devices, in time quadratic in the length."""

from __future__ import annotations

import jax
import pytest
from jax.extend import core

from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from jaxformer.planning.memory import abstract_batch
from jaxformer.sharding import assume_platform
from jaxformer.training.experiment import TrainingConfig
from jaxformer.training.step import loss_and_grads


def running_sums_of_constants(jaxpr, known):
  """Names of the cumulative operations of a program whose operands depend on none of its inputs.

  Args:
    known: variables that are constant."""
  known, found = known | set(jaxpr.constvars), []

  def constant(v):
    return isinstance(v, core.Literal) or v in known

  for eqn in jaxpr.eqns:
    name, constants = eqn.primitive.name, [constant(v) for v in eqn.invars]
    if name.startswith('cum') and all(constants):
      found.append(name)
    for inner in jax.tree.leaves(
      [p for key, p in eqn.params.items() if key in ('jaxpr', 'call_jaxpr', 'branches')],
      is_leaf=lambda p: isinstance(p, core.ClosedJaxpr | core.Jaxpr),
    ):
      inner = getattr(inner, 'jaxpr', inner)
      if name == 'scan':  # the carry changes, and a round has one row of each input
        n = eqn.params['num_consts']
        given = constants[:n] + [False] * (len(inner.invars) - n)
      elif name == 'pallas_call':
        continue
      else:
        given = constants[len(constants) - len(inner.invars) :]
      inside = {v for v, is_constant in zip(inner.invars, given, strict=True) if is_constant}
      found += running_sums_of_constants(inner, inside)
    if all(constants) and name != 'optimization_barrier':
      known |= set(eqn.outvars)
  return found


def test_the_search_finds_what_would_be_folded():
  def f(x):
    return x + jax.jit(lambda z: jax.lax.cummax(z, axis=1))(jax.numpy.zeros((2, 8)))

  jaxpr = jax.make_jaxpr(f)(jax.numpy.ones((2, 8))).jaxpr
  assert running_sums_of_constants(jaxpr, set()) == ['cummax']
  jaxpr = jax.make_jaxpr(lambda x: jax.lax.cumsum(x, axis=1))(jax.numpy.ones((2, 8))).jaxpr
  assert running_sums_of_constants(jaxpr, set()) == []


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
@pytest.mark.parametrize(
  'name', [n for n in PRESETS if n.endswith('-tiny') and PRESETS[n].model.task.inputs == 'tokens']
)
def test_a_step_without_packed_documents(name, platform):
  definition = define(PRESETS[name].model)
  batch = abstract_batch(definition.config, 2, 128)  # no segments
  params = definition.abstract()
  key = jax.eval_shape(lambda: jax.random.key(0))

  def step(params, batch, key):
    return loss_and_grads(definition, TrainingConfig(dtype='bfloat16'), params, batch, key)

  with assume_platform(platform):
    jaxpr = jax.make_jaxpr(step)(params, batch, key).jaxpr
  assert running_sums_of_constants(jaxpr, set()) == []
