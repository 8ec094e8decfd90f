"""Residuals: the arrays that a forward pass keeps for its backward pass, found by tracing, without
a formula for any layer and without any array.

`jax.vjp` of a model's loss is traced with abstract shapes, under a remat policy, for the part of a
batch that one device has. The arrays that its backward function closes over are the residuals.
Tracing shards nothing, so two properties are propagated from the inputs through every operation of
the program: whether an array depends on the batch, and into how many shards each dimension is split
where the weights are (over `tensor`). An operation without a rule of its own takes the sharding of
the argument dimensions that its result has (`_elementwise`)."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import Literal


class TracedArray(NamedTuple):
  """Properties of an array in a traced program.

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
    return math.prod(self.local) * self.dtype.itemsize

  @property
  def local(self) -> tuple[int, ...]:
    """The shape on a device."""
    return tuple(-(-n // p) for n, p in zip(self.shape, self.shards, strict=True))


Arrays = list[TracedArray]


def traced(aval: Any, shards: Sequence[int] | None = None, activation: bool = False) -> TracedArray:
  """An array of a program, replicated unless `shards` says otherwise."""
  shape = tuple(getattr(aval, 'shape', ()))
  shards = (1,) * len(shape) if shards is None else tuple(shards)
  return TracedArray(shape, getattr(aval, 'dtype', None), shards, activation)


def residuals(jaxpr: Any, inputs: Sequence[TracedArray]) -> list[TracedArray]:
  """The arrays that a backward function closes over, without the parameters.

  Args:
    jaxpr: the traced program that returns the backward function of `jax.vjp`.
    inputs: its arguments; a parameter with its shards where it is used (1 for one that is
      all-gathered).
  """
  outputs = propagate(jaxpr, inputs)
  arguments = set(map(id, jaxpr.invars))
  found = {
    id(var): array
    for var, array in zip(jaxpr.outvars, outputs, strict=True)
    if id(var) not in arguments and not isinstance(var, Literal)
  }
  return list(found.values())


def propagate(jaxpr: Any, inputs: Sequence[TracedArray]) -> list[TracedArray]:
  """The properties of a program's results, from those of its arguments."""
  known = {id(v): i for v, i in zip(jaxpr.invars, inputs, strict=True)}

  def value(var: Any) -> TracedArray:
    return known.get(id(var)) or traced(var.aval)

  for eqn in jaxpr.eqns:
    results = results_of(eqn, [value(v) for v in eqn.invars])
    known.update(zip(map(id, eqn.outvars), results, strict=True))
  return [value(v) for v in jaxpr.outvars]


def results_of(eqn: Any, arguments: list[TracedArray]) -> list[TracedArray]:
  """The properties of an operation's results."""
  name, params = eqn.primitive.name, eqn.params
  inner = next((params[k] for k in ('jaxpr', 'call_jaxpr', 'fun_jaxpr') if k in params), None)
  if name == 'scan':
    return _scan(eqn, arguments)
  if inner is not None and name not in ('while', 'pallas_call', 'custom_partitioning', 'shard_map'):
    inner = getattr(inner, 'jaxpr', inner)
    if len(inner.invars) == len(arguments) and len(inner.outvars) == len(eqn.outvars):
      return propagate(inner, arguments)
  if name == 'shard_map':
    specs = zip(eqn.outvars, params['out_specs'], strict=True)
    outputs = [(v.aval, _shards_of(params['mesh'], spec, v.aval.ndim)) for v, spec in specs]
    return [traced(aval, shards, any(a.activation for a in arguments)) for aval, shards in outputs]
  reduced = 'axes' in params and name.startswith(('reduce', 'arg'))
  rule = _RULES.get(name, _reduce if reduced else _elementwise)
  active = any(a.activation for a in arguments)
  return [
    traced(v.aval, rule(params, arguments, getattr(v.aval, 'shape', ())), active)
    for v in eqn.outvars
  ]


def _scan(eqn: Any, arguments: list[TracedArray]) -> list[TracedArray]:
  inside, carried, stacked = scan_body(eqn, arguments)
  length = eqn.params['length']
  return inside[carried] + [
    r._replace(shape=(length, *r.shape), shards=(1, *r.shards), iterations=length) for r in stacked
  ]


def scan_body(eqn: Any, arguments: Arrays) -> tuple[Arrays, slice, Arrays]:
  """The arguments of the body of a loop, where its carries are among them, and what it stacks."""
  # Constants and carries have the same dimensions inside, scanned and stacked arrays one less.
  # (Versions of JAX name the numbers of each differently.)
  body = getattr(eqn.params['jaxpr'], 'jaxpr', eqn.params['jaxpr'])
  end = sum(map(_as_inside, eqn.invars, body.invars))
  first = end - sum(map(_as_inside, eqn.outvars, body.outvars))
  inside = arguments[:end] + [
    a._replace(shape=a.shape[1:], shards=a.shards[1:]) for a in arguments[end:]
  ]
  # a carry may become sharded, or dependent on the batch, in the first iteration
  stacked: Arrays = []
  for _ in range(2):
    results = propagate(body, inside)
    carried, stacked = results[: end - first], results[end - first :]
    inside[first:end] = [
      a._replace(
        shards=tuple(map(max, a.shards, b.shards)),
        activation=a.activation or b.activation,
        iterations=1,
      )
      for a, b in zip(inside[first:end], carried, strict=True)
    ]
  return inside, slice(first, end), stacked


def _as_inside(outside: Any, inside: Any) -> bool:
  """Whether an array of a loop has the same dimensions inside of it."""
  return len(getattr(outside.aval, 'shape', ())) == len(getattr(inside.aval, 'shape', ()))


Shape = Sequence[int]

# Rules: the shards of a result of some shape, from parameters of the operation and its arguments.


def _dot(params: Any, arguments: Arrays, shape: Shape) -> Shape:
  (contract_l, contract_r), (batch_l, batch_r) = params['dimension_numbers']
  left, right = arguments[0].shards, arguments[1].shards
  return (
    *(max(left[i], right[j]) for i, j in zip(batch_l, batch_r, strict=True)),
    *(p for i, p in enumerate(left) if i not in (*contract_l, *batch_l)),
    *(p for i, p in enumerate(right) if i not in (*contract_r, *batch_r)),
  )


def _constraint(params: Any, arguments: Arrays, shape: Shape) -> Shape:
  return _shards_of(params['sharding'].mesh, params['sharding'].spec, len(shape))


def _shards_of(mesh: Any, spec: Any, dims: int) -> Shape:
  """The number of shards of each dimension, from a partition over a mesh."""
  names = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
  return [math.prod(mesh.shape[n] for n in each) for each in names] + [1] * (dims - len(names))


def _transpose(params: Any, arguments: Arrays, shape: Shape) -> Shape:
  return [arguments[0].shards[i] for i in params['permutation']]


def _reduce(params: Any, arguments: Arrays, shape: Shape) -> Shape:
  return [p for i, p in enumerate(arguments[0].shards) if i not in params['axes']]


def _broadcast(params: Any, arguments: Arrays, shape: Shape) -> Shape:
  shards = [1] * len(shape)
  for p, i in zip(arguments[0].shards, params['broadcast_dimensions'], strict=True):
    shards[i] = p if shape[i] > 1 else 1
  return shards


def _reshape(params: Any, arguments: Arrays, shape: Shape) -> Shape:
  """Match runs of dimensions with the same product on both sides. The first dimension of a run that
  the shards of the run divide gets all of them."""
  before, given = arguments[0].shape, arguments[0].shards
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
  return shards


def _elementwise(params: Any, arguments: Arrays, shape: Shape) -> Shape:
  """Elementwise operations, and all without a rule: a dimension of the result is sharded like the
  same dimension of an argument with as many dimensions, and otherwise like the first of the same
  size."""
  shards = [1] * len(shape)
  for argument in arguments:
    for i, (n, p) in enumerate(zip(argument.shape, argument.shards, strict=True)):
      if p == 1:
        continue
      if len(argument.shape) != len(shape):
        same = next((k for k, m in enumerate(shape) if m == n), None)
      else:
        # slices and convolutions may shorten a dimension; half of it is still the same one
        same = i if shape[i] % p == 0 and shape[i] >= n // 2 else None
      if same is not None:
        shards[same] = max(shards[same], p)
  return shards


_RULES = {
  'dot_general': _dot,
  'transpose': _transpose,
  'broadcast_in_dim': _broadcast,
  'reshape': _reshape,
  'squeeze': _reshape,
  'sharding_constraint': _constraint,
}
