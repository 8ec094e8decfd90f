"""Numbers that no change of the code's shape may change: losses of trainings, logits, sizes, plans,
and one whole study.

    python -m tests.golden.numbers [losses|logits|counts|plans|study]... [PRESET]...

writes the JSON files beside this one, all of them where none is named, and of all presets where
none is named; `test_numbers.py` compares. The files know presets and plain words, no modules and no
fields: whatever is renamed is followed in the first part of this file, which has all imports.
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile
from typing import Any

import tests.conftest  # noqa: F401  the suite's flags of XLA and its devices, before all else of JAX

# isort: split
import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.task_type import Batch

FOLDER = pathlib.Path(__file__).parent

# ---- all that is known of the package -----------------------------------------------------------


def presets() -> list[str]:
  from jaxformer.models.zoo import PRESETS

  return list(PRESETS)


def by_chapter() -> list[str]:
  from jaxformer.models.zoo import PRESETS
  from jaxformer.models.zoo.story import told

  order = [step.family for step in told()]
  return sorted(PRESETS, key=lambda name: order.index(PRESETS[name].family))


def model_of(preset: str) -> Any:
  from jaxformer.models.zoo import PRESETS

  return PRESETS[preset].model


def definition_of(preset: str) -> Any:
  from jaxformer.models.params import define

  return define(model_of(preset))


def reads(preset: str) -> dict[str, int | None]:
  """What goes in and out: sizes of vocabularies, None for what the model does not have."""
  task = model_of(preset).task
  return {
    'tokens': task.vocab_size,
    'sources': task.source_vocab_size,
    'features': task.features,
    'classes': task.classes,
  }


def initial(preset: str) -> dict[str, Any]:
  return definition_of(preset).init(jax.random.key(0))


def train(
  preset: str, params: dict[str, Any], batches: list[Batch], rate: float
) -> tuple[list[float], float]:
  """The loss of each step of AdamW at a constant rate, in fp32 on one device; and the norm of the
  last gradient."""
  from jaxformer.training.experiment import TrainingConfig
  from jaxformer.training.optimizer import AdamW, Optimizer
  from jaxformer.training.schedule import Constant
  from jaxformer.training.step import TrainState, train_step

  definition = definition_of(preset)
  optimizer = Optimizer(
    AdamW(learning_rate=rate), Constant(warmup=0), len(batches), definition.info
  )
  step = _compiled_once(
    preset,
    lambda state, batch: train_step(
      definition, optimizer, TrainingConfig(dtype='float32'), state, batch
    ),
  )
  state = TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key(1))
  losses, metrics = [], {}
  for batch in batches:
    state, metrics = step(state, batch)
    losses.append(float(metrics['train/loss']))
  return losses, float(metrics['train/grad_norm'])


def logits_of(preset: str, params: dict[str, Any], batch: Batch) -> np.ndarray:
  definition = definition_of(preset)

  def run(params, batch):
    model = definition.merge(params)
    if batch.source_BS is not None:
      return model(batch.source_BS, batch.inputs).y
    return model(batch.inputs).y if reads(preset)['classes'] is None else model(batch)

  return np.asarray(jax.jit(run)(params, batch))


def size(preset: str) -> dict[str, Any]:
  from jaxformer.models.zoo import PRESETS
  from jaxformer.models.zoo.story import STORY

  definition, family = definition_of(preset), PRESETS[preset].family
  return {
    'family': family,
    'chapter': STORY[family].heading,
    'params': definition.size,
    'active_params': definition.active_size,
  }


def cost_of(preset: str) -> dict[str, Any]:
  from jaxformer.planning.cost import cost

  c = cost(model_of(preset))
  return {
    'params': c.params,
    'active_params': c.active_params,
    'embedding_params': c.embedding_params,
    'length': c.length,
    'forward_flops_per_token_causal': c.forward_flops_per_token,
    'train_flops_per_token_causal': c.train_flops_per_token,
    'train_flops_per_token_full': c.train_flops_per_token_full,
    'decode_state_bytes': c.decode_state_bytes,
    'weight_bytes': c.weight_bytes,
  }


def plan(preset: str) -> dict[str, Any]:
  """Beside its cost, a training with one sequence a device on 64 chips of v5e, or 1,024 of v5p
  where the model is large, and inference for one user there."""
  from jaxformer.planning.estimate import estimate, inference_setup, training_run
  from jaxformer.planning.setup import PlanSetup, default_mesh
  from jaxformer.planning.target import parse_target

  model, cost = model_of(preset), cost_of(preset)
  target = parse_target('v5e-64' if cost['params'] < 3e9 else 'v5p-2048')
  length, batch = min(cost['length'], 8192), target.devices
  mesh = default_mesh(model, target, batch)
  setup = PlanSetup(model=model, target=target, mesh=mesh, batch_size=batch, length=length)
  report = estimate(setup).as_json()
  run = training_run(model, length, target, 20.0 * cost['active_params'], 0.4).as_json()
  memory, step = report['memory'], report['step']
  found = {
    'cost': cost,
    'target': target.name,
    'batch': batch,
    'length': length,
    'mesh': {
      axis: report['mesh'][axis]
      for axis in ('replica', 'data', 'fsdp', 'expert', 'context', 'tensor')
    },
    'memory': {
      part: memory[part]
      for part in (
        'parameters',
        'optimizer',
        'batch',
        'weights',
        'gradients',
        'activations',
        'working',
        'gathered',
        'loss',
        'total',
        'limit',
      )
    },
    'fits': memory['fits'],
    'bound': step['bound'],
    'step_seconds': _seconds(step),
    'flops_per_byte': step['arithmetic_intensity'],
    'run': {'train_flops': run['train_flops'], 'seconds': run['seconds'], 'usd': run['price_usd']},
  }
  if cost['decode_state_bytes'] is not None:
    for phase in ('prefill', 'decode'):
      report = estimate(inference_setup(phase, model, target, 1, length)).as_json()
      found[phase] = {
        'weights': report['memory']['weights'],
        'state': report['memory']['state'],
        'bound': report['step']['bound'],
        'seconds': _seconds(report['step']),
      }
  return found


def _seconds(step: dict[str, Any]) -> dict[str, float]:
  return {
    part: step[f'{part}_seconds'] for part in ('compute', 'memory', 'interconnect', 'network')
  }


def study(folder: str) -> dict[str, Any]:
  """Two families of a size, two learning rates, two seeds; they recall the values of keys."""
  from jaxformer import compare
  from jaxformer.data import AssociativeRecall
  from jaxformer.study.study import ScaledFamily, Study

  whole = Study(
    name='numbers',
    entries=(ScaledFamily(family='gru'), ScaledFamily(family='llama3')),
    target=47e3,
    tolerance=0.05,
    tasks=(AssociativeRecall(length=6, test_sequences=64),),
    tokens=4096,
    batch_size=8,
    learning_rates=(1e-3, 1e-2),
    max_grid_extensions=0,
    seeds=(1, 2),
    contexts=(),
    timing_repeats=0,
    dir=folder,
  )
  (task,) = compare(whole, log=lambda line: None).tasks
  return {
    'metric': task.metric,
    'length': task.length,
    'entries': {
      o.title: {
        'params': o.params,
        'active_params': o.active_params,
        'train_flops_per_token': o.train_flops_per_token,
        'state_bytes': o.state_bytes,
        'size_error': o.size_error,
        'tried': [list(t) for t in o.tried],
        'rate': o.rate,
        'scores': {str(seed): score for seed, score in o.scores.items()},
        'mean': o.estimate.mean,
        'interval': [o.estimate.low, o.estimate.high],
        'verdict': o.verdict,
        'curve': [list(p) for p in o.curve],
        'loss_by_position': None if o.position_loss is None else list(o.position_loss),
      }
      for o in task.outcomes
    },
  }


# ---- inputs -------------------------------------------------------------------------------------

TINY = [name for name in presets() if name.endswith('-tiny')]
STEPS, RATE = 20, 3e-3
FEWER = {'s4-tiny': 3, 'lssl-tiny': 6}  # which solve large systems at each step: 4 s, and 1 s


def batches(preset: str, count: int, rows: int, length: int, documents: bool) -> list[Batch]:
  """Drawn from a seed, in the shapes that a model reads. With `documents` rows hold what training
  data have: two documents each, or padding at their ends, and targets that do not count."""
  r, draw = reads(preset), np.random.default_rng(5)

  def ids(vocabulary: int) -> np.ndarray:
    return draw.integers(0, vocabulary, (rows, length), dtype=np.int32)

  def one() -> Batch:
    targets, segments = np.full((rows, length), -1, np.int32), None
    if r['classes'] is not None:
      if documents:
        segments = np.ones((rows, length), np.int32)
        segments[-1, -5:] = 0
      last = length - 1 if segments is None else segments.sum(1) - 1
      targets[np.arange(rows), last] = draw.integers(0, r['classes'], rows)
      if r['features'] is not None:
        features = draw.standard_normal((rows, length, r['features']), dtype=np.float32)
        return Batch(features, targets, segments)
      return Batch(ids(r['tokens']), targets, segments)
    tokens, targets = ids(r['tokens']), ids(r['tokens'])
    source = None if r['sources'] is None else ids(r['sources'])
    if documents and source is not None:
      source[-1, -5:] = -1
      targets[-1, -3:] = -1
    elif documents:
      targets[0, 3] = -1
      segments = np.ones((rows, length), np.int32)
      segments[:, length // 2 + 3 :] = 2
    return Batch(tokens, targets, segments, source)

  return [one() for _ in range(count)]


_steps: dict[str, Any] = {}


def _compiled_once(preset: str, step: Any) -> Any:
  return _steps.setdefault(preset, jax.jit(step))


# ---- numbers ------------------------------------------------------------------------------------


def losses(preset: str, nudged: bool = False) -> dict[str, Any]:
  """`nudged`: a third of the initial values are the next greater float, and a third the next
  smaller: what another order of additions could have done."""
  params = initial(preset)
  if nudged:
    draw = np.random.default_rng(7)
    params = {
      n: jnp.asarray(
        np.asarray(p) * (1 + 2.0**-23 * draw.integers(-1, 2, p.shape)).astype(np.float32)
      )
      for n, p in params.items()
    }
  four = batches(preset, 4, 2, 32, documents=True)
  found, norm = train(preset, params, [four[i % 4] for i in range(FEWER.get(preset, STEPS))], RATE)
  return {'losses': found, 'grad_norm': norm}


def losses_with_rounding(preset: str) -> dict[str, Any]:
  """Besides, what the least change of the initial values makes of it: relative, the most of all
  losses, and of the norm."""
  found, other = losses(preset), losses(preset, nudged=True)
  return found | {
    'rounding': max(abs(a / b - 1) for a, b in zip(found['losses'], other['losses'], strict=True)),
    'rounding_of_norm': abs(found['grad_norm'] / other['grad_norm'] - 1),
  }


def logits(preset: str) -> dict[str, Any]:
  (batch,) = batches(preset, 1, 2, 24, documents=False)
  y = logits_of(preset, initial(preset), batch).astype(np.float64).ravel()
  return {
    'sampled': y[np.linspace(0, y.size - 1, 16).astype(int)].tolist(),
    'size': y.size,
    'mean': float(y.mean()),
    'std': float(y.std()),
    'sum_of_abs': float(np.abs(y).sum()),
  }


def here() -> str:
  """Where the same program gives the same bits: processor and compiler."""
  names = (
    [
      line.split(':')[1].strip()
      for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines()
      if line.startswith(('model name', 'flags'))
    ]
    if pathlib.Path('/proc/cpuinfo').exists()
    else []
  )
  wide = sorted({f for f in ' '.join(names).split() if f.startswith(('avx', 'amx', 'fma'))})
  return f'{next(iter(names), "unknown")}; {" ".join(wide)}; jaxlib {jax.lib.__version__}'


def file_of(what: str) -> pathlib.Path:
  """Sizes are part of the package: `jaxformer list` prints them."""
  zoo = FOLDER.parents[1] / 'jaxformer' / 'models' / 'zoo'
  return (zoo if what == 'counts' else FOLDER) / f'{what}.json'


def recorded(what: str) -> dict[str, Any]:
  return json.loads(file_of(what).read_text())


def _studied() -> dict[str, Any]:
  with tempfile.TemporaryDirectory() as folder:
    return study(folder)


def compute(what: str, only: list[str]) -> dict[str, Any]:
  """The content of a file; of all presets, or of some, the others as they are recorded. What is
  recorded on another machine than the rest of its file says so."""
  if what == 'study':
    return {'recorded_on': here()} | _studied()
  one, names = {
    'losses': (losses_with_rounding, TINY),
    'logits': (logits, TINY),
    'counts': (size, by_chapter()),
    'plans': (plan, presets()),
  }[what]
  before = recorded(what) if only else {}
  found = before.get('presets', before)
  machine = before.get('recorded_on', here())
  other = {} if machine == here() or what in ('counts', 'plans') else {'recorded_on': here()}
  for name in names:
    if name in only or not only:
      print(what, name, file=sys.stderr, flush=True)
      found[name] = one(name) | other
  found = {name: found[name] for name in names if name in found}
  return found if what in ('counts', 'plans') else {'recorded_on': machine, 'presets': found}


def main(arguments: list[str]) -> None:
  every = ('counts', 'losses', 'logits', 'study', 'plans')
  only = [a for a in arguments if a not in every]
  assert set(only) <= set(presets()), f'neither {", ".join(every)} nor presets: {only}'
  for what in [a for a in arguments if a in every] or every:
    found = compute(what, only)
    file_of(what).write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
  main(sys.argv[1:])
