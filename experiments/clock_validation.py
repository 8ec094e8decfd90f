"""Predicted step times beside published ones.

Question: how well does the clock of `planning.step_clock` foresee the steps of trainings whose
speed has been published?

    pip install -e '.[tpu]'
    python experiments/clock_validation.py [NAME ...]

Needs no TPU. Each row compiles a training step of ours with the shape, batch, slice and sharding
of a published one, and compares the predicted with the published time. The published runs are
those of MaxText: the READMEs of its `configs/tpu/v5e` and `configs/tpu/v5p` (TFLOP per second and
chip, with attention counted in full) and `docs/reference/models/tiering.md` (tokens per second and
chip), with the batch, sequence length and remat policy of the scripts beside them and of
`benchmarks/maxtext_trillium_model_configs.py`. Programs are compiled with the option of those
recipes that changes most: on a v6e 96 MiB of on-chip memory per fusion, elsewhere the default of 16
MiB, which our own table raises. What differs is said in `differs`.

Result: not run to the end yet. 16B on a v5e-256, compiled by libtpu 0.0.42.1 with 24 MiB, where the
published run had 16: 9.339 s predicted, 10.306 published (-9.4 %)."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from jaxformer.data import Text
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

FSDP = MeshConfig(data=1, fsdp=-1)
OPTIONS = {'v5e': 16384, 'v5p': 16384, 'v6e': 98304}  # KiB of on-chip memory of a fusion
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
    '128B v5e', B128, 'v5e-256', 1, 2048, 'full', teraflops=110, mesh=tensor(16), differs=OFFLOAD
  ),
  Point('32B v5p', B32, 'v5p-128', 6, 2048, 'dots', teraflops=328, mesh=tensor(4)),
  Point('128B v5p', B128, 'v5p-256', 1, 2048, 'dots', teraflops=315, mesh=tensor(8)),
  Point('1024B v5p', B1024, 'v5p-2048', 2, 2048, 'full', teraflops=254, mesh=tensor(16)),
  Point(
    'Llama 2 70B v5p',
    published('llama2-70b'),
    'v5p-1024',
    4,
    4096,
    'names',
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


def compiled(point: Point) -> dict[str, object]:
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
  began = time.perf_counter()
  found = compile_plan(
    lambda: lowered_train_step(experiment, mesh),
    mesh,
    target.device_memory_bytes,
    target.chip,
    ('Attention', 'GatedMlp', 'Moe'),
  )
  row: dict[str, object] = {
    'name': point.name,
    'target': point.target,
    'published_seconds': point.seconds,
    'differs': point.differs,
    'took': time.perf_counter() - began,
    'gib': found.total / 2**30,
    'jax': found.jax,
    'libtpu': found.libtpu,
  }
  if (profile := found.profile) is None:
    return row | {'predicted_seconds': None}
  full = cost(point.model, point.length).train_flops_per_token_full * point.rows * point.length
  return row | {
    'predicted_seconds': profile.seconds,
    'error': profile.seconds / point.seconds - 1,
    'mfu_full': full / profile.seconds / target.chip.peak(),
    'by_kind': profile.by_kind,
    'by_phase': profile.by_phase,
    'sources': [dataclasses.asdict(s) for s in profile.sources[:30]],
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('names', nargs='*', help='parts of names; all without')
  parser.add_argument('--json', type=Path, help='file that keeps the rows')
  given = parser.parse_args()
  kept = json.loads(given.json.read_text()) if given.json and given.json.exists() else {}
  for point in POINTS:
    if given.names and not any(n.lower() in point.name.lower() for n in given.names):
      continue
    row = kept[point.name] = compiled(point)
    seconds = row['predicted_seconds']
    if seconds is None:
      print(f'{point.name:20} does not fit: {row["gib"]:.1f} GiB', flush=True)
    else:
      print(
        f'{point.name:20} predicted {seconds:7.3f} s, published {point.seconds:7.3f} s, '
        f'{100 * row["error"]:+.1f}%, compiled in {row["took"]:.0f} s; {row["by_kind"]}',
        flush=True,
      )
    if given.json:
      given.json.write_text(json.dumps(kept, indent=1))
  errors = [abs(r['error']) for r in kept.values() if r['predicted_seconds']]
  if errors:
    print(f'median error {100 * statistics.median(errors):.1f}% of {len(errors)} points')


if __name__ == '__main__':
  main()
