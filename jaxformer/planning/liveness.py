"""Working memory of a forward pass: the most bytes of arrays that are in memory at once, from a
traced program, without a formula for any layer.

What a compiler fuses is in no memory: elementwise operations, broadcasts, reshapes and reductions
are computed where they are read, so that they keep alive what they are computed from. Products,
convolutions, loops, sorts, transforms, kernels and gathers write arrays (`_WRITES`). Updates of a
slice are in place. Loops have the arrays of one iteration, beside what they stack."""

from collections.abc import Sequence
from typing import Any

from jax.extend.core import Literal

from jaxformer.ops.attention_kernels import AS_KERNEL
from jaxformer.planning.residuals import TracedArray, results_of, scan_body, traced

_WRITES = (
  'dot_general',
  'conv_general_dilated',
  'ragged_dot_general',
  'scan',
  'while',
  'sort',
  'fft',
  'gather',
  'scatter-add',
  'triangular_solve',
  'cumsum',
  'shard_map',
)
_IN_PLACE = 'dynamic_update_slice', 'scatter'
_INNER = 'jaxpr', 'call_jaxpr', 'fun_jaxpr'


def peak_bytes(jaxpr: Any, inputs: Sequence[TracedArray], outputs: bool = True) -> int:
  """The most bytes per device that a program allocates at once, without its arguments; without
  `outputs`, also without what it returns."""
  known = {id(v): i for v, i in zip(jaxpr.invars, inputs, strict=True)}
  sources: dict[int, frozenset[int]] = {}  # the written arrays that a variable is computed from
  sizes, first, last, inner = [], [], [], [0] * (len(jaxpr.eqns) + 1)
  returned = set() if outputs else {id(v) for v in jaxpr.outvars}
  for i, eqn in enumerate(jaxpr.eqns):
    arguments = [known.get(id(v)) or traced(v.aval) for v in eqn.invars]
    results = results_of(eqn, arguments)
    reads = [sources.get(id(v), frozenset()) for v in eqn.invars if not isinstance(v, Literal)]
    for b in frozenset().union(*reads):
      last[b] = i
    body = _body(eqn, len(arguments))
    if body is not None:
      inner[i] = peak_bytes(body, scan_body(eqn, arguments)[0] if _is_scan(eqn) else arguments)
      inner[i] -= 0 if _is_scan(eqn) else min(inner[i], sum(r.bytes for r in results))
    for var, result in zip(eqn.outvars, results, strict=True):
      known[id(var)] = result
      if eqn.primitive.name in _IN_PLACE:
        sources[id(var)] = reads[0] if reads else frozenset()
      elif not _writes(eqn):
        sources[id(var)] = frozenset().union(*reads)
      else:
        sources[id(var)] = frozenset((len(sizes),))
        sizes.append(0 if id(var) in returned else result.bytes)
        first.append(i)
        last.append(i)
  for var in jaxpr.outvars:
    for b in sources.get(id(var), ()):
      last[b] = len(jaxpr.eqns)
  change = [0] * (len(jaxpr.eqns) + 2)
  for size, a, b in zip(sizes, first, last, strict=True):
    change[a] += size
    change[b + 1] -= size
  live, most = 0, 0
  for delta, more in zip(change, inner, strict=False):
    live += delta
    most = max(most, live + more)
  return most


def _is_scan(eqn: Any) -> bool:
  return eqn.primitive.name == 'scan'


def _is_kernel(eqn: Any) -> bool:
  """Whether a kernel computes an operation: of what is inside, nothing but the results is written
  to memory."""
  return eqn.primitive.name == 'pallas_call' or eqn.params.get('name') == AS_KERNEL


def _body(eqn: Any, arguments: int) -> Any:
  """The program that an operation runs, where its arguments are those of the operation."""
  if _is_kernel(eqn) or eqn.primitive.name in ('while', 'custom_partitioning', 'shard_map'):
    return None
  body = next((eqn.params[k] for k in _INNER if k in eqn.params), None)
  body = getattr(body, 'jaxpr', body)
  return body if body is not None and len(body.invars) == arguments else None


def _writes(eqn: Any) -> bool:
  """Whether the results of an operation are arrays in memory."""
  if eqn.primitive.name in _WRITES or _is_kernel(eqn):
    return True
  body = _body(eqn, len(eqn.invars))
  return body is not None and any(map(_writes, body.eqns))
