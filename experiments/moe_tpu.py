"""Mixtral and Jamba on TPU slices, by the TPU's compiler.

Question: does a training step of a published mixture of experts fit on a slice, are its FLOPs those of the active experts, and how
do tokens travel?

    pip install -e '.[tpu]'
    python experiments/moe_tpu.py [NAME ...]

Needs no TPU. As `experiments/tpu_fit.py`: AdamW, fp32 parameters, bf16 products, full remat, compiled for a described slice without
any array. `arguments` are parameters and optimizer state, `temporaries` all else, in GiB a chip. FLOPs are the compiler's count of
a model of one period over `planning.cost`'s, which counts three passes where remat makes four of a layer; the compiler counts the
kernels' rows whether a bucket's places are taken or free, and what is in a loop once. Collectives are GiB of their results on one
chip in one step; a dropless layer's rounds count once, as many as a balanced router needs.

Cost: five to fifteen minutes a row on two CPU cores that do other work too.
Result: with jax 0.10.2 and libtpu 0.0.42.1:

    preset       slice      mesh             batch       arguments temporaries compile s  FLOPs  collectives
    mixtral-8x7b v5p:2x2x4  fsdp 2 expert 8  16 x 4096       40.47       20.80       187   1.23  all-gather 26.71,
      all-reduce 8.62, all-to-all 15.00, collective-permute 0.02, reduce-scatter 3.15
    mixtral-8x7b v5p:2x4x4  fsdp 4 expert 8  32 x 4096       20.24       14.15       272   1.23  all-gather 26.71,
      all-reduce 7.93, all-to-all 15.00, collective-permute 0.02, reduce-scatter 1.57
    jamba-v0.1   v5p:2x4x4  fsdp 4 expert 8  32 x 4096       34.93       36.07       473     -   all-gather 43.63,
      all-reduce 3.58, all-to-all 9.41, collective-permute 0.14, reduce-scatter 5.49

All fit the 95 GB of a v5p chip. The gathers of Mixtral are, over fsdp and in bf16, attention and the one expert of each layer that
a chip has, once forward and once backward (26.0 GiB): the weights of all experts never meet.
What is not an expert's is divided over fsdp alone, which is half of what a chip of Jamba holds.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp

from jaxformer.data import Batch
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from jaxformer.planning.compiler import topology_mesh
from jaxformer.planning.cost import flops_per_token
from jaxformer.planning.program import collectives
from jaxformer.sharding import MeshConfig, batch_sharding, use_mesh
from jaxformer.training.checkpoint import abstract_state
from jaxformer.training.optimizer import AdamW, Optimizer
from jaxformer.training.schedule import Cosine
from jaxformer.training.step import StepConfig, TrainState, compiled_train_step, state_shardings

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
  """One row."""

  preset: str
  topology: str
  mesh: MeshConfig
  batch: int
  length: int


CASES = (
  Case('mixtral-8x7b', 'v5p:2x2x4', MeshConfig(data=1, fsdp=2, expert=8), 16, 4096),
  Case('mixtral-8x7b', 'v5p:2x4x4', MeshConfig(data=1, fsdp=4, expert=8), 32, 4096),
  Case('jamba-v0.1', 'v5p:2x4x4', MeshConfig(data=1, fsdp=4, expert=8), 32, 4096),
)


def compiled(case: Case, model: LanguageModel.Config) -> jax.stages.Compiled:
  definition, mesh, rules = define(model), topology_mesh(case.topology, case.mesh), case.mesh.rules
  optimizer = Optimizer.of(AdamW(), Cosine(), 10_000, definition)
  shapes = {n: jax.ShapeDtypeStruct(i.shape, i.dtype) for n, i in definition.info.items()}
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), shapes, jax.eval_shape(optimizer.init, shapes), key)
  state = abstract_state(state, state_shardings(definition, optimizer, mesh, rules))
  ids = jax.ShapeDtypeStruct((case.batch, case.length), jnp.int32, sharding=batch_sharding(mesh, rules))
  with use_mesh(mesh, rules):
    step = compiled_train_step(definition, optimizer, StepConfig(dtype=jnp.bfloat16, remat='full'), mesh, rules)
    return step.trace(state, Batch(ids, ids, None)).lower(lowering_platforms=('tpu',)).compile()


def one_period(model: LanguageModel.Config) -> LanguageModel.Config:
  return model.replace(stack=tuple(g.replace(repeats=1) for g in model.stack))


def row(case: Case) -> str:
  model, began = PRESETS[case.preset].model, time.perf_counter()
  try:
    step = compiled(case, model)
  except jax.errors.JaxRuntimeError as e:   # the compiler knows the chip's memory
    figures = next((line for line in str(e).splitlines() if 'xceeded' in line or 'Used' in line), str(e).splitlines()[0])[:120]
    figures = f'does not fit: {figures.strip()}'
  else:
    seconds, memory = time.perf_counter() - began, step.memory_analysis()
    sent = ', '.join(f'{kind} {t.bytes / GIB:.2f}' for kind, t in sorted(collectives(step).items()) if t.bytes > GIB / 200)
    short = one_period(model)
    mine = flops_per_token(short, case.length) * case.batch * case.length / topology_mesh(case.topology, case.mesh).size
    ratio = compiled(case, short).cost_analysis()['flops'] / mine
    held = f'{memory.argument_size_in_bytes / GIB:9.2f} {memory.temp_size_in_bytes / GIB:11.2f}'
    figures = f'{held} {seconds:9.0f} {ratio:6.2f}  {sent}'
  mesh = ' '.join(f'{a} {getattr(case.mesh, a)}' for a in ('data', 'fsdp', 'expert', 'tensor') if getattr(case.mesh, a) > 1)
  return f'{case.preset:12} {case.topology:10} {mesh:16} {case.batch:>3} x {case.length:<5} {figures}'


def main(names: list[str]) -> None:
  figures = 'arguments temporaries compile s  FLOPs  collectives'
  print(f'{"preset":12} {"slice":10} {"mesh":16} {"batch":11} {figures}')
  for case in CASES:
    if not names or case.preset in names:
      print(row(case), flush=True)


if __name__ == '__main__':
  main(sys.argv[1:])
