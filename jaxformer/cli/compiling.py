"""`plan --compile` and `plan --search`: the TPU's compiler on an experiment's program, and its
answer beside the formulas'."""

from __future__ import annotations

from typing import Any

from jaxformer.cli.common import amount, note
from jaxformer.config import InputError


def check_compiles(target: Any) -> None:
  """Raises `InputError` for a target that this host has no compiler for."""
  if target.topology is None:
    raise InputError(
      f'--compile, --search: {target.name} is no TPU slice, and programs for {target.chip.name} '
      'compile only where '
      'one is installed; without them the formulas answer'
    )


def of_setup(experiment: Any, setup: Any) -> Any:
  """The experiment with the mesh, batch and remat policy of a setup."""
  training = experiment.training.replace(
    batch_size=setup.batch_size, remat=setup.remat, accumulate=setup.accumulate
  )
  return experiment.replace(training=training, mesh=setup.mesh)


def compiled_step(experiment: Any, target: Any) -> Any:
  """The `CompiledPlan` of the experiment's training step on the target."""
  from jaxformer.planning.compiler import compile_plan, topology_mesh
  from jaxformer.training.step import lowered_train_step

  mesh = topology_mesh(target.topology, experiment.mesh, target.slices)
  return compile_plan(lowered_train_step(experiment, mesh), mesh, target.device_memory_bytes)


def train_report(experiment: Any, setup: Any) -> dict[str, Any]:
  """The compiled training step of a setup, as JSON data, with what the formulas disagree on."""
  from jaxformer.planning.compiler import disagreements
  from jaxformer.planning.cost import flops, recomputed_flops
  from jaxformer.planning.memory import memory

  experiment = of_setup(experiment, setup)
  note(
    f'compiling a step of {setup.batch_size} x {setup.length} tokens for {setup.target.topology}'
  )
  plan = compiled_step(experiment, setup.target)
  held = memory(setup).total
  least = flops(setup.model, 'train', setup.batch_size, setup.length)
  again = recomputed_flops(setup.model, setup.batch_size, setup.length, setup.remat)
  predicted = least / setup.target.devices, (least + again) / setup.target.devices
  return plan.as_json() | {
    'predicted_bytes': held,
    'predicted_flops': list(predicted),
    'disagreements': disagreements(plan, held, predicted),
  }


def inference_report(experiment: Any, setup: Any, predicted_bytes: float) -> dict[str, Any]:
  """A compiled prefill, or decoding, as JSON data. Heads and hidden units are divided as widely as
  they can be; the rest of the devices have copies, unless the experiment's mesh says otherwise."""
  from jaxformer.inference.lowering import lowered_decode, lowered_prefill
  from jaxformer.models.params import define
  from jaxformer.planning.compiler import compile_plan, disagreements, topology_mesh
  from jaxformer.planning.cost import flops

  target, phase, batch, context_length = setup.target, setup.phase, setup.batch_size, setup.length
  config = inference_mesh(experiment.model, target)
  note(f'compiling {phase} of {batch} sequences, {context_length} positions, for {target.topology}')
  mesh = topology_mesh(target.topology, config, target.slices)
  lower = {'prefill': lowered_prefill, 'decode': lowered_decode}[phase]
  plan = compile_plan(
    lower(define(experiment.model), mesh, config.rules, batch, context_length),
    mesh,
    target.device_memory_bytes,
  )
  predicted = (
    flops(experiment.model, phase, batch, context_length, last_logits=True) / target.devices
  )
  return plan.as_json() | {
    'mesh': dict(mesh.shape),
    'predicted_bytes': predicted_bytes,
    'predicted_flops': [predicted, predicted],
    'disagreements': disagreements(plan, predicted_bytes, (predicted, predicted)),
  }


