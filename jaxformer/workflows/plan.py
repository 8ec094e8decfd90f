"""Cost of a model, and time, money, memory and bounds of training or inference on a target."""

import dataclasses
from collections.abc import Collection
from typing import Any, Unpack, get_args

import jax

from jaxformer.config import InputError
from jaxformer.hardware import CHIPS, hardware_file
from jaxformer.inference.decoding import lowered_decode, lowered_prefill
from jaxformer.launch.catalog import priced
from jaxformer.launch.check import setup_of
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from jaxformer.overrides import override
from jaxformer.planning import mesh_search
from jaxformer.planning.compiler import CompiledPlan, compile_plan, disagreements, topology_mesh
from jaxformer.planning.cost import Cost, cost, flops, recomputed_flops
from jaxformer.planning.estimate import (
  UTILIZATION,
  estimate,
  inference_setup,
  parse_amount,
  serving_cost,
  training_run,
)
from jaxformer.planning.prediction import predict
from jaxformer.planning.setup import Phase, PlanSetup
from jaxformer.planning.target import Target, parse_target
from jaxformer.sharding import Parallel
from jaxformer.training.experiment import Experiment
from jaxformer.training.step import lowered_train_step
from jaxformer.workflows.names import Resolved, resolve
from jaxformer.workflows.on_target import on_target
from jaxformer.workflows.overrides import Overrides, pairs_of
from jaxformer.workflows.plan_lines import ROWS, search_lines
from jaxformer.workflows.progress import Log, log_progress
from jaxformer.workflows.sizes import Amount, Size, shape, shape_row
from jaxformer.workflows.tables import amount, parameters, table


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelPlan(Cost):
  """The cost of a model, and of its training or inference on a target.

  Attributes:
    name, family: of the model; no family if it is not from the zoo.
    tokens: of the training run.
    shape: of a model built to a size; else None.
    missing: what has to be given for training, by field; see `DatasetConfig.missing`.
    report: on a target: memory, times, price, compiler and search results as JSON data; else {}.
  """

  name: str
  family: str | None
  tokens: float
  shape: dict[str, Any] | None
  missing: dict[str, str]
  report: dict[str, Any]

  def json(self) -> dict[str, Any]:
    return {
      'name': self.name,
      'family': self.family,
      **({} if self.shape is None else {'shape': self.shape}),
      **{f.name: getattr(self, f.name) for f in dataclasses.fields(Cost)},
      'tokens': self.tokens,
      'tokens_per_parameter': self.tokens / self.active_params,
      'train_flops': self.tokens * self.train_flops_per_token,
      **({'to_be_given': self.missing} if self.missing else {}),
      **self.report,
    }

  def lines(self) -> list[str]:
    v = self.json()
    causal, full = self.train_flops_per_token, self.train_flops_per_token_full
    at = f'at {self.length:,} tokens'
    rows = [] if self.shape is None else [shape_row(self.shape)]
    rows += [
      ('training FLOPs per token', f'{causal:.4g} (causal), {full:.4g} (full)', at),
      ('weights', f'{self.weight_bytes / 1e9:,.4g} GB', 'at 2 bytes per parameter'),
    ]
    if self.decode_state_bytes is not None:
      each = f'per sequence of {self.context_length:,} tokens'
      rows.append(('decoding state', f'{self.decode_state_bytes / 1e9:,.4g} GB', each))
    tokens = f'{amount(self.tokens)} tokens, {v["tokens_per_parameter"]:.3g} per active parameter'
    train_flops = v.get('run', v)['train_flops']
    rows.append(('training', f'{train_flops:.4g} FLOPs', tokens))
    rows += [('to be given', field, what) for field, what in self.missing.items()]
    rows += [row for part, rows_of in ROWS.items() if part in v for row in rows_of(v)]
    head = f'{self.name}: {parameters(self.params, self.active_params)}'
    return [head, *table(rows, left=3), *(search_lines(v['search']) if 'search' in v else [])]


