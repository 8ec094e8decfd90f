"""The same Llama trained here and in transformers on PyTorch, side by side on a CPU.

Question: how many tokens per second does a training step take here, against the implementation that
  most people use?

    pip install -e '.[parity]'
    python experiments/llama_vs_transformers.py [--repeats 7] [--seconds 6] [--torch-compile]
      [--json]

Both train a Llama of width 256, 4 layers, 4 heads, hidden 1,024, vocabulary 8,192, untied (8.4M
parameters; the two counts are asserted equal), batch 4 x 256, fp32, 2 threads, AdamW with weight
decay and clipping of gradients at norm 1, on the same random tokens. Each stack lives in a process
of its own. They take turns (A B A B ...), each turn running steps for the given seconds while the
other process sleeps, so that what else the machine does falls on both; the figure is the median of
the ratios of neighbouring turns. PyTorch runs as its users tune it for a CPU: fused AdamW,
scaled-dot-product attention; with --torch-compile also compiled.

Result (jax 0.10.2, torch 2.13.0, transformers 5.23.0, two cores of an AMD EPYC with AVX-512,
nothing else running, 5 turns of 5 seconds): 1.26 by the median (1.22 to 1.39). On busy cores the
ratio is larger, on another machine, where PyTorch's products ran a fifth faster than XLA's, an
earlier version had 1.01.

Three quarters of our step are now matrix products at the speed of the machine, so what counts is
how they are put. What was done: plain 2-D products; the transposed factor of a weight's gradient
written out first (XLA:CPU's product with a transposed left side loses a fifth to a third); the
loss's gradient formed in the forward pass, from the exponentials that are there, with the softmax's
row factors moved to the narrow sides of the products; causal attention in static slices; stacked
layers run as a loop; no collective on a mesh of one device; donated state; freed memory kept by the
process (a tenth of the step went to page faults). What was tried without gain: joined
query/key/value and gate products, separate instead of stacked parameters, XLA's CPU flags for
schedulers and matrix libraries.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from multiprocessing.connection import Connection

WIDTH, LAYERS, HEADS, HIDDEN, VOCABULARY = 256, 4, 4, 1024, 8192
BATCH, LENGTH, THREADS = 4, 256, 2
LEARNING_RATE, WEIGHT_DECAY, CLIP = 3e-4, 0.1, 1.0


def serve(connection: Connection, step, params: int) -> None:
  """Runs steps for so many seconds whenever asked; answers with tokens per second and the loss.

  The loss is read one step late, as in training, so no stack runs further ahead than that.
  """
  for _ in range(3):
    loss = float(step())
  connection.send(params)
  while (seconds := connection.recv()) is not None:
    steps, start, pending = 0, time.perf_counter(), None
    while time.perf_counter() - start < seconds:
      pending, before = step(), pending
      loss = loss if before is None else float(before)
      steps += 1
    loss = float(pending)  # waits for what is still running
    connection.send((steps * BATCH * LENGTH / (time.perf_counter() - start), loss))


def ours(connection: Connection) -> None:
  os.environ |= {'JAX_PLATFORMS': 'cpu', 'OMP_NUM_THREADS': str(THREADS)}
  flags = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = (
    f'{flags} --xla_cpu_multi_thread_eigen=true intra_op_parallelism_threads={THREADS}'
  )
  import jax
  import numpy as np

  from jaxformer.data import Batch
  from jaxformer.models.params import define
  from jaxformer.models.zoo.llama import LLAMA3, llama
  from jaxformer.sharding import MeshConfig, make_parallel, use_mesh
  from jaxformer.training.experiment import TrainingConfig
  from jaxformer.training.malloc import keep_freed_memory
  from jaxformer.training.optimizer import AdamW, Optimizer
  from jaxformer.training.schedule import Constant
  from jaxformer.training.step import compiled_train_step, init_state

  keep_freed_memory()  # as `train` does on a CPU
  definition = define(
    llama(
      WIDTH,
      LAYERS,
      HIDDEN,
      HEADS,
      HEADS,
      vocab_size=VOCABULARY,
      context_length=LENGTH,
      rotary=LLAMA3,
    )
  )
  adamw = AdamW(learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, clip=CLIP)
  optimizer = Optimizer(adamw, Constant(warmup=0), 1_000_000, definition.info)
  parallel = make_parallel(MeshConfig(), jax.devices()[:1])
  tokens = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, LENGTH + 1)).astype(np.int32)
  with use_mesh(parallel):
    state = init_state(definition, optimizer, 0, parallel)
    run = compiled_train_step(definition, optimizer, TrainingConfig(dtype='float32'), parallel)
    batch = jax.device_put(Batch(tokens[:, :-1], tokens[:, 1:], None))

    def step():
      nonlocal state
      state, metrics = run(state, batch)
      return metrics['train/loss']

    serve(connection, step, definition.size)


def theirs(connection: Connection, compiled: bool) -> None:
  os.environ['OMP_NUM_THREADS'] = str(THREADS)
  import numpy as np
  import torch
  import transformers

  torch.set_num_threads(THREADS)
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=VOCABULARY,
      hidden_size=WIDTH,
      num_hidden_layers=LAYERS,
      num_attention_heads=HEADS,
      intermediate_size=HIDDEN,
      max_position_embeddings=LENGTH,
      tie_word_embeddings=False,
      use_cache=False,
      attn_implementation='sdpa',
    )
  )
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
  )
  tokens = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, LENGTH + 1)))
  forward = torch.compile(model) if compiled else model

  def step():
    logits = forward(input_ids=tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(
      logits.reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1)
    )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    return loss.detach()

  serve(connection, step, sum(p.numel() for p in model.parameters()))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--seconds', type=float, default=6.0)
  parser.add_argument('--torch-compile', action='store_true')
  parser.add_argument('--json', action='store_true')
  args = parser.parse_args()
  context = multiprocessing.get_context('spawn')
  stacks = {'jaxformer': (ours, ()), 'transformers': (theirs, (False,))}
  if args.torch_compile:
    stacks['transformers, compiled'] = (theirs, (True,))
  pipes, params = {}, {}
  for name, (target, extra) in stacks.items():
    pipes[name], child = context.Pipe()
    context.Process(target=target, args=(child, *extra), daemon=True).start()
    params[name] = pipes[name].recv()
  assert len(set(params.values())) == 1, f'not the same model: {params}'
  speeds: dict[str, list[float]] = {name: [] for name in stacks}
  for i in range(args.repeats):
    for name, pipe in pipes.items():
      pipe.send(args.seconds)
      speed, loss = pipe.recv()
      speeds[name].append(speed)
      print(
        f'turn {i + 1}: {name} {speed:,.0f} tokens per second, loss {loss:.3f}',
        file=sys.stderr,
        flush=True,
      )
  for pipe in pipes.values():
    pipe.send(None)
  ratios = {
    name: [a / b for a, b in zip(speeds['jaxformer'], speeds[name], strict=True)]
    for name in stacks
    if name != 'jaxformer'
  }
  result = {
    'params': params['jaxformer'],
    'median_tokens_per_second': {name: statistics.median(s) for name, s in speeds.items()},
    'ratio': {
      name: {'median': statistics.median(r), 'min': min(r), 'max': max(r)}
      for name, r in ratios.items()
    },
  }
  if args.json:
    print(json.dumps(result))
    return
  print(f'{result["params"]:,} parameters each')
  for name, r in result['ratio'].items():
    print(
      f'jaxformer / {name}: {r["median"]:.2f} by the median of {args.repeats} turns (from '
      f'{r["min"]:.2f} to {r["max"]:.2f})'
    )


if __name__ == '__main__':
  main()