def inference_mesh(model: Any, target: Any) -> Any:
  """As many parts of each matrix as its dimensions allow, up to all devices; what is left along
  `data`."""
  from jaxformer.models.params import define
  from jaxformer.planning.setup import abstract_mesh
  from jaxformer.sharding import MeshConfig

  n = target.devices_per_slice
  for tensor in sorted((d for d in range(1, n + 1) if n % d == 0), reverse=True):
    config = MeshConfig(replica=target.slices, data=n // tensor, tensor=tensor)
    try:
      define(model).abstract(abstract_mesh(config, target.devices), config.rules)
    except InputError:
      continue
    return config
  raise AssertionError('tensor = 1 divides every dimension')


def search_report(
  experiment: Any, setup: Any, batch_given: bool, name: str
) -> tuple[dict[str, Any], Any]:
  """What was recommended, why the others lost, and the command that trains it, as JSON data; and
  the recommended setup, or the one that was given where nothing fits."""
  from jaxformer.planning.mesh_search import ROWS, search

  found = search(
    setup,
    lambda s: compiled_step(of_setup(experiment, s), s.target),
    rows=None if batch_given else ROWS,
    note=note,
  )
  best = found.best
  value: dict[str, Any] = {
    'candidates': found.tried,
    'rejected': [{'name': n, 'reason': r} for n, r in found.rejected],
    'compiled': [
      {'name': c.setup.name, 'predicted_bytes': c.memory.total} | c.compiled.as_json()
      for c in found.compiled
      if c.compiled
    ],
  }
  if best is None:
    return value | {'best': None}, setup
  length = (
    ['--data.sequence-length', str(setup.length)]
    if hasattr(experiment.data, 'sequence_length')
    else []
  )
  return value | {
    'best': best.setup.name,
    'bound': best.step.bound,
    'step_seconds': best.step.seconds,
    'tokens_per_second': best.step.tokens_per_second,
    'command': ' '.join(['jaxformer train', name, *length, *best.setup.overrides]),
  }, best.setup


# ---- for a reader ------------------------------------------------------------------------------


def compiled_lines(v: dict[str, Any]) -> list[tuple[str, str, str]]:
  """Rows of a table."""
  from jaxformer.planning.hardware import GIB

  verdict = 'fits' if v['fits'] else f'does not fit, by {v["short_by"] / GIB:,.2f} GiB'
  parts = (
    ''
    if v['arguments'] is None
    else ': '
    + ', '.join(
      f'{name} {v[name] / GIB:.2f}'
      for name in ('arguments', 'temporaries', 'outputs')
      if v[name] >= GIB / 200
    )
  )
  rows = [('compiler', f'{v["total"] / GIB:,.2f} GiB of {v["limit"] / GIB:,.2f}', verdict + parts)]
  if (flops := v['flops']) is not None:
    left = ', '.join(f'{n} x {name}' for name, n in flops['not_counted'].items())
    rows.append(
      ('compiled FLOPs', f'{flops["total"]:.4g} a device', f'not counted: {left}' if left else '')
    )
  for i, (axis, kinds) in enumerate(v['collectives'].items()):
    sent = ', '.join(
      f'{kind} {t["bytes"] / GIB:.2f}'
      for kind, t in sorted(kinds.items())
      if t['bytes'] >= GIB / 200
    )
    rows.append(('' if i else 'sent, GiB a device', f'over {axis}', sent or 'little'))
  rows.append(
    ('compiled in', f'{v["compile_seconds"]:.0f} s', f'jax {v["jax"]}, libtpu {v["libtpu"]}')
  )
  return rows + [('disagreement', *line.split(': ', 1)) for line in v['disagreements']]


def search_lines(v: dict[str, Any]) -> list[str]:
  """What a search came to, in lines."""
  from jaxformer.planning.hardware import GIB

  rejected = [f'  {entry["name"]}: {entry["reason"]}' for entry in v['rejected']]
  if v['best'] is None:
    return [f'none of {v["candidates"]} candidates fits', *rejected]
  best = next(c for c in v['compiled'] if c['name'] == v['best'])
  return [
    f'best of {v["candidates"]} candidates: {v["best"]}',
    f'  {best["total"] / GIB:.2f} GiB of {best["limit"] / GIB:.2f} a device by the compiler, '
    f'{best["predicted_bytes"] / GIB:.2f} by the formulas',
    f'  a step takes at least {v["step_seconds"]:.3g} s, bound by {v["bound"]}: at most '
    f'{amount(v["tokens_per_second"])} tokens '
    'a second',
    'the others:',
    *rejected,
    f'to train it: {v["command"]}',
  ]
