"""Residuals: the arrays that a forward pass keeps for its backward pass, found by tracing, without
a formula for any layer and without any array.

`jax.vjp` of a model's loss is traced with abstract shapes, under a remat policy, for the part of a
batch that one device has. The arrays that its backward function closes over are the residuals.
Tracing knows no mesh, so two properties are propagated from the inputs through every operation of
the program: whether an array depends on the batch, and how the mesh axes that shard the weights
where they are used (`tensor`) shard it. An operation without a rule of its own takes the sharding
of the argument dimensions that its result has (`_elementwise`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal


class SavedResidual(NamedTuple):
  """One array that is kept.

  Attributes:
    shape, dtype: of the array on all devices.
    shards: the number of shards of each dimension.
    activation: whether it depends on the batch, not on parameters alone.
    iterations: of the loop that stacked it along its first dimension; 1 outside loops.
  """

  shape: tuple[int, ...]
  dtype: Any
  shards: tuple[int, ...]
  activation: bool
  iterations: int = 1

  @property
  def bytes(self) -> int:
    """Bytes per device."""
    return (
      math.prod(-(-n // p) for n, p in zip(self.shape, self.shards, strict=True))
      * self.dtype.itemsize
    )


class _Value(NamedTuple):
  """What is propagated for each variable of a program; fields as in `SavedResidual`."""

  shards: tuple[int, ...]
  activation: bool
  iterations: int = 1


def residuals(
  backward: Any,
  params: Mapping[str, jax.ShapeDtypeStruct],
  shards: Mapping[str, Sequence[int]],
  batch: Any,
) -> list[SavedResidual]:
  """The arrays that `backward(params, batch)`, a function that returns the backward function of
  `jax.vjp`, closes over, without the parameters.

  Args:
    shards: the number of shards of each dimension of each parameter where it is used (1 for one
      that is all-gathered).
  """
  closed = jax.make_jaxpr(backward)(params, batch)
  leaves = jax.tree.leaves((dict(params), batch))
  # `make_jaxpr` flattens a dictionary by sorted keys; the batch's arrays follow.
  inputs = [_Value(tuple(shards[name]), False) for name in sorted(params)]
  inputs += [_Value((1,) * leaf.ndim, True) for leaf in leaves[len(inputs) :]]
  outputs = _propagate(closed.jaxpr, inputs)
  arguments = set(map(id, closed.jaxpr.invars))
  found = {
    id(var): SavedResidual(tuple(var.aval.shape), var.aval.dtype, *value)
    for var, value in zip(closed.jaxpr.outvars, outputs, strict=True)
    if id(var) not in arguments and not isinstance(var, Literal)
  }
  return list(found.values())


def _propagate(jaxpr: Any, inputs: Sequence[_Value]) -> list[_Value]:
  """The properties of a program's results, from those of its arguments."""
  known: dict[int, _Value] = {id(v): i for v, i in zip(jaxpr.invars, inputs, strict=True)}

  def value(var: Any) -> _Value:
    return known.get(id(var)) or _Value((1,) * len(getattr(var.aval, 'shape', ())), False)

  for eqn in jaxpr.eqns:
    arguments = [value(v) for v in eqn.invars]
    for var, result in zip(eqn.outvars, _results(eqn, arguments), strict=True):
      known[id(var)] = result
  return [value(v) for v in jaxpr.outvars]


def _results(eqn: Any, arguments: list[_Value]) -> list[_Value]:
  name, params = eqn.primitive.name, eqn.params
  inner = next((params[k] for k in ('jaxpr', 'call_jaxpr', 'fun_jaxpr') if k in params), None)
  if name == 'scan':
    return _scan(eqn, arguments)
  if inner is not None and name not in ('while', 'pallas_call', 'custom_partitioning', 'shard_map'):
    inner = getattr(inner, 'jaxpr', inner)
    if len(inner.invars) == len(arguments) and len(inner.outvars) == len(eqn.outvars):
      return _propagate(inner, arguments)
  active = any(a.activation for a in arguments)
  rule = {
    'dot_general': _dot,
    'transpose': _transpose,
    'broadcast_in_dim': _broadcast,
    'reshape': _reshape,
    'squeeze': _reshape,
  }
  reduced = 'axes' in params and name.startswith(('reduce', 'arg'))
  results = []
  for out in eqn.outvars:
    shape = tuple(getattr(out.aval, 'shape', ()))
    if name in rule:
      shards = rule[name](eqn, arguments, shape)
    elif reduced:
      shards = tuple(p for i, p in enumerate(arguments[0].shards) if i not in params['axes'])
    else:
      shards = _elementwise(eqn, arguments, shape)
    results.append(_Value(shards, active))
  return results


