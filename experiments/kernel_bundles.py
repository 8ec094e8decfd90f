"""Share of the peak that a block of a Pallas kernel reaches, from its scheduled instructions.

Question: how fast is a kernel whose cycles the TPU compiler does not estimate?

    pip install -e '.[tpu]'
    python experiments/kernel_bundles.py v5e:2x2

Needs no TPU. The compiler is asked to write the scheduled instructions of every kernel (bundles,
one per cycle) to a folder: `--xla_jf_dump_to` and `--xla_jf_dump_llo_text` in LIBTPU_INIT_ARGS,
which libtpu reads once, so that a run is for one chip. A kernel executes the bundles of its grid
loop once per block, those of loops inside as often as they run. Bundles without an instruction
count: they are cycles that wait for a result, which the last file that the compiler writes
(`final_bundles`) leaves out. The share is the FLOPs of a block over what the matrix units could do
in so many cycles. It leaves out waits for memory, and those for a matrix unit that is busy longer
than the instructions take to issue: shares above 0.9 are not to be believed.

FLOPs are those that a kernel declares, which are its products with the zeros in them (wkv6, wkv7),
those of pairs of tokens in order and with states (ssd; backward twice as many, where it computes
about three times as many) or its elementwise work (selective_scan); of splash attention, which
declares none, those of a block without a mask; of megablox (gmm, tgmm) those of a whole block.

Result, jax 0.10.2 and libtpu 0.0.42.1 (cycles and share per block):

                             v5e             v5p             v6e
    splash_mha_fwd            6,395 0.639     6,540 0.626     4,435 0.231
    splash_mha_dkv           11,080 0.922    11,252 0.910     6,444 0.397
    splash_mha_dq             6,600 0.929     6,660 0.922     4,318 0.356
    wkv6_forward              4,202 0.220     4,513 0.206     4,170 0.056
    wkv6_backward             8,742 0.267     8,849 0.264     7,202 0.081
    wkv7_forward              9,403 0.475     9,579 0.467     9,856 0.114
    wkv7_backward             6,268 0.591     6,313 0.588     5,933 0.156
    selective_scan_backward   4,447 0.0215    4,627 0.0207    4,267 0.0056
    selective_scan            3,452 0.0185    3,630 0.0176    3,286 0.0049
    ssd_forward               4,690 0.276     4,667 0.278     6,133 0.053
    ssd_backward             10,639 0.243    10,598 0.244    12,869 0.050
    jvp_jit_gmm               9,112 0.897     9,144 0.895     2,979 0.687
    jvp_jit_tgmm              5,599 0.730     5,514 0.742     2,290 0.447

The matrix unit of v6e is 256 x 256, of which heads of 128 fill a half and heads of 64 in pairs a
quarter."""

from __future__ import annotations

import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from jaxformer.ops.grouped_matmul import _TILE, _TILE_OUTER

BLOCK, HEAD, HEADS, LENGTH = 1024, 128, 2, 4096  # of attention


class Kernel(NamedTuple):
  """What of a kernel runs how often, per block.

  Attributes:
    loops: how often each loop inside the grid loop runs, in the order of the file.
    parts: how often the last parts of more than 1,000 bundles that are under a condition run, in
      the order of the file; those before are the block itself, and smaller parts, of the first or
      the last blocks, count as if all ran them.
    products: of splash attention, each of 2 BLOCK^2 HEAD FLOPs; None where FLOPs are declared.
    flops: of a block, of a kernel of JAX's that declares those of all blocks; 0 of any other.
  """

  loops: Sequence[int] = ()
  parts: Sequence[float] = ()
  products: int | None = None
  flops: float = 0


