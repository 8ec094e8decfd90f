"""Published models on TPU slices, by the TPU compiler.

Question: does a training step fit on a slice, how long does it take to compile, and what do its
chips send each other?

    pip install -e '.[tpu]'
    python experiments/tpu_fit.py [NAME ...]

Needs no TPU. Each row is the training step of the command line (AdamW, fp32 parameters, bf16
products) compiled for a slice from shapes alone. `arguments` are parameters and optimizer state,
`temporaries` everything else; collectives are bytes of their results per chip and step, with the
iterations of loops counted. No row is a time of the step.

Cost: one to two and a half minutes per row on two CPU cores under other load.
Result: with jax 0.10.2 and libtpu 0.0.42.1, all in GiB per chip:

    preset       slice      mesh            batch      remat  arguments temporaries compile s
    llama2-7b    v5p:2x2x4  fsdp 16         16 x 4096  full        4.71        5.49        58
    llama2-7b    v5p:2x2x4  fsdp 16         32 x 4096  names       4.71       16.35        46
    llama3.1-8b  v6e:4x4    fsdp 16         16 x 8192  full        5.61        8.14       141
    llama3.1-8b  v6e:4x4    fsdp 8 tensor 2 16 x 8192  full        5.61       11.57       107

and their collectives, in the same order:

    all-gather 24.59, all-to-all 0.06, collective-permute 13.08
    all-gather 24.60, all-to-all 0.12, collective-permute 13.08
    all-gather 27.95, all-to-all 0.12, collective-permute 14.85
    all-gather 13.97, all-reduce 20.25, all-to-all 0.25, reduce-scatter 0.06, permute 7.86

All four fit (95 GB per v5p chip, 32 GB per v6e chip). The all-gathers are the weights in bf16
without the embedding (12.3 GiB of llama2-7b), once forward and once backward; the permutes are
rings that reduce-scatter their gradients, 17/16 of them on 16 chips."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax

from jaxformer.data import Text
from jaxformer.hardware import GIB
from jaxformer.models.model import ModelConfig
from jaxformer.models.zoo import PRESETS
from jaxformer.planning.collectives import list_collectives, traffic_by_kind
from jaxformer.planning.compiler import topology_mesh
from jaxformer.sharding import MeshConfig
from jaxformer.training.experiment import Experiment, TrainingConfig
from jaxformer.training.step import lowered_train_step


@dataclasses.dataclass(frozen=True)
class Case:
  """One row."""

  preset: str
  topology: str
  mesh: MeshConfig
  batch: int
  length: int
  remat: str = 'full'


CASES = (
  Case('llama2-7b', 'v5p:2x2x4', MeshConfig(data=1, fsdp=16, rules='fsdp'), 16, 4096, 'full'),
  Case('llama2-7b', 'v5p:2x2x4', MeshConfig(data=1, fsdp=16, rules='fsdp'), 32, 4096, 'names'),
  Case('llama3.1-8b', 'v6e:4x4', MeshConfig(data=1, fsdp=16, rules='fsdp'), 16, 8192, 'full'),
  Case(
    'llama3.1-8b',
    'v6e:4x4',
    MeshConfig(data=1, fsdp=8, tensor=2, rules='fsdp_tensor'),
    16,
    8192,
    'full',
  ),
)


def compiled(case: Case, model: ModelConfig) -> jax.stages.Compiled:
  """The training step of a model on the slice of a case; documents have no borders."""
  data = Text(sequence_length=case.length, packing='stream')
  training = TrainingConfig(steps=10_000, batch_size=case.batch, remat=case.remat)
  experiment = Experiment(model=model, data=data, training=training, mesh=case.mesh)
  return lowered_train_step(experiment, topology_mesh(case.topology, case.mesh)).compile()


def row(case: Case, flops: Callable[[Case], str] = lambda case: '') -> str:
  """A line of the table; `flops` gives one more column for a step that fits."""
  began = time.perf_counter()
  try:
    step = compiled(case, PRESETS[case.preset].model)
  except jax.errors.JaxRuntimeError as e:  # the compiler knows the chip's memory
    figures = next(
      (line for line in str(e).splitlines() if 'xceeded' in line or 'Used' in line),
      str(e).splitlines()[0],
    )[:120]
    figures = f'does not fit: {figures.strip()}'
  else:
    seconds, memory = time.perf_counter() - began, step.memory_analysis()
    sent = ', '.join(
      f'{kind} {t.bytes / GIB:.2f}'
      for kind, t in sorted(traffic_by_kind(list_collectives(step)).items())
      if t.bytes > GIB / 200
    )
    held = f'{memory.argument_size_in_bytes / GIB:9.2f} {memory.temp_size_in_bytes / GIB:11.2f}'
    figures = f'{held} {seconds:9.0f}{flops(case)}  {sent}'
  mesh = ' '.join(
    f'{a} {getattr(case.mesh, a)}'
    for a in ('data', 'fsdp', 'expert', 'tensor')
    if getattr(case.mesh, a) > 1
  )
  batch = f'{case.batch:>3} x {case.length:<5}'
  return f'{case.preset:12} {case.topology:10} {mesh:16} {batch} {case.remat:6} {figures}'


def main(names: list[str]) -> None:
  figures = 'arguments temporaries compile s  collectives, all in GiB a chip'
  print(f'{"preset":12} {"slice":10} {"mesh":16} {"batch":11} {"remat":6} {figures}')
  for case in CASES:
    if not names or case.preset in names:
      print(row(case), flush=True)


if __name__ == '__main__':
  main(sys.argv[1:])
