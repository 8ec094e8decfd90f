"""Share of the peak that a block of a Pallas kernel reaches, from its scheduled instructions.

Question: how fast is a kernel whose cycles the TPU compiler does not estimate?

    pip install -e '.[tpu]'
    python experiments/kernel_bundles.py v5e:2x2

Needs no TPU. The compiler is asked to write the scheduled instructions of every kernel (bundles,
one per cycle) to a folder: `--xla_jf_dump_to` and `--xla_jf_dump_llo_text` in LIBTPU_INIT_ARGS,
which libtpu reads once, so that a run is for one chip. A kernel executes its bundles from the
header of the grid loop to the end once per block. The share is the FLOPs of a block over what the
matrix units could do in so many cycles. It leaves out waits for memory, and those for a matrix
unit that is busy longer than the instructions take to issue: shares above 0.9 are not to be
believed.

Result, jax 0.10.2 and libtpu 0.0.42.1, causal splash attention, blocks of 1,024 x 1,024, heads of
128 (bundles and share per block):

    chip  forward        backward, all gradients in one kernel
    v5e   5,861  0.70    9,747  1.05
    v5p   5,960  0.69    9,717  1.05
    v6e   4,281  0.24    6,295  0.41

The matrix unit of v6e is 256 x 256, of which heads of 128 fill a half."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

BLOCK, HEAD, LENGTH, HEADS = 1024, 128, 4096, 2
PRODUCTS = {'splash_mha_fwd': 2, 'splash_mha_dkv': 5}


def compile_attention(topology: str, folder: Path) -> None:
  """Compile attention, forward and backward, with its bundles written to a folder."""
  os.environ['LIBTPU_INIT_ARGS'] = f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true'
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  import jax
  import jax.numpy as jnp

  from jaxformer.ops.attention_kernels import attention_splash
  from jaxformer.ops.masks import Mask
  from jaxformer.planning.compiler import topology_mesh
  from jaxformer.sharding import MeshConfig, Parallel, use_mesh

  mesh = topology_mesh(topology, MeshConfig(data=1))
  parallel = Parallel(mesh, 'fsdp')

  def loss(q, k, v, segments):
    y = attention_splash(q, k, v, Mask(segments_BT=segments), scale=1.0)
    return y.astype(jnp.float32).sum()

  def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=parallel.replicated)

  heads = shape(1, LENGTH, HEADS, HEAD)
  with use_mesh(parallel):
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(
      heads, heads, heads, shape(1, LENGTH, dtype=jnp.int32)
    )
    traced.lower(lowering_platforms=('tpu',)).compile()


def bundles(file: Path) -> int:
  """Bundles per block: those after the grid loop's check whether a block is masked."""
  lines = [line for line in file.read_text().splitlines() if re.match(r'\s*0x[0-9a-f]+ ', line)]
  marks = [i for i, line in enumerate(lines) if re.match(r'\s*0x[0-9a-f]+ +(LB|PF):', line)]
  inside = [m for m in marks if len(lines) - m > len(lines) / 2]
  return len(lines) - max(inside, default=0)


def main(topology: str) -> None:
  from jaxformer.planning.hardware import CHIPS

  chip = CHIPS[topology.partition(':')[0]]
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    compile_attention(topology, folder)
    for kernel, products in PRODUCTS.items():
      [file] = [f for f in folder.glob(f'*{kernel}*-final_bundles.txt') if 'schedule' not in f.name]
      count = bundles(file)
      flops = products * 2.0 * BLOCK * BLOCK * HEAD
      # Of the chips with two TensorCores each takes blocks of its own.
      peak = chip.peak() / (chip.cores if chip.devices == 1 else chip.cores // chip.devices)
      share = flops / (count / (chip.clock_hz or 1)) / peak
      print(f'{chip.name} {kernel}: {count:,} bundles per block, share of the peak {share:.2f}')


if __name__ == '__main__':
  main(*sys.argv[1:])
