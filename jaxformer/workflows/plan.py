"""Cost of a model, and time, money, memory and bounds of training or inference on a target."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, Literal, cast

from jax.sharding import Mesh

from jaxformer.config import InputError
from jaxformer.data import Text
from jaxformer.inference.decoding import lowered_decode, lowered_prefill
from jaxformer.launch.check import setup_of
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from jaxformer.overrides import override
from jaxformer.planning.compiler import CompiledPlan, compile_plan, disagreements, topology_mesh
from jaxformer.planning.cost import Cost, cost, flops, recomputed_flops
from jaxformer.planning.estimate import (
  TOKENS_PER_PARAMETER,
  UTILIZATION,
  estimate,
  inference_setup,
  parse_amount,
  training_run,
)
from jaxformer.planning.hardware import CHIPS, GIB, hardware_file
from jaxformer.planning.memory import memory
from jaxformer.planning.mesh_search import ROWS, search
from jaxformer.planning.setup import PlanSetup, abstract_mesh, default_mesh
from jaxformer.planning.target import Target, parse_target
from jaxformer.sharding import MeshConfig, Parallel
from jaxformer.study.sizing import Sized
from jaxformer.task_type import LANGUAGE_MODELING
from jaxformer.training.experiment import Experiment, default_experiment
from jaxformer.training.step import lowered_train_step
from jaxformer.user_code import is_a
from jaxformer.workflows.names import experiment_of
from jaxformer.workflows.progress import Log
from jaxformer.workflows.sizes import (
  Amount,
  Pairs,
  Size,
  is_layer,
  name_of,
  shape,
  shape_row,
  size_of,
  sized_model,
)
from jaxformer.workflows.tables import amount, table

Phase = Literal['train', 'prefill', 'decode']
LONGEST = 8192  # tokens of a sequence in which a preset is trained on a target
NOT_PARTS = ('total', 'limit', 'fits', 'short_by', 'would_fit')  # of the memory in a report


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
  """Options of a plan.

  Attributes:
    target: a slice or a host of GPUs: 'v5p-2048', 'v6e-256', '2 x v5e-256', 'v5e:2x4', 'h100:8';
      None for the cost of the model alone.
    tokens: of the training run, as a number or as text such as '2T'; None for 20 per active
      parameter (Hoffmann et al. 2022).
    utilization: share of the peak FLOPs per second that time and price assume.
    price: USD per chip-hour, in place of the list price.
    hardware: a TOML or JSON file with further chips; see `planning.hardware`.
    phase: 'train', 'prefill' or 'decode'.
    compile: compile the program with the TPU compiler, and report what that says.
    search: try meshes, batch sizes and remat policies, compile the best and recommend one.
  """

  target: str | None = None
  tokens: Amount | None = None
  utilization: float = UTILIZATION
  price: float | None = None
  hardware: str | None = None
  phase: Phase = 'train'
  compile: bool = False
  search: bool = False

  def __post_init__(self):
    if not 0 < self.utilization <= 1:
      raise InputError('utilization', self.utilization, 'above 0 and at most 1')
    if self.price is not None and self.price <= 0:
      raise InputError('price', self.price, 'positive')
    if self.phase not in ('train', 'prefill', 'decode'):
      raise InputError('phase', self.phase, 'train, prefill or decode')
    if self.target is None:
      changed = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
      for field in changed:
        if field.name not in ('tokens', 'utilization'):
          raise InputError(f'{field.name}: needs a target')
    if self.search and (self.compile or self.phase != 'train'):
      raise InputError('search: compiles by itself, and only for training; omit compile and phase')

  def chips(self) -> Target | None:
    """Return the target; None if there is none."""
    if self.target is None:
      return None
    chips = CHIPS if self.hardware is None else hardware_file(self.hardware)
    found = parse_target(self.target, chips)
    if (self.compile or self.search) and found.topology is None:
      raise InputError(
        f'compile, search: {found.name} is not a TPU slice; programs for {found.chip.name} compile '
        'only where one is installed; without them the plan comes from formulas'
      )
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelPlan(Cost):
  """The cost of a model, and of its training or inference on a target.

  Attributes:
    name, family: of the model; no family if it is not from the zoo.
    tokens: of the training run.
    shape: of a model built to a size; else None.
    report: on a target: memory, times, price, compiler and search results as JSON data; else {}.
  """

  name: str
  family: str | None
  tokens: float
  shape: dict[str, Any] | None
  report: dict[str, Any]

  def json(self) -> dict[str, Any]:
    value: dict[str, Any] = {'name': self.name, 'family': self.family}
    if self.shape is not None:
      value['shape'] = self.shape
    value |= {f.name: getattr(self, f.name) for f in dataclasses.fields(Cost)}
    value |= {
      'tokens': self.tokens,
      'tokens_per_parameter': self.tokens / self.active_params,
      'train_flops': self.tokens * self.train_flops_per_token,
    }
    return value | self.report

  def lines(self) -> list[str]:
    active = f', {self.active_params:,} active' if self.active_params != self.params else ''
    rows = [shape_row(self.shape)] if self.shape is not None else []
    causal, full = self.train_flops_per_token, self.train_flops_per_token_full
    rows += [
      (
        'training FLOPs per token',
        f'{causal:.4g} (causal), {full:.4g} (full)',
        f'at {self.length:,} tokens',
      ),
      ('weights', f'{self.weight_bytes / 1e9:,.4g} GB', 'at 2 bytes per parameter'),
    ]
    if self.decode_state_bytes is not None:
      rows.append(
        (
          'decoding state',
          f'{self.decode_state_bytes / 1e9:,.4g} GB',
          f'per sequence of {self.context_length:,} tokens, 2 bytes per number',
        )
      )
    v = self.json()
    if 'run' not in v:
      tokens = f'{amount(self.tokens)} tokens, {v["tokens_per_parameter"]:.3g} per active parameter'
      rows.append(('training', f'{v["train_flops"]:.4g} FLOPs', tokens))
    rows += [*_run_rows(v), *_memory_rows(v), *_step_rows(v), *_compiled_rows(v)]
    head = f'{self.name}: {self.params:,} parameters{active}'
    return [head, *table(rows, left=3), *_search_lines(v)]


def plan_model(
  model: Experiment | ModelConfig | str,
  overrides: Pairs,
  size: Size,
  length: int | None,
  options: PlanOptions,
  log: Log,
) -> ModelPlan:
  """Plan a model or an experiment; see `jaxformer.plan`."""
  target = options.chips()
  name, preset, sized, experiment, overrides = _resolved(model, overrides, size)
  given = {path.replace('-', '_') for path, _ in overrides}
  if preset and target is not None:
    experiment = _at_scale(experiment, target, options.phase)
  experiment = override(experiment, overrides)
  own_length = (
    not preset
    or any('sequence' in path for path in given)
    or (target is not None and options.phase == 'train')
  )
  if length is None:
    length = experiment.data.positions if own_length else experiment.model.context_length
  c = cost(experiment.model, length)
  tokens = options.tokens
  if tokens is None:
    tokens = TOKENS_PER_PARAMETER * c.active_params
  run = float(parse_amount(tokens, 'tokens') if isinstance(tokens, str) else tokens)
  report: dict[str, Any] = {}
  if target is not None and options.phase == 'train':
    report = _training(experiment, target, options, preset, given, run, name, log)
  elif target is not None:
    report = _inference(experiment, target, options, length, log)
  return ModelPlan(
    **{f.name: getattr(c, f.name) for f in dataclasses.fields(Cost)},
    name=name,
    family=_family(name, sized),
    tokens=run,
    shape=None if sized is None else shape(sized, experiment.model),
    report=report,
  )


def _resolved(
  model: Experiment | ModelConfig | str, overrides: Pairs, size: Size
) -> tuple[str, bool, Sized | None, Experiment, Pairs]:
  """Return the name of a model, whether its experiment is the default one, whose settings suit a
  tiny training, the result of sizing it, its experiment, and the overrides left to apply."""
  wanted = size_of(size)
  if isinstance(model, str) and (wanted is not None or is_layer(model)):
    sized, overrides = sized_model(model, wanted, overrides)
    name = name_of(sized)
    return name, True, sized, default_experiment(sized.model, name), overrides
  if isinstance(model, str):
    return model, model in set(PRESETS), None, experiment_of(model, []), overrides
  if is_a(model, ModelConfig):
    return model.tag, True, None, default_experiment(model, model.tag), overrides
  experiment = cast(Experiment, model)
  return experiment.run.name or experiment.model.tag, False, None, experiment, overrides


def _family(name: str, sized: Sized | None) -> str | None:
  if sized is not None:
    return sized.family
  return PRESETS[name].family if name in set(PRESETS) else None


def _at_scale(experiment: Experiment, target: Target, phase: Phase) -> Experiment:
  """Return a default experiment with one sequence per device, full remat and longer sequences."""
  training = experiment.training.replace(
    batch_size=target.devices if phase == 'train' else 1, remat='full'
  )
  data = experiment.data
  if data.has_text and experiment.model.task == LANGUAGE_MODELING:
    data = Text(sequence_length=min(experiment.model.context_length, LONGEST))
  return experiment.replace(training=training, data=data)


def _training(
  experiment: Experiment,
  target: Target,
  options: PlanOptions,
  preset: bool,
  given: Collection[str],
  tokens: float,
  name: str,
  log: Log,
) -> dict[str, Any]:
  t, mesh = experiment.training, experiment.mesh
  if preset and not any(path.startswith('mesh') for path in given):
    mesh = default_mesh(experiment.model, target, t.batch_size, t.accumulate)
  setup = dataclasses.replace(setup_of(experiment, target, mesh), platform=None)
  report: dict[str, Any] = {}
  if options.search:
    if chosen := [path for path in given if path.startswith('mesh') or path == 'training.remat']:
      raise InputError(f'{chosen[0]}: search chooses it; use compile to compile one choice')
    batch_given = not preset or 'training.batch_size' in given
    report['search'], setup = _search(experiment, setup, batch_given, name, log)
  log(f'tracing a step of {setup.batch_size} x {setup.length} tokens on {target.name}')
  run = training_run(
    setup.model,
    setup.length,
    target,
    tokens,
    options.utilization,
    precision=setup.precision,
    price=options.price,
  )
  report |= {'run': run.as_json()} | estimate(setup).as_json()
  if options.compile:
    report['compiled'] = _compiled_training(experiment, setup, log)
  return report


def _inference(
  experiment: Experiment, target: Target, options: PlanOptions, length: int, log: Log
) -> dict[str, Any]:
  precision = 'fp32' if experiment.training.dtype == 'float32' else 'bf16'
  setup = inference_setup(
    options.phase, experiment.model, target, experiment.training.batch_size, length, precision
  )
  report = estimate(setup).as_json()
  if options.compile:
    report['compiled'] = _compiled_inference(setup, report['memory']['total'], log)
  return report


# ---- the TPU compiler --------------------------------------------------------------------------


def _of_setup(experiment: Experiment, setup: PlanSetup) -> Experiment:
  """Return the experiment with the mesh, batch and remat policy of a setup."""
  training = experiment.training.replace(
    batch_size=setup.batch_size, remat=setup.remat, accumulate=setup.accumulate
  )
  return experiment.replace(training=training, mesh=setup.mesh)


def _mesh(target: Target, config: MeshConfig) -> Mesh:
  assert target.topology is not None  # checked by PlanOptions.chips
  return topology_mesh(target.topology, config, target.slices)


def _compile_step(experiment: Experiment, target: Target) -> CompiledPlan:
  mesh = _mesh(target, experiment.mesh)
  return compile_plan(lowered_train_step(experiment, mesh), mesh, target.device_memory_bytes)


def _compiled_training(experiment: Experiment, setup: PlanSetup, log: Log) -> dict[str, Any]:
  """Compile the training step of a setup, and compare the result to the formulas."""
  experiment, topology = _of_setup(experiment, setup), setup.target.topology
  log(f'compiling a step of {setup.batch_size} x {setup.length} tokens for {topology}')
  found = _compile_step(experiment, setup.target)
  least = flops(setup.model, 'train', setup.batch_size, setup.length)
  again = recomputed_flops(setup.model, setup.batch_size, setup.length, setup.remat)
  return _compared(found, memory(setup).total, least, least + again, setup.target)


def _compiled_inference(setup: PlanSetup, predicted_bytes: float, log: Log) -> dict[str, Any]:
  """Compile a prefill or a decoding step. Heads and hidden units are sharded over as many devices
  as they can be; further devices hold replicas."""
  target, batch, length, phase = setup.target, setup.batch_size, setup.length, setup.phase
  config = _inference_mesh(setup.model, target)
  log(f'compiling {phase} of {batch} sequences, {length} positions, for {target.topology}')
  mesh = _mesh(target, config)
  lower = {'prefill': lowered_prefill, 'decode': lowered_decode}[phase]
  found = compile_plan(
    lower(define(setup.model), Parallel(mesh, config.rules), batch, length),
    mesh,
    target.device_memory_bytes,
  )
  predicted = flops(setup.model, phase, batch, length, last_logits=True)
  return {'mesh': dict(mesh.shape)} | _compared(
    found, predicted_bytes, predicted, predicted, target
  )


def _compared(
  found: CompiledPlan, predicted_bytes: float, least: float, most: float, target: Target
) -> dict[str, Any]:
  predicted = least / target.devices, most / target.devices
  return found.as_json() | {
    'predicted_bytes': predicted_bytes,
    'predicted_flops': list(predicted),
    'disagreements': disagreements(found, predicted_bytes, predicted),
  }


def _inference_mesh(model: Any, target: Target) -> MeshConfig:
  """Return the mesh with the largest `tensor` axis that divides the model; the rest is `data`."""
  n = target.devices_per_slice
  for tensor in sorted((d for d in range(1, n + 1) if n % d == 0), reverse=True):
    config = MeshConfig(replica=target.slices, data=n // tensor, tensor=tensor)
    try:
      define(model).abstract(Parallel(abstract_mesh(config, target.devices), config.rules))
    except InputError:
      continue
    return config
  raise AssertionError('tensor = 1 divides every dimension')


def _search(
  experiment: Experiment, setup: PlanSetup, batch_given: bool, name: str, log: Log
) -> tuple[dict[str, Any], PlanSetup]:
  """Return the recommendation and why the others were rejected, and the recommended setup, or the
  given one if nothing fits."""
  found = search(
    setup,
    lambda s: _compile_step(_of_setup(experiment, s), s.target),
    rows=None if batch_given else ROWS,
    note=log,
  )
  best = found.best
  value: dict[str, Any] = {
    'candidates': found.tried,
    'rejected': [{'name': n, 'reason': r} for n, r in found.rejected],
    'compiled': [
      {'name': e.setup.name, 'predicted_bytes': e.memory.total} | e.compiled.as_json()
      for e in found.compiled
      if e.compiled
    ],
  }
  if best is None:
    return value | {'best': None}, setup
  length = ['--data.sequence-length', str(setup.length)] if experiment.data.has_text else []
  return value | {
    'best': best.setup.name,
    'bound': best.step.bound,
    'step_seconds': best.step.seconds,
    'tokens_per_second': best.step.tokens_per_second,
    'command': ' '.join(['jaxformer train', name, *length, *best.setup.overrides]),
  }, best.setup


# ---- for people --------------------------------------------------------------------------------

Rows = list[tuple[str, str, str]]


def _parts(v: dict[str, Any], names: Collection[str]) -> str:
  """Return the parts of a memory of at least 5 MiB, in GiB."""
  return ', '.join(f'{n} {v[n] / GIB:.2f}' for n in names if v[n] >= GIB / 200)


def _verdict(v: dict[str, Any]) -> str:
  return 'fits' if v['fits'] else f'does not fit, by {v["short_by"] / GIB:,.2f} GiB'


def _run_rows(v: dict[str, Any]) -> Rows:
  if 'run' not in v:
    return []
  r, t = v['run'], v['target']
  share = f'{v["tokens_per_parameter"]:.3g} per active parameter'
  spot = 'no list price' if r['spot_price_usd'] is None else f'${r["spot_price_usd"]:,.0f}'
  mesh = ', '.join(f'{a} {n}' for a, n in v['mesh'].items() if n > 1) or 'one device'
  peak = f'{100 * r["utilization"]:g}% of the peak'
  return [
    ('target', f'{t["name"]}: {t["chips"]:,} chips', f'{mesh}; remat {v["remat"]}'),
    ('training', f'{r["train_flops"]:.4g} FLOPs', f'{amount(r["tokens"])} tokens, {share}'),
    (
      'time',
      f'{r["days"]:,.4g} days',
      f'at {peak}, {r["tokens_per_second"]:,.0f} tokens per second',
    ),
    (
      'price',
      f'${r["price_usd"]:,.0f} on demand',
      f'{r["chip_hours"]:,.0f} chip-hours; spot: {spot}',
    ),
  ]


def _memory_rows(v: dict[str, Any]) -> Rows:
  if 'memory' not in v:
    return []
  m = v['memory']
  parts = _parts(m, [n for n in m if n not in NOT_PARTS])
  size = f'{m["total"] / GIB:,.2f} GiB of {m["limit"] / GIB:,.2f}'
  rows = [('memory per device', size, f'{_verdict(m)}: {parts}')]
  rows += [('' if i else 'what would fit', text, '') for i, text in enumerate(m['would_fit'])]
  if not m['fits'] and not m['would_fit']:
    advice = 'try a chip with more memory, or --mesh.tensor'
    rows.append(('what would fit', 'no single change', advice))
  return rows


def _step_rows(v: dict[str, Any]) -> Rows:
  if 'step' not in v:
    return []
  s = v['step']
  times = ', '.join(
    f'{name} {1e3 * s[f"{name}_seconds"]:,.4g} ms'
    for name in ('compute', 'memory', 'interconnect', 'network')
  )
  what = {'prefill': 'prefill', 'decode': 'decoded token'}.get(v['phase'], 'training step')
  bound = f'at least {1e3 * s["seconds"]:,.4g} ms, bound by {s["bound"]}'
  rate, at_once = f'at most {s["tokens_per_second"]:,.0f}', f'{s["tokens"]:,} tokens at once'
  traffic = f'{s["arithmetic_intensity"]:,.4g} of memory traffic'
  return [
    (what, bound, times),
    ('  tokens per second', rate, at_once),
    ('  FLOPs per byte', traffic, f'the chip is balanced at {s["ridge_intensity"]:,.4g}'),
  ]


def _compiled_rows(v: dict[str, Any]) -> Rows:
  if 'compiled' not in v:
    return []
  v = v['compiled']
  parts = ''
  if v['arguments'] is not None:
    parts = f': {_parts(v, ("arguments", "temporaries", "outputs"))}'
  size = f'{v["total"] / GIB:,.2f} GiB of {v["limit"] / GIB:,.2f}'
  rows = [('compiler', size, _verdict(v) + parts)]
  if (counted := v['flops']) is not None:
    left = ', '.join(f'{n} x {name}' for name, n in counted['not_counted'].items())
    note = f'not counted: {left}' if left else ''
    rows.append(('compiled FLOPs', f'{counted["total"]:.4g} per device', note))
  for i, (axis, kinds) in enumerate(v['collectives'].items()):
    sizes = {kind: t['bytes'] for kind, t in sorted(kinds.items())}
    sent = _parts(sizes, sizes) or 'little'
    rows.append(('' if i else 'sent, GiB per device', f'over {axis}', sent))
  versions = f'jax {v["jax"]}, libtpu {v["libtpu"]}'
  rows.append(('compiled in', f'{v["compile_seconds"]:.0f} s', versions))
  return rows + [('disagreement', *line.split(': ', 1)) for line in v['disagreements']]


def _search_lines(v: dict[str, Any]) -> list[str]:
  if 'search' not in v:
    return []
  v = v['search']
  rejected = [f'  {entry["name"]}: {entry["reason"]}' for entry in v['rejected']]
  if v['best'] is None:
    return [f'none of {v["candidates"]} candidates fits', *rejected]
  best = next(c for c in v['compiled'] if c['name'] == v['best'])
  return [
    f'best of {v["candidates"]} candidates: {v["best"]}',
    f'  {best["total"] / GIB:.2f} GiB of {best["limit"] / GIB:.2f} per device by the compiler, '
    f'{best["predicted_bytes"] / GIB:.2f} by the formulas',
    f'  a step takes at least {v["step_seconds"]:.3g} s, bound by {v["bound"]}: at most '
    f'{amount(v["tokens_per_second"])} tokens per second',
    'rejected:',
    *rejected,
    f'to train it: {v["command"]}',
  ]
