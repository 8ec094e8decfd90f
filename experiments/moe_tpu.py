"""Mixtral and Jamba on TPU slices, by the TPU compiler.

Question: does a training step of a published mixture of experts fit on a slice, are its FLOPs those
of the active experts, and how do tokens travel?

    pip install -e '.[tpu]'
    python experiments/moe_tpu.py [NAME ...]

Needs no TPU. As in `experiments/tpu_fit.py`: AdamW, fp32 parameters, bf16 products, full remat,
compiled for a slice from shapes alone. `arguments` are parameters and optimizer state,
`temporaries` everything else, in GiB per chip. FLOPs are the compiler's count for a model of one
period over that of `planning.cost`, which counts three passes where remat makes four of a layer;
the compiler counts the kernels' rows whether a capacity slot is filled or empty, and the body of a
loop once. Collectives are GiB of their results per chip and step; the iterations of a dropless
layer count once, as many as a balanced router needs.

Cost: five to fifteen minutes per row on two CPU cores under other load.
Result: with jax 0.10.2 and libtpu 0.0.42.1:

    preset       slice      mesh             batch       arguments temporaries compile s  FLOPs
    mixtral-8x7b v5p:2x2x4  fsdp 2 expert 8  16 x 4096       40.47       20.80       187   1.23
    mixtral-8x7b v5p:2x4x4  fsdp 4 expert 8  32 x 4096       20.24       14.15       272   1.23
    jamba-v0.1   v5p:2x4x4  fsdp 4 expert 8  32 x 4096       34.93       36.07       473      -

and their collectives, in the same order:

    all-gather 26.71, all-reduce 8.62, all-to-all 15.00, permute 0.02, reduce-scatter 3.15
    all-gather 26.71, all-reduce 7.93, all-to-all 15.00, permute 0.02, reduce-scatter 1.57
    all-gather 43.63, all-reduce 3.58, all-to-all 9.41, permute 0.14, reduce-scatter 5.49

All fit the 95 GB of a v5p chip; Jamba's FLOPs were not counted. The all-gathers of Mixtral are,
over fsdp and in bf16, attention and the one expert of each layer that a chip has, once forward and
once backward (26.0 GiB): the weights of all experts are never gathered. Everything except the
experts is sharded over fsdp alone, which is half of what a chip of Jamba holds.
"""

from __future__ import annotations

import sys

from tpu_fit import Case, compiled, row

from jaxformer.models.zoo import PRESETS
from jaxformer.planning.compiler import topology_mesh
from jaxformer.planning.cost import flops_per_token
from jaxformer.sharding import MeshConfig

CASES = (
  Case('mixtral-8x7b', 'v5p:2x2x4', MeshConfig(data=1, fsdp=2, expert=8), 16, 4096),
  Case('mixtral-8x7b', 'v5p:2x4x4', MeshConfig(data=1, fsdp=4, expert=8), 32, 4096),
  Case('jamba-v0.1', 'v5p:2x4x4', MeshConfig(data=1, fsdp=4, expert=8), 32, 4096),
)


def flops(case: Case) -> str:
  """The compiler's FLOPs of one period over those of the formula."""
  model = PRESETS[case.preset].model
  short = model.replace(stack=tuple(g.replace(repeats=1) for g in model.stack))
  mine = (
    flops_per_token(short, case.length)
    * case.batch
    * case.length
    / topology_mesh(case.topology, case.mesh).size
  )
  return f' {compiled(case, short).cost_analysis()["flops"] / mine:6.2f}'


def main(names: list[str]) -> None:
  figures = 'arguments temporaries compile s  FLOPs  collectives'
  print(f'{"preset":12} {"slice":10} {"mesh":16} {"batch":11} {"remat":6} {figures}')
  for case in CASES:
    if not names or case.preset in names:
      print(row(case, flops), flush=True)


if __name__ == '__main__':
  main(sys.argv[1:])