def plan(
  model: Experiment | ModelConfig | str,
  *,
  overrides: Overrides = (),
  length: int | None = None,
  target: str | None = None,
  tokens: Amount | None = None,
  utilization: float = UTILIZATION,
  price: float | None = None,
  prices: str | None = None,
  hardware: str | None = None,
  phase: Phase = 'train',
  compile: bool = False,
  profile: bool = False,
  search: bool = False,
  log: Log = log_progress,
  **size: Unpack[Size],
) -> ModelPlan:
  """Return what a model costs, from shapes alone; on a target also time, price, memory per device
  and the bottleneck of training or inference.

  The run is that of `experiment`: its tokens, sequence length, batch and remat policy. FLOPs per
  token are averaged over its sequence length; of inference, over the model's context length.

  Args:
    model, overrides, size: see `experiment`.
    length: sequence length, in place of these.
    target: a slice or a host of GPUs: 'v5p-2048', 'v6e-256', '2 x v5e-256', 'v5e:2x4', 'h100:8'.
    tokens: of the training run, a number or text such as '2T', in place of the experiment's.
    utilization: share of the peak that time and price assume: in training of the FLOPs per second,
      in inference of the rate of the bottleneck.
    price: USD per chip-hour, in place of the list price.
    prices: 'sky', or a folder like SkyPilot's catalog, whose prices replace the list price.
    hardware: a TOML or JSON file with chips of your own; see `jaxformer.hardware`.
    phase: 'train', 'prefill' or 'decode'.
    compile: compile the program with the TPU compiler, and report memory, FLOPs, collectives and
      the predicted time (`planning.step_clock`).
    profile: with `compile`, also where that time goes.
    search: try meshes, batch sizes and remat policies, compile the best few and recommend one.
  """
  if profile and not compile:
    raise InputError('profile: needs compile')
  chips = _target(target, hardware, utilization, price, prices, phase, compile, search)
  pairs = pairs_of(overrides)
  found = resolve(model, pairs, size)
  e, sized, ours = found.experiment, found.sized, found.ours
  name = model if isinstance(model, str) and sized is None else e.run.name or e.model.tag
  given = {path.replace('-', '_') for path, _ in pairs}
  training = chips is not None and phase == 'train'
  if ours and phase != 'train':
    e = e.replace(training=e.training.replace(batch_size=1))
  e = override(e, found.overrides)
  if length is None:
    of_data = phase == 'train' or not ours or any('sequence' in path for path in given)
    length = e.data.positions if of_data else e.model.context_length
  elif training:
    e = e.replace(data=e.data.at_length(length))
  if training and found.open_mesh:
    e, _ = on_target(e, chips, given | {'training.accumulate'} if search else given)
  if compile and phase != 'train' and e.model.task.inputs == 'pairs':
    raise InputError(f'compile: {phase} of {e.model.tag} is planned by formulas alone')
  c = cost(e.model, length)
  trained = parse_amount(e.tokens if tokens is None else tokens, 'tokens')
  report: dict[str, Any] = {}
  if chips is not None:
    setup = _setup(e, chips, phase, length, given)
    if search:
      report['search'], setup = _search(e, setup, given, found, name, log)
    if training:
      log(f'tracing a step of {setup.batch_size} x {setup.length} tokens on {chips.name}')
      run = training_run(
        e.model, setup.length, chips, trained, utilization, precision=setup.precision, price=price
      )
      report['run'] = run.as_json()
    else:
      log(f'tracing a {phase} of {setup.batch_size} x {setup.length} tokens on {chips.name}')
    estimated = estimate(setup)
    if not training:
      serving = serving_cost(estimated.step, chips, utilization, price)
      report['serving'] = dataclasses.asdict(serving)
    report |= estimated.as_json()
    if compile:
      hourly = (chips.chip.price_per_hour if price is None else price) * chips.total_chips
      report |= _compiled(
        e, setup, report['memory']['total'], trained if training else None, hourly, profile, log
      )
  family = sized.family if sized else PRESETS[name].family if name in PRESETS else None
  return ModelPlan(
    **vars(c),
    name=name,
    family=family,
    tokens=trained,
    shape=None if sized is None else shape(sized, e.model),
    missing={f'data.{field}': m.what for field, m in e.data.missing().items()},
    report=report,
  )


