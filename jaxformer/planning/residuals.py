"""What a forward pass keeps for its backward pass, by tracing: no formula for any layer, and no
array.

`jax.vjp` of a model's loss is traced with abstract shapes, under a remat policy, for the part of a
batch that one device has. The arrays that its backward function closes over are what is kept. Which
of them depend on the batch, and how a mesh axis that divides weights (`tensor`) divides them,
follows from the program: both are carried from the parameters through each operation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal


class Kept(NamedTuple):
  """One array that is kept.

  Attributes:
    shape, dtype: of it.
    parts: in how many parts each dimension is divided.
    activation: it depends on the batch, not on parameters alone.
    rounds: of the loop that stacked it (its first dimension); 1 where none did.
  """

  shape: tuple[int, ...]
  dtype: Any
  parts: tuple[int, ...]
  activation: bool
  rounds: int = 1

  @property
  def bytes(self) -> int:
    """On one device."""
    return (
      math.prod(-(-n // p) for n, p in zip(self.shape, self.parts, strict=True))
      * self.dtype.itemsize
    )


class _Value(NamedTuple):
  parts: tuple[int, ...]
  activation: bool
  rounds: int = 1


def kept_arrays(
  backward: Any,
  params: Mapping[str, jax.ShapeDtypeStruct],
  parts: Mapping[str, Sequence[int]],
  batch: Any,
) -> list[Kept]:
  """What `backward(params, batch)`, a function that returns the backward function of `jax.vjp`,
  closes over; parameters excepted.

  Args:
    parts: in how many parts each dimension of each parameter is divided where it is used (1 for one
      that is gathered).
  """
  closed = jax.make_jaxpr(backward)(params, batch)
  names = list(params)
  leaves = jax.tree.leaves((dict(params), batch))
  # `make_jaxpr` flattens a dictionary by sorted keys; the batch's arrays follow.
  first = [_Value(tuple(parts[name]), False) for name in sorted(names)]
  inputs = first + [_Value((1,) * leaf.ndim, True) for leaf in leaves[len(first) :]]
  outputs = _run(closed.jaxpr, inputs)
  given, found = set(map(id, closed.jaxpr.invars)), {}
  for var, value in zip(closed.jaxpr.outvars, outputs, strict=True):
    if id(var) not in given and not isinstance(var, Literal):
      found[id(var)] = Kept(
        tuple(var.aval.shape), var.aval.dtype, value.parts, value.activation, value.rounds
      )
  return list(found.values())


def _run(jaxpr: Any, inputs: Sequence[_Value]) -> list[_Value]:
  """How the results of a program are divided, given how its arguments are."""
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
      return _run(inner, arguments)
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
      parts = rule[name](eqn, arguments, shape)
    elif reduced:
      parts = tuple(p for i, p in enumerate(arguments[0].parts) if i not in params['axes'])
    else:
      parts = _alike(eqn, arguments, shape)
    results.append(_Value(parts, active))
  return results


def _scan(eqn: Any, arguments: list[_Value]) -> list[_Value]:
  consts, carries = eqn.params['num_consts'], eqn.params['num_carry']
  inside = arguments[: consts + carries] + [
    _Value(a.parts[1:], a.activation) for a in arguments[consts + carries :]
  ]
  body = eqn.params['jaxpr'].jaxpr
  # a carry may take its division, and its dependence on the batch, from the first round
  for _ in range(2):
    results = _run(body, inside)
    inside[consts : consts + carries] = [
      _Value(tuple(map(max, a.parts, b.parts)), a.activation or b.activation)
      for a, b in zip(inside[consts : consts + carries], results[:carries], strict=True)
    ]
  return inside[consts : consts + carries] + [
    _Value((1, *r.parts), r.activation, eqn.params['length']) for r in results[carries:]
  ]


def _dot(eqn: Any, arguments: list[_Value], shape: tuple[int, ...]) -> tuple[int, ...]:
  (contract_l, contract_r), (batch_l, batch_r) = eqn.params['dimension_numbers']
  left, right = arguments[0].parts, arguments[1].parts
  return (
    *(max(left[i], right[j]) for i, j in zip(batch_l, batch_r, strict=True)),
    *(p for i, p in enumerate(left) if i not in (*contract_l, *batch_l)),
    *(p for i, p in enumerate(right) if i not in (*contract_r, *batch_r)),
  )


def _transpose(eqn: Any, arguments: list[_Value], shape: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(arguments[0].parts[i] for i in eqn.params['permutation'])


def _broadcast(eqn: Any, arguments: list[_Value], shape: tuple[int, ...]) -> tuple[int, ...]:
  parts = [1] * len(shape)
  for p, i in zip(arguments[0].parts, eqn.params['broadcast_dimensions'], strict=True):
    parts[i] = p if shape[i] > 1 else 1
  return tuple(parts)


def _reshape(eqn: Any, arguments: list[_Value], shape: tuple[int, ...]) -> tuple[int, ...]:
  """Runs of dimensions with the same product on both sides; the first of a run that it divides
  takes the division."""
  before, divided = list(getattr(eqn.invars[0].aval, 'shape', ())), arguments[0].parts
  parts, i, j = [1] * len(shape), 0, 0
  while i < len(before) and j < len(shape):
    begin, a, b, run = j, before[i], shape[j], divided[i]
    i, j = i + 1, j + 1
    while a != b:
      if a < b:
        a, run, i = a * before[i], run * divided[i], i + 1
      else:
        b, j = b * shape[j], j + 1
    place = next((k for k in range(begin, j) if shape[k] > 1 and shape[k] % run == 0), None)
    if run > 1 and place is not None:
      parts[place] = run
  return tuple(parts)


def _alike(eqn: Any, arguments: list[_Value], shape: tuple[int, ...]) -> tuple[int, ...]:
  """Elementwise operations and what is like them: a dimension is divided as the same one of an
  argument of as many dimensions is, else as one of the same size is."""
  parts = [1] * len(shape)
  for var, argument in zip(eqn.invars, arguments, strict=True):
    sizes = tuple(getattr(var.aval, 'shape', ()))
    for i, (n, p) in enumerate(zip(sizes, argument.parts, strict=True)):
      if p > 1:
        same = (
          i
          if len(sizes) == len(shape) and shape[i] % p == 0 and shape[i] >= n // 2
          else next((k for k, m in enumerate(shape) if m == n), None)
          if len(sizes) != len(shape)
          else None
        )
        if same is not None:
          parts[same] = max(parts[same], p)
  return tuple(parts)
