"""Predicted time of Pallas kernels on TPUs, of which the compiler estimates no cycles.

A kernel takes its FLOPs at a share of the peak. The FLOPs are those that it declares
(`pl.CostEstimate`); of JAX's splash attention, which declares none, those of the blocks that a
causal mask leaves. The share comes from the scheduled cycles of one block of the kernel
(`experiments/kernel_bundles.py`), and is at most `MOST_SHARE`: a product waits for the matrix unit
where instructions are issued faster than it takes them. Kernels and chips that were
not counted take `OTHER_SHARE`, which is a guess."""

import math
import re
from typing import NamedTuple

from jaxformer.hardware import Chip
from jaxformer.planning.hlo import Instruction
from jaxformer.planning.hlo_flops import declared_flops

MOST_SHARE, OTHER_SHARE = 0.9, 0.4


class KernelTime(NamedTuple):
  """FLOPs of one execution of a kernel, and the seconds that they take; both 0 if they are not
  known."""

  flops: float
  seconds: float


# Part of the name of a kernel, the longer name first -> chip -> share of the peak of one block,
# compiled by libtpu 0.0.42: of splash attention 1,024 x 1,024 positions and 128 dimensions per
# head; of wkv6 and wkv7 heads of 64 in bf16, with all products that the kernel computes; of the
# scan a state of 16, whose work is elementwise; of ssd 32 heads of 64 with a state of 128 in bf16,
# with the products that are needed; of megablox (gmm, tgmm) tiles of `ops.grouped_matmul` in bf16.
SHARES: dict[str, dict[str, float]] = {
  'splash_mha_fwd': {'v5e': 0.64, 'v5p': 0.63, 'v6e': 0.23},
  'splash_mha_dkv': {'v5e': MOST_SHARE, 'v5p': MOST_SHARE, 'v6e': 0.40},
  'splash_mha_dq': {'v5e': MOST_SHARE, 'v5p': MOST_SHARE, 'v6e': 0.36},
  'wkv6_forward': {'v5e': 0.22, 'v5p': 0.21, 'v6e': 0.056},
  'wkv6_backward': {'v5e': 0.27, 'v5p': 0.26, 'v6e': 0.081},
  'wkv7_forward': {'v5e': 0.48, 'v5p': 0.47, 'v6e': 0.114},
  'wkv7_backward': {'v5e': 0.59, 'v5p': 0.59, 'v6e': 0.156},
  'selective_scan_backward': {'v5e': 0.0215, 'v5p': 0.0207, 'v6e': 0.0056},
  'selective_scan': {'v5e': 0.0185, 'v5p': 0.0176, 'v6e': 0.0049},
  'ssd_forward': {'v5e': 0.276, 'v5p': 0.278, 'v6e': 0.053},
  'ssd_backward': {'v5e': 0.243, 'v5p': 0.244, 'v6e': 0.050},
  'tgmm': {'v5e': 0.73, 'v5p': 0.74, 'v6e': 0.45},
  'gmm': {'v5e': MOST_SHARE, 'v5p': MOST_SHARE, 'v6e': 0.69},
}
# Products of splash attention, each of 2 T S K FLOPs per head: scores and outputs; backward by one
# kernel for all gradients the scores, gradients of values, weights, keys and queries; by two, the
# last in the other, which computes scores and gradients of weights again.
_PRODUCTS = {'splash_mha_fwd': 2, 'splash_mha_dkv': 5, 'splash_mha_dq': 3}


def kernel_time(i: Instruction, chip: Chip) -> KernelTime:
  """The FLOPs and the time of the kernel that a `tpu_custom_call` runs, on one device."""
  declared = declared_flops(i)
  flops = _splash_flops(i) if declared is None else declared
  known = next((s for name, s in SHARES.items() if name in i.name), {})
  rate = chip.peak('bf16') / chip.devices * known.get(chip.name, OTHER_SHARE)
  return KernelTime(flops, flops / rate)


def _splash_flops(i: Instruction) -> float:
  """FLOPs of causal splash attention, from the shapes of queries and keys, `[..., T, K]`, and the
  sizes of its blocks; 0 of another kernel."""
  products = next((n for name, n in _PRODUCTS.items() if name in i.name), 0)
  operands = [dims for o in i.operands for dtype, dims in o.arrays if dtype in ('bf16', 'f32')]
  if not products or len(operands) < 2:
    return 0.0
  (*heads, T, K), (*_, S, _) = operands[:2]
  if products == 5 and re.search(r'use_fused_bwd_kernel\\?"?: ?false', i.rest):
    products = 4
  block = re.search(r'block_q\\?"?: ?(\d+)', i.rest)
  blocks = T // int(block.group(1)) if block else T
  return products * 2.0 * math.prod(heads) * T * S * K * (1 + 1 / max(blocks, 1)) / 2