def _target(
  name: str | None,
  hardware: str | None,
  utilization: float,
  price: float | None,
  prices: str | None,
  phase: Phase,
  compile: bool,
  search: bool,
) -> Target | None:
  """Return the target of a plan, None without one. Raises `InputError` for options that are wrong,
  or have no effect there."""
  if not 1e-6 <= utilization <= 1:
    raise InputError('utilization', utilization, 'at least 1e-6 and at most 1')
  if price is not None and not 0 < price <= 1e12:
    raise InputError('price', price, 'a positive number of USD per chip-hour, at most 1e12')
  if phase not in get_args(Phase):
    raise InputError('phase', phase, 'train, prefill or decode')
  if search and (compile or phase != 'train'):
    raise InputError('search: compiles by itself, and only for training; omit compile and phase')
  if name is None:
    given = {'price': price, 'prices': prices, 'hardware': hardware, 'phase': phase != 'train'}
    given |= {'compile': compile, 'search': search}
    if needing := [option for option, value in given.items() if value]:
      raise InputError(f'{needing[0]}: needs a target')
    return None
  found = parse_target(name, CHIPS if hardware is None else hardware_file(hardware))
  found = priced(found, price, prices)
  if (compile or search) and found.topology is None:
    raise InputError(
      f'compile, search: {found.name} is not a TPU slice; programs for {found.chip.name} compile '
      'only where one is installed; without them the plan comes from formulas'
    )
  return found


def _setup(
  experiment: Experiment, target: Target, phase: Phase, length: int, given: Collection[str]
) -> PlanSetup:
  """Return what is estimated. Raises `InputError` for settings that inference does not have."""
  e, t = experiment, experiment.training
  if phase == 'train':
    return setup_of(e, target)
  if without := {'training.remat', 'training.accumulate'} & set(given):
    raise InputError(f'{min(without)}: has no effect on the {phase} phase')
  precision = 'fp32' if t.dtype == 'float32' else 'bf16'
  mesh = e.mesh if any(path.startswith('mesh') for path in given) else None
  setup = inference_setup(phase, e.model, target, t.batch_size, length, precision, mesh)
  rows = setup.parallel.batch_shards
  if mesh is not None and t.batch_size % rows:
    raise InputError('training.batch_size', t.batch_size, f'a multiple of {rows}, for this mesh')
  return setup


# ---- the TPU compiler --------------------------------------------------------------------------


def _of_setup(experiment: Experiment, setup: PlanSetup) -> Experiment:
  """Return the experiment with the mesh, batch and remat policy of a setup, and the options of its
  chip, which a user's file may have changed."""
  options = (f'{name}={value}' for name, value in setup.target.chip.compiler_options.items())
  training = experiment.training.replace(
    batch_size=setup.batch_size,
    remat=setup.remat,
    accumulate=setup.accumulate,
    compiler_options=(*options, *experiment.training.compiler_options),
  )
  return experiment.replace(training=training, mesh=setup.mesh)


