"""What a mixture of experts costs on a CPU beside the dense layer that does as much.

Question: how much longer does a layer of eight SwiGLU experts, two a token, take forward and
  backward than a dense SwiGLU layer of
twice an expert's hidden units, which multiplies every token with as many weights? At 1 the router,
the sorting and the uneven loads would be free.

    python experiments/moe_cpu_cost.py [--tokens 4096] [--repeats 9]

Width 512, 1,024 hidden units an expert, fp32, two threads, 8 sequences. All forms live in one
process and take turns, so that what else the machine does falls on all; the ratio is the median
over the rounds of that of the two neighbours.

Cost: a minute or two on two CPU cores.
Result:

    4096 tokens, forward and backward, 9 rounds
    layer              active  median ms  least ms  ratio  range of ratios
    dense           3,145,728        868       841   1.00  1.00 to 1.00
    dropless        3,149,824       1013       998   1.18  1.05 to 1.24
    capacity 1.25   3,149,824       1158      1090   1.29  1.06 to 1.41

(jax 0.10.2, two cores that did other work too.) Tiles of 64 to 512 rows are within a tenth of each
other; those of 128 were taken."""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp

from jaxformer.layers.layer import Context, LayerConfig
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.router import TopKSoftmax
from jaxformer.models.params import define
from jaxformer.testing.case import Alone
from jaxformer.training.malloc import keep_freed_memory

WIDTH, HIDDEN, EXPERTS, K, SEQUENCES = 512, 1024, 8, 2, 8

EXPERT = GatedMlp.Config(hidden=HIDDEN)
ROUTED = Moe.Config(experts=EXPERTS, expert=EXPERT, router=TopKSoftmax(k=K, balance=0.01))
LAYERS = {
  'dense': GatedMlp.Config(hidden=K * HIDDEN),
  'dropless': ROUTED,
  'capacity 1.25': ROUTED.replace(capacity_factor=1.25),
}


def step(layer: LayerConfig, tokens: int):
  """A function that computes a layer's output and all its gradients."""
  definition = define(Alone(layer=layer, width=WIDTH))
  params = definition.init(jax.random.key(0))
  x = jax.random.normal(jax.random.key(1), (SEQUENCES, tokens // SEQUENCES, WIDTH))

  @jax.jit
  def run(params, x):
    def loss(params, x):
      out = definition.merge(params)(x, Context())
      return jnp.sum(jnp.sin(out.y)) + sum(v for n, v in out.aux.items() if n.startswith('loss/'))

    return jax.grad(loss, argnums=(0, 1))(params, x)

  jax.block_until_ready(run(params, x))
  return lambda: jax.block_until_ready(run(params, x))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--tokens', type=int, default=4096)
  parser.add_argument('--repeats', type=int, default=9)
  args = parser.parse_args()
  keep_freed_memory()
  steps = {name: step(layer, args.tokens) for name, layer in LAYERS.items()}
  seconds: dict[str, list[float]] = {name: [] for name in steps}
  for _ in range(args.repeats):
    for name, run in steps.items():
      began = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - began)
  print(f'{args.tokens} tokens, forward and backward, {args.repeats} rounds')
  print(
    f'{"layer":14} {"active":>10} {"median ms":>10} {"least ms":>9} {"ratio":>6}  range of ratios'
  )
  for name, layer in LAYERS.items():
    ratios = [a / b for a, b in zip(seconds[name], seconds['dense'], strict=True)]
    print(
      f'{name:14} {define(Alone(layer=layer, width=WIDTH)).active_size:>10,} '
      f'{statistics.median(seconds[name]) * 1e3:>10.0f} '
      f'{min(seconds[name]) * 1e3:>9.0f} {statistics.median(ratios):>6.2f}  {min(ratios):.2f} to '
      f'{max(ratios):.2f}'
    )


if __name__ == '__main__':
  main()