# Cases: name -> the kernels that it runs. Chunks of a block: 4 of wkv6, of which the backward
# kernel recomputes the states of 3; 2 of wkv7 forward, 1 backward. The scan runs 16 groups of 8
# positions, in one of two loops, with and without documents that start; backward it recomputes,
# then goes back. Once for its 8 (backward 16) blocks of channels it spreads maps, or sums their
# gradients. A loop of ssd runs 16 heads, backward 8, of 32.
CASES: dict[str, dict[str, Kernel]] = {
  'attention': {'splash_mha_fwd': Kernel(products=2), 'splash_mha_dkv': Kernel(products=5)},
  'attention, dq apart': {'splash_mha_dq': Kernel(products=3)},
  'wkv6': {'wkv6_forward': Kernel((4,)), 'wkv6_backward': Kernel((3, 4))},
  'wkv7': {'wkv7_forward': Kernel((2,)), 'wkv7_backward': Kernel()},
  'selective_scan': {
    'selective_scan_backward': Kernel((16, 16), (1 / 16, 1 / 16)),
    'selective_scan': Kernel((16, 0), (1 / 8,)),
  },
  'ssd': {'ssd_forward': Kernel((2,)), 'ssd_backward': Kernel((4,))},
  # a block takes one of two ways: through a tile of rows of one group, or of several
  'grouped matmul': {
    '_jvp_jit_gmm': Kernel(parts=(0.5, 0.5), flops=2 * math.prod(_TILE)),
    '_jvp_jit_tgmm': Kernel(flops=2 * math.prod(_TILE_OUTER)),
  },
}