def _compile(experiment: Experiment, setup: PlanSetup) -> CompiledPlan:
  """Compile the step of a setup on its mesh, and predict its time."""
  target, model, phase = setup.target, setup.model, setup.phase
  assert target.topology is not None  # checked by `_target`
  mesh = topology_mesh(target.topology, setup.mesh, target.slices)
  program = define(model), Parallel(mesh, setup.mesh.rules), setup.batch_size, setup.length

  def lower() -> jax.stages.Lowered:
    if phase == 'train':
      return lowered_train_step(_of_setup(experiment, setup), mesh)
    lowered = {'prefill': lowered_prefill, 'decode': lowered_decode}[phase]
    return lowered(*program, dtype=setup.dtype)

  layers = {type(layer).__qualname__.partition('.')[0] for layer, _ in model.layers()}
  return compile_plan(lower, mesh, target.device_memory_bytes, target.chip, layers)


def _compiled(
  experiment: Experiment,
  setup: PlanSetup,
  predicted_bytes: float,
  tokens: float | None,
  price_per_hour: float,
  profile: bool,
  log: Log,
) -> dict[str, Any]:
  """Compile the step of a setup. Return what the compiler reports of it, compared to the formulas,
  and the predicted time."""
  target, batch, length, phase = setup.target, setup.batch_size, setup.length, setup.phase
  log(f'compiling {phase}: {batch} sequences of {length} tokens, for {target.topology}')
  found = _compile(experiment, setup)
  if phase == 'train':
    least = flops(setup.model, phase, batch, length)
    most = least + recomputed_flops(setup.model, batch, length, setup.remat)
  else:
    least = most = flops(setup.model, phase, batch, length, last_logits=phase == 'prefill')
  predicted = least / target.devices, most / target.devices
  compiled = found.as_json() | {
    'predicted_bytes': predicted_bytes,
    'predicted_flops': list(predicted),
    'left_out': _left_out(setup),
    'disagreements': disagreements(found, predicted_bytes, predicted),
  }
  if found.profile is None:
    return {'compiled': compiled}
  speed = predict(setup, found.profile, tokens=tokens, price_per_hour=price_per_hour).as_json()
  where = {'profile': found.profile.as_json()} if profile else {}
  return {'compiled': compiled, 'predicted': speed} | where


def _left_out(setup: PlanSetup) -> list[str]:
  """Return what a compiled program computes or sends that its text does not show."""
  out = []
  if setup.target.slices > 1:
    out.append('traffic between slices: the program calls another library for it')
  if setup.phase == 'decode' and setup.shared_batch[0] == 1:
    out.append('FLOPs of one sequence per device: a product with one row is no matrix product')
  if setup.abstract_mesh.shape['context'] > 1 and setup.phase != 'decode':
    out.append(
      'attention over the context axis: its loops skip blocks by the documents of a batch, so '
      'their FLOPs and traffic count as one iteration'
    )
  return out


def _search(
  experiment: Experiment,
  setup: PlanSetup,
  given: Collection[str],
  resolved: Resolved,
  name: str,
  log: Log,
) -> tuple[dict[str, Any], PlanSetup]:
  """Return the recommendation and why the others were rejected, and the recommended setup, or the
  given one if nothing fits. A recipe keeps its batch, in microbatches. Raises `InputError` if what
  is searched for was `given`."""
  if fixed := [path for path in given if path.startswith('mesh') or path == 'training.remat']:
    raise InputError(f'{fixed[0]}: search chooses it; use compile to compile one choice')
  keep_batch = resolved.open_mesh
  fixed_rows = 'training.accumulate' if keep_batch else 'training.batch_size'
  found = mesh_search.search(
    setup,
    lambda s: _compile(experiment, s),
    rows=mesh_search.ROWS if resolved.ours and fixed_rows not in given else None,
    keep_batch=keep_batch,
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
  field = experiment.data.length_field
  length = ['--data.sequence-length', str(setup.length)] if field == 'sequence_length' else []
  return value | {
    'best': best.setup.name,
    'bound': best.step.bound,
    'step_seconds': best.seconds_per_token * best.step.tokens,
    'tokens_per_second': 1 / best.seconds_per_token,
    'command': ' '.join(['jaxformer train', name, *length, *best.setup.overrides]),
  }, best.setup
