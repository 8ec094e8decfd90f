"""Published models, each with a slice on which its training step compiles and fits, the bottleneck
of the step, and the price of its training.

Question: which slice does the training of a published model need, does the step fit there by the
TPU compiler, how far are the formulas of `jaxformer plan` from it, and what does a
Chinchilla-optimal training cost?

    pip install -e '.[tpu]'
    python experiments/plan_table.py            # the missing rows
    python experiments/plan_table.py NAME ...   # these rows again
    python experiments/plan_table.py --formulas # all rows by the present formulas, beside the
                                                # recorded figures of the compiler

Needs no TPU. Each row is the training step of the command line (AdamW, fp32 parameters, bf16
products, packed documents) for the devices of a slice, from shapes alone. Bytes are per device:
arguments, temporaries, and results that do not reuse the memory of an argument. The bound is the
roofline's at the full peak, not a prediction; the price is for 20 tokens per active parameter at
40 % of the peak, with the list prices of `jaxformer/hardware.toml`. Rows are recorded in
`plan_table.json`, from which `plan_table.md` is written.

Cost: one to three minutes of one CPU core per row, most of it in the compiler (the times in the
table are from a machine under other load: five times as long).
Result: `plan_table.md`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from jaxformer.data import DatasetConfig, Pairs, Text, Tsv
from jaxformer.hardware import GIB
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.zoo import PRESETS
from jaxformer.planning.collectives import Traffic
from jaxformer.planning.compiler import CompiledPlan, compile_plan, disagreements, topology_mesh
from jaxformer.planning.cost import cost, flops, recomputed_flops
from jaxformer.planning.estimate import estimate, training_run
from jaxformer.planning.hlo_flops import CompiledFlops
from jaxformer.planning.setup import PlanSetup
from jaxformer.planning.target import parse_target
from jaxformer.sharding import MeshConfig
from jaxformer.training.experiment import Experiment, TrainingConfig
from jaxformer.training.recipes.by_size import TOKENS_PER_PARAMETER
from jaxformer.training.step import lowered_train_step

FOLDER = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Case:
  """One row."""

  preset: str
  target: str
  mesh: MeshConfig
  batch: int
  length: int
  remat: str = 'full'
  note: str = ''


RWKV7 = (
  'the backward pass of the delta rule holds the triangular systems of its chunks in fp32, which '
  'the formulas, from what a forward '
  'pass keeps, do not see'
)

H3 = (
  'Fourier transforms of long convolutions work on complex numbers of twice the length in fp32, '
  'which the formulas do not see'
)


def fsdp(n: int) -> MeshConfig:
  return MeshConfig(data=1, fsdp=n, rules='fsdp')


CASES = (
  Case('gpt3-175b', 'v5p-1024', fsdp(512), 1536, 2048),
  Case('llama2-7b', 'v5e-64', fsdp(64), 128, 4096),
  Case('llama2-13b', 'v5p-64', fsdp(32), 64, 4096),
  Case('llama2-70b', 'v5p-256', fsdp(128), 256, 4096),
  Case('llama3-8b', 'v6e-64', fsdp(64), 128, 8192),
  Case('llama3-70b', 'v5p-512', fsdp(256), 256, 8192),
  Case('llama3.1-405b', 'v5p-2048', MeshConfig(data=1, fsdp=64, tensor=16), 128, 8192),
  Case('mixtral-8x7b', 'v5p-64', MeshConfig(data=1, fsdp=4, expert=8), 32, 4096),
  Case('jamba-v0.1', 'v5p-64', MeshConfig(data=1, fsdp=4, expert=8), 32, 4096),
  Case('mamba-2.8b', 'v5e-32', fsdp(32), 64, 2048),
  Case('mamba2-2.7b', 'v5e-32', fsdp(32), 64, 2048),
  Case('rwkv4-14b', 'v5p-32', fsdp(16), 64, 1024),
  Case('rwkv7-2.9b', 'v5e-32', fsdp(32), 64, 4096, note=RWKV7),
  Case('h3-2.7b', 'v5e-32', fsdp(32), 64, 2048, note=H3),
  Case(
    'transformer-big',
    'v5e-8',
    fsdp(8),
    512,
    256,
    note='pairs of 256 tokens, source and target each',
  ),
)


def experiment(case: Case) -> Experiment:
  model = PRESETS[case.preset].model
  data: DatasetConfig = Text(sequence_length=case.length)
  if isinstance(model, EncoderDecoder.Config):  # the file is never opened
    data = Pairs(
      corpus=Tsv(path='pairs.tsv'), source_lengths=(case.length,), target_lengths=(case.length,)
    )
  return Experiment(
    model=model,
    data=data,
    mesh=case.mesh,
    training=TrainingConfig(batch_size=case.batch, remat=case.remat),
  )


def compiled(case: Case) -> CompiledPlan:
  target = parse_target(case.target)
  mesh = topology_mesh(target.topology or '', case.mesh, target.slices)
  return compile_plan(
    lambda: lowered_train_step(experiment(case), mesh), mesh, target.device_memory_bytes
  )


def row(case: Case, plan: CompiledPlan) -> dict[str, Any]:
  """The figures of a case, as JSON data."""
  model, target = PRESETS[case.preset].model, parse_target(case.target)
  setup = PlanSetup(
    model=model,
    target=target,
    mesh=case.mesh,
    batch_size=case.batch,
    length=case.length,
    remat=case.remat,
  )
  c = cost(model, case.length)
  report = estimate(setup).as_json()
  run = training_run(model, case.length, target, TOKENS_PER_PARAMETER * c.active_params)
  memory = report['memory']['total']
  least = flops(model, 'train', case.batch, case.length)
  again = recomputed_flops(model, case.batch, case.length, case.remat)
  predicted = least / target.devices, (least + again) / target.devices
  return {
    'name': case.preset,
    'params': c.params,
    'target': target.name,
    'chips': target.total_chips,
    'mesh': {axis: size for axis, size in case.mesh.given.items() if size > 1},
    'batch_size': case.batch,
    'sequence_length': case.length,
    'remat': case.remat,
    'compiled': plan.as_json(),
    'predicted': report['memory'],
    'predicted_flops': list(predicted),
    'ratio': plan.total / memory,
    'step': report['step'],
    'run': run.as_json(),
    'disagreements': disagreements(plan, memory, predicted),
    'note': case.note,
  }


def lines(rows: list[dict[str, Any]]) -> list[str]:
  """The table in Markdown."""
  head = (
    'model',
    'slice',
    'chips',
    'mesh',
    'batch',
    'remat',
    'GiB per chip: compiler',
    'formulas',
    'ratio',
    'step at least, s',
    'bound',
    'tokens/s at most',
    'Chinchilla tokens',
    'price, USD',
    'compiled in, s',
    'jax, libtpu',
  )
  out = [f'| {" | ".join(head)} |', '|' + ' --- |' * len(head)]
  for r in rows:
    plan = r['compiled']
    held = f'{plan["total"] / GIB:.2f} of {plan["limit"] / GIB:.2f}' + (
      '' if plan['fits'] else ' (does not fit)'
    )
    cells = (
      r['name'],
      r['target'],
      f'{r["chips"]:,}',
      ' x '.join(f'{a} {n}' for a, n in r['mesh'].items()),
      f'{r["batch_size"]} x {r["sequence_length"]}',
      r['remat'],
      held,
      f'{r["predicted"]["total"] / GIB:.2f}',
      f'{r["ratio"]:.2f}',
      f'{r["step"]["seconds"]:.3g}',
      r['step']['bound'],
      f'{r["step"]["tokens_per_second"]:,.0f}',
      f'{r["run"]["tokens"]:.3g}',
      f'{r["run"]["price_usd"]:,.0f}',
      f'{plan["compile_seconds"]:.0f}',
      f'{plan["jax"]}, {plan["libtpu"]}',
    )
    out.append(f'| {" | ".join(cells)} |')
  remarks = [
    f'- {r["name"]}: {text}' for r in rows for text in (*r['disagreements'], r['note']) if text
  ]
  title = (
    'Where compiler and formulas disagree (memory by 15 %, FLOPs by 5 % beyond remat), and remarks:'
  )
  return out + (['', title, '', *remarks] if remarks else [])


def save(rows: dict[str, dict[str, Any]]) -> None:
  ordered = [rows[c.preset] for c in CASES if c.preset in rows]
  (FOLDER / 'plan_table.json').write_text(json.dumps(ordered, indent=1) + '\n')
  title = [
    '# Training steps that the compiler confirmed',
    '',
    'Made by `python experiments/plan_table.py`; see there.',
    '',
  ]
  (FOLDER / 'plan_table.md').write_text('\n'.join(title + lines(ordered)) + '\n')


def load() -> dict[str, dict[str, Any]]:
  path = FOLDER / 'plan_table.json'
  return {r['name']: r for r in json.loads(path.read_text())} if path.exists() else {}


def said(figures: dict[str, Any]) -> CompiledPlan:
  """What the compiler said, from a row."""
  kept = {
    k: figures[k]
    for k in (
      'arguments',
      'temporaries',
      'outputs',
      'total',
      'limit',
      'compile_seconds',
      'jax',
      'libtpu',
    )
  }
  counted = figures['flops'] and CompiledFlops(
    figures['flops']['products'], figures['flops']['kernels'], figures['flops']['not_counted']
  )
  sent = {
    axis: {kind: Traffic(**t) for kind, t in kinds.items()}
    for axis, kinds in figures['collectives'].items()
  }
  return CompiledPlan(**kept, flops=counted, collectives=sent)


def main(names: list[str]) -> None:
  if names == ['--formulas']:
    rows = load()
    save({c.preset: row(c, said(rows[c.preset]['compiled'])) for c in CASES if c.preset in rows})
    return
  if unknown := set(names) - {c.preset for c in CASES}:
    sys.exit(f'no row {sorted(unknown)[0]!r}; there are: {", ".join(c.preset for c in CASES)}')
  for case in CASES:
    if case.preset in names or (not names and case.preset not in load()):
      print(f'{case.preset} on {case.target}', file=sys.stderr, flush=True)
      made = row(case, compiled(case))
      save(load() | {case.preset: made})


if __name__ == '__main__':
  main(sys.argv[1:])