def functions() -> dict[str, tuple[Callable[..., Any], list[tuple[tuple[int, ...], str]]]]:
  """Name of a case -> the function that it differentiates, and shapes and dtypes of its arguments,
  the last of them integers or booleans: of models of 1.5B parameters."""
  import jax.numpy as jnp

  from jaxformer.ops.attention_kernels import attention_splash
  from jaxformer.ops.grouped_matmul import grouped_matmul
  from jaxformer.ops.masks import Mask
  from jaxformer.ops.selective_scan import selective_scan
  from jaxformer.ops.ssd import ssd
  from jaxformer.ops.wkv6 import wkv6
  from jaxformer.ops.wkv7 import wkv7

  B, T, H, K, D, N = 1, 1024, 32, 64, 4096, 16

  def attention(q, k, v, segments):
    return attention_splash(q, k, v, Mask(segments_BT=segments), scale=1.0)

  def heads(*arrays):
    return (x.reshape(B, T, H, K) for x in arrays)

  def rwkv6(r, k, v, w, u, starts):
    return wkv6(*heads(r, k, v, w), u, None, starts)[0]

  def rwkv7(r, w, k, v, a, b, starts):
    return wkv7(*heads(r, w, k, v, a, b), None, starts)[0]

  def scan(u, dt, A, b, c, d, starts):
    return selective_scan(u, dt, A, b, c, d, jnp.zeros((B, D, N)), starts)[0]

  def mamba2(x, dt, A, b, c, d, starts):
    b, c = (a.reshape(B, T, 1, 2 * K) for a in (b, c))
    return ssd(x.reshape(B, T, D // K, K), dt, A, b, c, d, None, starts)[0]

  head, token, channel = (1, LENGTH, HEADS, HEAD), (B, T, H * K), (B, T, D)
  long = (1, 2 * LENGTH, HEADS, HEAD)
  low, full, starts = 'bfloat16', 'float32', ((B, T), 'bool')
  rwkv7_inputs = [(token, dtype) for dtype in (low, full, full, low, full, full)]
  return {
    'attention': (attention, [(head, low)] * 3 + [((1, LENGTH), 'int32')]),
    'attention, dq apart': (attention, [(long, low)] * 3 + [((1, 2 * LENGTH), 'int32')]),
    'wkv6': (rwkv6, [(token, low)] * 3 + [(token, full), ((H, K), full), starts]),
    'wkv7': (rwkv7, [*rwkv7_inputs, starts]),
    'selective_scan': (
      scan,
      [(channel, low)] * 2 + [((D, N), full), *[((B, T, N), low)] * 2, ((D,), full), starts],
    ),
    'grouped matmul': (
      grouped_matmul,
      [((8192, 4096), low), ((8, 4096, 14336), low), ((8,), 'int32')],
    ),
    'ssd': (
      mamba2,
      [(channel, low), ((B, T, D // K), full), ((D // K,), full)]
      + [((B, T, 2 * K), low)] * 2
      + [((D // K,), full), starts],
    ),
  }


def compile_case(name: str, topology: str) -> tuple[str, dict[str, int]]:
  """The text of the compiled gradient of a case, and the blocks of each kernel of this house."""
  import jax
  import jax.numpy as jnp
  from jax.experimental import pallas as pl

  from jaxformer.planning.compiler import topology_mesh
  from jaxformer.sharding import MeshConfig, Parallel, use_mesh

  parallel = Parallel(topology_mesh(topology, MeshConfig(data=1)), 'fsdp')
  f, shapes = functions()[name]
  arguments = [jax.ShapeDtypeStruct(*s, sharding=parallel.replicated) for s in shapes]
  blocks: dict[str, int] = {}
  pallas_call = pl.pallas_call

  def counted(kernel, *args, name=None, grid=(), **options):
    blocks[name] = math.prod(grid)
    return pallas_call(kernel, *args, name=name, grid=grid, **options)

  def value_and_gradients(*x):
    y, pull = jax.vjp(lambda *floats: f(*floats, x[-1]), *x[:-1])
    return y, pull(jnp.ones_like(y))

  if name not in ('attention', 'attention, dq apart', 'grouped matmul'):
    pl.pallas_call = counted
  try:
    with use_mesh(parallel):
      lowered = jax.jit(value_and_gradients).trace(*arguments).lower(lowering_platforms=('tpu',))
      return lowered.compile().as_text(), blocks
  finally:
    pl.pallas_call = pallas_call


def cycles(file: Path, kernel: Kernel) -> float:
  """Cycles of one block: those of the grid loop, and of loops inside as often as they run. Of
  splash attention those after the check whether the block is masked."""
  lines = [line for line in file.read_text().splitlines() if re.match(r'\s*0x[0-9a-f]+ ', line)]
  loops, parts = [], []
  for end, line in enumerate(lines):
    for target in re.findall(r'sbr\.rel [^;}]*target bundleno = (\d+)', line):
      branch = (int(target), end + 1) if int(target) <= end else (end + 1, int(target))
      (loops if int(target) <= end else parts).append(branch)
  start, end = max(loops, key=lambda loop: loop[1] - loop[0])  # the loop over the grid
  if kernel.products is not None:
    marks = [i for i, line in enumerate(lines) if re.match(r'\s*0x[0-9a-f]+ +(LB|PF):', line)]
    return end - max(m for m in marks if end - m > (end - start) / 2)
  times = [1.0] * len(lines)
  inside = sorted(loop for loop in loops if loop != (start, end))
  large = [part for part in parts if part[1] - part[0] > 1000]
  large = large[len(large) - len(kernel.parts) :]
  for ranges, counts in ((inside, kernel.loops), (large, kernel.parts)):
    assert len(ranges) == len(counts), (file.name, ranges, counts)
    for (first, last), count in zip(ranges, counts, strict=True):
      times[first:last] = [n * count for n in times[first:last]]
  return sum(times[start:end])


def main(topology: str, *names: str) -> None:
  with tempfile.TemporaryDirectory() as folder:
    os.environ['LIBTPU_INIT_ARGS'] = f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true'
    from jaxformer.hardware import CHIPS
    from jaxformer.planning.hlo import Program
    from jaxformer.planning.hlo_flops import declared_flops

    chip = CHIPS[topology.partition(':')[0]]
    # Of the chips with two TensorCores each takes blocks of its own.
    peak = chip.peak() / (chip.cores if chip.devices == 1 else chip.cores // chip.devices)
    for case in names or CASES:
      text, blocks = compile_case(case, topology)
      declared = {
        i.name: declared_flops(i)
        for computation in Program(text).computations.values()
        for i in computation.values()
        if i.attribute('custom_call_target') == 'tpu_custom_call'
      }
      for name, kernel in CASES[case].items():
        files = Path(folder).glob(f'*{name}*-packed-bundles-post-ra.txt')
        [file] = [f for f in files if 'schedule' not in f.name and not _other(f.name, name)]
        count = cycles(file, kernel)
        if kernel.flops:
          flops = kernel.flops
        elif kernel.products is None:
          [flops] = [n for i, n in declared.items() if name in i and not _other(i, name)]
          flops = (flops or 0) / blocks[name]
        else:
          flops = kernel.products * 2.0 * BLOCK * BLOCK * HEAD
        share = flops / (count / (chip.clock_hz or 1)) / peak
        print(f'{chip.name} {name}: {count:,.0f} cycles per block, share of the peak {share:.3g}')


def _other(text: str, name: str) -> bool:
  """Whether a text that holds a name is of another kernel, whose name is longer."""
  return any(n in text for case in CASES.values() for n in case if name in n and n != name)


if __name__ == '__main__':
  main(*sys.argv[1:])
