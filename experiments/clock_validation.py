"""Predicted step times beside published ones.

Question: how well does the clock of `planning.step_clock` foresee the steps of trainings whose
speed has been published?

    pip install -e '.[tpu]'
    python experiments/clock_validation.py            # the missing rows
    python experiments/clock_validation.py NAME ...   # rows with one of these words in their names

Needs no TPU. Each row compiles a training step of ours with the shape, batch, slice and sharding
of a published one, and compares the predicted with the published time. The published runs are
those of MaxText: the READMEs of its `configs/tpu/v5e` and `configs/tpu/v5p` (TFLOP per second and
chip, with attention counted in full) and `docs/reference/models/tiering.md` (tokens per second and
chip), with the batch, sequence length and remat policy of the scripts beside them and of
`benchmarks/maxtext_trillium_model_configs.py`. Programs are compiled with the option of those
recipes that changes most: on a v6e 96 MiB of on-chip memory per fusion, elsewhere the default of 16
MiB, which our own table raises. What differs is said in `differs`.

Rows are recorded in `clock_validation.json`, from which `clock_validation.md` is written.

Cost: one to ten minutes of two CPU cores per row.
Result: `clock_validation.md`."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import statistics
import sys
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from jaxformer.data import Text
from jaxformer.hardware import GIB
from jaxformer.layers.attention import Attention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Rotary
from jaxformer.models.model import ModelConfig
from jaxformer.models.zoo import PRESETS
from jaxformer.models.zoo.preset import pre_norm_model
from jaxformer.planning.compiler import compile_plan, topology_mesh
from jaxformer.planning.cost import cost
from jaxformer.planning.target import parse_target
from jaxformer.sharding import MeshConfig
from jaxformer.training.experiment import Experiment, TrainingConfig
from jaxformer.training.step import lowered_train_step

FOLDER = pathlib.Path(__file__).parent
FSDP = MeshConfig(data=1, fsdp=-1)
OPTIONS = {'v5e': 16384, 'v5p': 16384, 'v6e': 98304}  # KiB of on-chip memory of a fusion
# Their residual stream is sharded too. Ours is not, and does not fit.
TENSOR = 'they have tensor parallelism of'
OFFLOAD = 'they keep projections in host memory, ours are computed again'


def tensor(size: int) -> MeshConfig:
  """Tensor parallelism of a size, FSDP over the rest."""
  return MeshConfig(data=1, fsdp=-1, tensor=size)


def maxtext(width: int, layers: int, hidden: int, heads: int) -> ModelConfig:
  """The dense models that MaxText scales by `global_parameter_scale`."""
  attention = Attention.Config(heads=heads, kv_heads=heads, head_dim=128, position=Rotary())
  block = attention, GatedMlp.Config(hidden=hidden)
  return pre_norm_model(width, layers, block, norm=RMSNorm(), vocab_size=32000, context_length=2048)


@dataclasses.dataclass(frozen=True)
class Point:
  """A published training step.

  Attributes:
    name: of the model, with its chip.
    rows: sequences per chip.
    teraflops: per second and chip, all scores of attention counted; or
    tokens: per second and chip.
    differs: in what the program here is another one.
  """

  name: str
  model: ModelConfig
  target: str
  rows: int
  length: int
  remat: str
  teraflops: float = 0.0
  tokens: float = 0.0
  mesh: MeshConfig = FSDP
  differs: str = ''

  @property
  def seconds(self) -> float:
    """The published time of a step."""
    if self.tokens:
      return self.rows * self.length / self.tokens
    per_token = cost(self.model, self.length).train_flops_per_token_full
    return self.rows * self.length * per_token / (1e12 * self.teraflops)


def published(name: str) -> ModelConfig:
  return PRESETS[name].model


B16, B32 = maxtext(4096, 32, 28672, 64), maxtext(8192, 32, 28672, 64)
B64, B128 = maxtext(8192, 64, 28672, 64), maxtext(8192, 64, 57344, 128)
B1024 = maxtext(16384, 128, 114688, 256)
POINTS = [
  Point('16B v5e', B16, 'v5e-256', 6, 2048, 'full', teraflops=120),
  Point('32B v5e', B32, 'v5e-256', 4, 2048, 'full', teraflops=132),
  Point('64B v5e', B64, 'v5e-256', 2, 2048, 'full', teraflops=118),
  Point(
    '128B v5e',
    B128,
    'v5e-256',
    1,
    2048,
    'full',
    teraflops=110,
    differs=f'{TENSOR} 16, and {OFFLOAD}',
  ),
  Point(
    '32B v5p',
    B32,
    'v5p-128',
    6,
    2048,
    'names',
    teraflops=328,
    differs=f'{TENSOR} 4, and keep products, which are computed again in ours',
  ),
  Point('128B v5p', B128, 'v5p-256', 1, 2048, 'dots', teraflops=315, mesh=tensor(8)),
  Point('1024B v5p', B1024, 'v5p-2048', 2, 2048, 'full', teraflops=254, mesh=tensor(16)),
  Point(
    'Llama 2 70B v5p',
    published('llama2-70b'),
    'v5p-1024',
    4,
    4096,
    'attention',
    tokens=692,
    differs='they keep the projections of attention, ours are computed again',
  ),
  Point(
    'Llama 3.1 8B v6e',
    published('llama3.1-8b'),
    'v6e-256',
    4,
    8192,
    'full',
    tokens=7207,
    differs=OFFLOAD,
  ),
  Point(
    'Llama 3.1 70B v6e',
    published('llama3.1-70b'),
    'v6e-256',
    2,
    8192,
    'full',
    tokens=960,
    differs=OFFLOAD,
  ),
  Point(
    'Llama 3.1 405B v6e',
    published('llama3.1-405b'),
    'v6e-256',
    1,
    8192,
    'full',
    tokens=123,
    mesh=tensor(4),
    differs=OFFLOAD,
  ),
  Point('Mixtral 8x7B v6e', published('mixtral-8x7b'), 'v6e-256', 12, 4096, 'full', tokens=3899),
  Point('Mixtral 8x7B v5p', published('mixtral-8x7b'), 'v5p-256', 12, 4096, 'full', tokens=2909),
]


def compiled(point: Point) -> dict[str, Any]:
  """The row of a point: predicted and published seconds, and where the predicted ones go."""
  target = parse_target(point.target)
  batch = point.rows * target.total_chips
  experiment = Experiment(
    model=point.model,
    data=Text(sequence_length=point.length, packing='stream'),  # documents have no borders
    training=TrainingConfig(
      steps=1000,
      batch_size=batch,
      remat=point.remat,
      compiler_options=(f'xla_tpu_scoped_vmem_limit_kib={OPTIONS[target.chip.name]}',),
    ),
    mesh=point.mesh,
  )
  mesh = topology_mesh(str(target.topology), experiment.mesh)
  found = compile_plan(
    lambda: lowered_train_step(experiment, mesh),
    mesh,
    target.device_memory_bytes,
    target.chip,
    ('Attention', 'GatedMlp', 'Moe'),
  )
  row: dict[str, Any] = {
    'published_seconds': point.seconds,
    'gib': found.total / GIB,
    'compile_seconds': found.compile_seconds,
    'jax': found.jax,
    'libtpu': found.libtpu,
  }
  if (profile := found.profile) is None:
    return row | {'predicted_seconds': None}
  full = cost(point.model, point.length).train_flops_per_token_full * point.rows * point.length
  return row | {
    'predicted_seconds': profile.seconds,
    'mfu_full': full / profile.seconds / target.chip.peak(),
    'by_kind': profile.by_kind,
  }


def cells(point: Point, row: dict[str, Any]) -> list[str]:
  """A row of the table."""
  mesh = ' x '.join(f'{axis} {size}' for axis, size in point.mesh.given.items() if abs(size) > 1)
  shape = f'{point.rows} x {point.length:,}', point.remat
  published, predicted = row['published_seconds'], row['predicted_seconds']
  if predicted is None:
    return [point.name, point.target, mesh, *shape, f'{published:.3f}', '', '', '', point.differs]
  shares = ', '.join(f'{kind} {100 * s / predicted:.0f}' for kind, s in row['by_kind'].items())
  error = f'{100 * (predicted / published - 1):+.1f}'
  return [
    point.name,
    point.target,
    mesh,
    *shape,
    f'{published:.3f}',
    f'{predicted:.3f}',
    error,
    shares,
    point.differs,
  ]


def save(rows: dict[str, dict[str, Any]]) -> None:
  (FOLDER / 'clock_validation.json').write_text(json.dumps(rows, indent=1) + '\n')
  head = (
    'model',
    'slice',
    'mesh',
    'tokens per chip',
    'remat',
    'published, s',
    'predicted, s',
    'error, %',
    'where the time goes, %',
    'differs',
  )
  lines = ['# Predicted beside published steps', '']
  lines += ['Made by `python experiments/clock_validation.py`; see there.', '']
  lines += [f'| {" | ".join(head)} |', '|' + ' --- |' * len(head)]
  known = [(p, rows[p.name]) for p in POINTS if p.name in rows]
  lines += [f'| {" | ".join(cells(point, row))} |' for point, row in known]
  ratios = [r['predicted_seconds'] / r['published_seconds'] for _, r in known if 'by_kind' in r]
  if ratios:
    off = statistics.median(abs(r - 1) for r in ratios)
    lines += ['', f'Median error {100 * off:.1f} % of {len(ratios)} points.']
  versions = {(r['jax'], r['libtpu']) for _, r in known}
  lines += ['', *(f'jax {jax}, libtpu {libtpu}.' for jax, libtpu in sorted(versions))]
  (FOLDER / 'clock_validation.md').write_text('\n'.join(lines) + '\n')


def main(words: list[str]) -> None:
  path = FOLDER / 'clock_validation.json'
  rows = json.loads(path.read_text()) if path.exists() else {}
  for point in POINTS:
    if any(w in point.name for w in words) if words else point.name not in rows:
      rows[point.name] = compiled(point)
      save(rows)
      print(' | '.join(cells(point, rows[point.name])), flush=True)


if __name__ == '__main__':
  main(sys.argv[1:])
