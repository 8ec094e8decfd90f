"""Training steps of ours and of MaxText under one compiler, by one clock.

Question: how long does a step take, predicted by `planning.step_clock`, beside one of MaxText of
the same model, batch, slice, sharding and recomputation?

    python3.12 -m venv other && . other/bin/activate
    pip install 'maxtext[tpu]' && pip install --no-deps -e .
    python experiments/against_maxtext.py [NAME ...]

Needs no TPU. Every program is compiled in a process of its own by the same libtpu: MaxText's with
the flags of its recipes for the chip (LIBTPU_INIT_ARGS), ours with the options of
`jaxformer/hardware.toml`. Kernels take the same share of the peak in both (`kernel_time`).

Result: see the table at the end of docs/clock.md."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from jaxformer.hardware import CHIPS
from jaxformer.planning.compiler import topology_mesh
from jaxformer.planning.step_clock import time_program
from jaxformer.planning.target import parse_target
from jaxformer.sharding import MeshConfig

# Flags of MaxText's recipes: `configs/tpu/v5e/*.sh`, `configs/tpu/v5p/*.sh`, and for v6e
# `benchmarks/xla_flags_library.py`. Without those of fused collectives on v5p and v6e, where libtpu
# 0.0.52 refuses them.
_DATA_PARALLEL = (
  '--xla_tpu_enable_data_parallel_all_reduce_opt=true '
  '--xla_tpu_data_parallel_opt_different_sized_ops=true '
  '--xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true'
)
_OVERLAP = (
  f'{_DATA_PARALLEL} --xla_tpu_enable_async_collective_fusion=true '
  '--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true '
  '--xla_tpu_enable_async_collective_fusion_multiple_steps=true'
)
FLAGS = {
  'v5e': _OVERLAP,
  'v5p': '--xla_tpu_megacore_fusion_allow_ags=false --xla_enable_async_collective_permute=true '
  f'--xla_tpu_enable_ag_backward_pipelining=true {_DATA_PARALLEL}',
  'v6e': f'--xla_tpu_scoped_vmem_limit_kib=98304 {_DATA_PARALLEL}',
}


@dataclasses.dataclass(frozen=True)
class Case:
  """A training step of both.

  Attributes:
    preset: of ours. model: of MaxText.
    topology: as MaxText names it; cores on v5p.
    rows: sequences per chip.
    more: settings of MaxText.
  """

  name: str
  preset: str
  model: str
  topology: str
  rows: int
  length: int
  remat: str = 'full'
  more: tuple[str, ...] = ()


CASES = [
  Case('Llama 2 7B', 'llama2-7b', 'llama2-7b', 'v5e-64', 2, 4096),
  Case('Llama 3.1 8B', 'llama3.1-8b', 'llama3.1-8b', 'v6e-16', 3, 8192),
  Case('Llama 2 70B', 'llama2-70b', 'llama2-70b', 'v5p-256', 4, 4096),
  Case(
    'Mixtral 8x7B',
    'mixtral-8x7b',
    'mixtral-8x7b',
    'v5p-256',
    4,
    4096,
    more=('megablox=true', 'sparse_matmul=true'),
  ),
]


def compile_ours(case: Case) -> Any:
  import jaxformer
  from jaxformer.training.step import lowered_train_step

  target = parse_target(case.topology)
  overrides = {
    'data.sequence_length': case.length,
    'data.packing': 'stream',  # documents have no borders, as in MaxText's synthetic data
    'training.batch_size': case.rows * target.total_chips,
    'training.accumulate': 1,
    'training.remat': case.remat,
  }
  e = jaxformer.experiment(case.preset, overrides=overrides)
  e = e.replace(mesh=MeshConfig(data=1, fsdp=-1))
  return lowered_train_step(e, topology_mesh(str(target.topology), e.mesh)).compile()


def compile_maxtext(case: Case) -> Any:
  os.environ['DECOUPLE_GCLOUD'] = 'TRUE'
  from maxtext.trainers.pre_train import train_compile

  kept, inner = [], train_compile.jit_and_compile

  class Done(Exception):
    pass

  def keep(*args: Any, **more: Any) -> Any:
    kept.append(inner(*args, **more))
    raise Done

  train_compile.jit_and_compile = keep
  base = Path(train_compile.__file__).parents[2] / 'configs' / 'base.yml'
  settings = {
    'run_name': 'x',
    'base_output_directory': 'x',
    'compile_topology': case.topology,
    'compile_topology_num_slices': 1,
    'model_name': case.model,
    'per_device_batch_size': case.rows,
    'max_target_length': case.length,
    'remat_policy': case.remat,
    'ici_fsdp_parallelism': -1,
    'enable_checkpointing': False,
    'use_iota_embed': True,
    'reuse_example_batch': 1,
    'dataset_type': 'synthetic',
    'attention': 'flash',
    'hardware': 'tpu',
  }
  with contextlib.suppress(Done):
    train_compile.main(['', str(base), *(f'{k}={v}' for k, v in settings.items()), *case.more])
  return kept[0]


def compile_one(who: str, case: Case, text: Path) -> None:
  """Compile a program and write its text, with its memory and the time of compilation beside it."""
  began = time.perf_counter()
  compiled = {'ours': compile_ours, 'maxtext': compile_maxtext}[who](case)
  memory = compiled.memory_analysis()
  text.write_text(compiled.as_text())
  text.with_suffix('.json').write_text(
    json.dumps(
      {
        'compile_seconds': time.perf_counter() - began,
        'gib': (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
      }
    )
  )


def measured(who: str, case: Case, folder: Path) -> dict[str, Any]:
  """The predicted seconds of a step by kind, with its memory."""
  target = parse_target(case.topology)
  text = folder / f'{who} {case.name}.txt'
  if not text.exists():
    flags = FLAGS[target.chip.name] if who == 'maxtext' else ''
    env = os.environ | {'TPU_SKIP_MDS_QUERY': '1', 'TPU_MIN_LOG_LEVEL': '3'}
    env |= {'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'LIBTPU_INIT_ARGS': flags}
    command = [sys.executable, __file__, '--one', who, '--folder', str(folder), case.name]
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
  mesh = topology_mesh(str(target.topology), MeshConfig(data=1, fsdp=-1))
  rows = time_program(text.read_text(), mesh, CHIPS[target.chip.name])
  kinds: Counter[str] = Counter()
  for row in rows:
    kinds[row.kind] += row.seconds
  return {
    'seconds': kinds.total(),
    'kinds': dict(kinds),
    **json.loads(text.with_suffix('.json').read_text()),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('names', nargs='*', help='parts of names; all without')
  parser.add_argument('--folder', type=Path, default=Path('against_maxtext'), help='of programs')
  parser.add_argument('--one', choices=('ours', 'maxtext'), help='compile one program only')
  given = parser.parse_args()
  given.folder.mkdir(parents=True, exist_ok=True)
  chosen = [c for c in CASES if not given.names or any(n in c.name for n in given.names)]
  if given.one:
    compile_one(given.one, chosen[0], given.folder / f'{given.one} {chosen[0].name}.txt')
    return
  for case in chosen:
    ours, theirs = (measured(who, case, given.folder) for who in ('ours', 'maxtext'))
    print(f'{case.name}, {case.topology}, {case.rows} x {case.length} per chip, {case.remat}')
    for who, found in (('jaxformer', ours), ('MaxText', theirs)):
      kinds = ', '.join(f'{k} {1e3 * v:,.0f}' for k, v in sorted(found['kinds'].items()))
      print(
        f'  {who:9} {1e3 * found["seconds"]:8,.0f} ms ({kinds}), {found["gib"]:.1f} GiB, '
        f'compiled in {found["compile_seconds"]:.0f} s'
      )
    print(f'  ratio     {ours["seconds"] / theirs["seconds"]:8.3f}', flush=True)


if __name__ == '__main__':
  main()