def _scan(eqn: Any, arguments: list[_Value]) -> list[_Value]:
  consts, carries = eqn.params['num_consts'], eqn.params['num_carry']
  inside = arguments[: consts + carries] + [
    _Value(a.shards[1:], a.activation) for a in arguments[consts + carries :]
  ]
  body = eqn.params['jaxpr'].jaxpr
  # a carry may become sharded, or dependent on the batch, in the first iteration
  for _ in range(2):
    results = _propagate(body, inside)
    inside[consts : consts + carries] = [
      _Value(tuple(map(max, a.shards, b.shards)), a.activation or b.activation)
      for a, b in zip(inside[consts : consts + carries], results[:carries], strict=True)
    ]
  return inside[consts : consts + carries] + [
    _Value((1, *r.shards), r.activation, eqn.params['length']) for r in results[carries:]
  ]


def _dot(eqn: Any, arguments: list[_Value], shape: tuple[int, ...]) -> tuple[int, ...]:
  (contract_l, contract_r), (batch_l, batch_r) = eqn.params['dimension_numbers']
  left, right = arguments[0].shards, arguments[1].shards
  return (
    *(max(left[i], right[j]) for i, j in zip(batch_l, batch_r, strict=True)),
    *(p for i, p in enumerate(left) if i not in (*contract_l, *batch_l)),
    *(p for i, p in enumerate(right) if i not in (*contract_r, *batch_r)),
  )


def _transpose(eqn: Any, arguments: list[_Value], shape: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(arguments[0].shards[i] for i in eqn.params['permutation'])


def _broadcast(eqn: Any, arguments: list[_Value], shape: tuple[int, ...]) -> tuple[int, ...]:
  shards = [1] * len(shape)
  for p, i in zip(arguments[0].shards, eqn.params['broadcast_dimensions'], strict=True):
    shards[i] = p if shape[i] > 1 else 1
  return tuple(shards)


def _reshape(eqn: Any, arguments: list[_Value], shape: tuple[int, ...]) -> tuple[int, ...]:
  """Match runs of dimensions with the same product on both sides. The first dimension of a run that
  the shards of the run divide gets all of them."""
  before, given = list(getattr(eqn.invars[0].aval, 'shape', ())), arguments[0].shards
  shards, i, j = [1] * len(shape), 0, 0
  while i < len(before) and j < len(shape):
    first, a, b, run = j, before[i], shape[j], given[i]
    i, j = i + 1, j + 1
    while a != b:
      if a < b:
        a, run, i = a * before[i], run * given[i], i + 1
      else:
        b, j = b * shape[j], j + 1
    target = next((k for k in range(first, j) if shape[k] > 1 and shape[k] % run == 0), None)
    if run > 1 and target is not None:
      shards[target] = run
  return tuple(shards)


def _elementwise(eqn: Any, arguments: list[_Value], shape: tuple[int, ...]) -> tuple[int, ...]:
  """Elementwise operations, and all without a rule: a dimension of the result is sharded like the
  same dimension of an argument with as many dimensions, and otherwise like the first of the same
  size."""
  shards = [1] * len(shape)
  for var, argument in zip(eqn.invars, arguments, strict=True):
    sizes = tuple(getattr(var.aval, 'shape', ()))
    for i, (n, p) in enumerate(zip(sizes, argument.shards, strict=True)):
      if p == 1:
        continue
      if len(sizes) != len(shape):
        same = next((k for k, m in enumerate(shape) if m == n), None)
      else:
        # slices and convolutions may shorten a dimension; half of it is still the same one
        same = i if shape[i] % p == 0 and shape[i] >= n // 2 else None
      if same is not None:
        shards[same] = max(shards[same], p)
  return tuple(shards)
