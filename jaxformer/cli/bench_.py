"""Measures training and decoding of a preset or an experiment on this machine, with random weights
and tokens.

Training runs the experiment's own step (batch, sequence length, optimizer, mesh, dtype); decoding
is measured at each --context-length. Figures are medians; on a shared machine compare only what ran in one
invocation."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from jaxformer.cli.common import (
  Overrides,
  amount,
  answer,
  experiment_of,
  join_processes,
  note,
  table,
)
from jaxformer.config import InputError

OVERRIDES = True


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('target', metavar='PRESET|FILE')
  parser.add_argument(
    '--steps', type=int, default=10, help='training steps measured (10); 0 leaves training out'
  )
  parser.add_argument(
    '--context-length',
    type=int,
    action='append',
    help='tokens in the prompt before decoding is measured; may be given several times',
  )
  parser.add_argument(
    '--new-tokens',
    type=int,
    default=128,
    help='tokens decoded at each context (128); 0 leaves decoding out',
  )
  parser.add_argument('--json', action='store_true')


def run(args: argparse.Namespace, overrides: Overrides) -> None:
  import jax

  from jaxformer.task_type import LANGUAGE_MODELING

  if args.steps < 0 or args.new_tokens < 0:
    raise InputError(f'--steps {args.steps} and --new-tokens {args.new_tokens}: must be at least 0')
  if args.new_tokens == 1 or any(c < 1 for c in args.context_length or ()):
    raise InputError(
      '--context-length must be positive, and --new-tokens at least 2 (or 0 for no decoding)'
    )
  experiment = experiment_of(args.target, overrides)
  join_processes()
  value: dict[str, Any] = {
    'name': args.target,
    'device': jax.devices()[0].device_kind,
    'devices': jax.device_count(),
  }
  if args.steps:
    value['training'] = training(experiment, args.steps)
  if args.new_tokens and experiment.model.task == LANGUAGE_MODELING:
    longest = experiment.model.max_len
    contexts = (
      args.context_length
      or [c for c in (128, 1024) if longest is None or c + args.new_tokens <= longest]
      or [64]
    )
    value['decoding'] = [decoding(experiment, c, args.new_tokens) for c in contexts]

  def lines() -> list[str]:
    out = [f'{args.target} on {value["devices"]} x {value["device"]}']
    if t := value.get('training'):
      out += [
        f'training: {t["tokens_per_second"]:,.0f} tokens a second, {1e3 * t["step_seconds"]:.1f} '
        'ms a step of '
        f'{t["tokens_per_step"]:,} tokens'
        + (f', MFU {t["mfu"]:.1%} (causal), {t["mfu_full"]:.1%} (full)' if 'mfu' in t else '')
      ]
    if d := value.get('decoding'):
      out += [
        'decoding, batch 1:',
        *table(
          [
            ('context', 'prefill ms', 'ms a token', 'state'),
            *(
              (
                f'{r["context_length"]:,}',
                f'{1e3 * r["prefill_seconds"]:.1f}',
                f'{1e3 * r["seconds_per_token"]:.2f}',
                f'{amount(r["state_bytes"])}B',
              )
              for r in d
            ),
          ]
        ),
      ]
      if len(d) > 1:
        out += [
          f'from {d[0]["context_length"]:,} to {d[-1]["context_length"]:,} tokens of context: '
          f'{d[-1]["seconds_per_token"] / d[0]["seconds_per_token"]:.2f} times the time a token, '
          f'{d[-1]["state_bytes"] / max(1, d[0]["state_bytes"]):.2f} times the state'
        ]
    return out

  answer(value, args.json, lines)


def training(experiment: Any, steps: int) -> dict[str, Any]:
  """The compiled step on one batch, of random tokens or of the task, `steps` times."""
  import jax
  import numpy as np

  from jaxformer.data import Batch, open_data
  from jaxformer.models.params import define
  from jaxformer.planning.cost import flops_per_token
  from jaxformer.planning.hardware import chip
  from jaxformer.sharding import batch_sharding, make_mesh, use_mesh
  from jaxformer.task_type import LANGUAGE_MODELING
  from jaxformer.training.optimizer import Optimizer
  from jaxformer.training.setup import check
  from jaxformer.training.step import compiled_train_step, init_state, step_config

  check(experiment)
  e, t = experiment, experiment.training
  definition, mesh, rules = define(e.model), make_mesh(e.mesh), e.mesh.rules
  optimizer = Optimizer.of(e.optimizer, e.schedule, t.steps, definition)
  if e.data.has_text and e.data.task == LANGUAGE_MODELING:
    shape = t.batch_size, e.data.sequence_length + 1
    tokens = np.random.default_rng(0).integers(0, e.model.vocab_size, shape).astype(np.int32)
    first: Any = Batch(tokens[:, :-1], tokens[:, 1:], None)
  else:
    first = open_data(e.data).train_batch(0, t.batch_size, t.seed)
  with use_mesh(mesh, rules):
    batch = jax.device_put(first, batch_sharding(mesh, rules))
    state = init_state(definition, optimizer, t.seed, mesh, rules)
    began = time.perf_counter()
    step = compiled_train_step(definition, optimizer, step_config(e, mesh), mesh, rules)
    step = step.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - began
    note(f'compiled the step in {compile_seconds:.1f} s')
    seconds = []
    for i in range(steps + 2):
      began = time.perf_counter()
      state, metrics = step(state, batch)
      jax.block_until_ready(metrics)
      seconds += [time.perf_counter() - began] if i >= 2 else []  # the first two warm up
  median, per_step = statistics.median(seconds), t.batch_size * e.data.positions
  value = {
    'tokens_per_second': per_step / median,
    'step_seconds': median,
    'tokens_per_step': per_step,
    'compile_seconds': compile_seconds,
  }
  if known := chip(jax.devices()[0].device_kind):
    for name, causal in (('mfu', True), ('mfu_full', False)):
      flops = flops_per_token(e.model, e.data.positions, causal)
      value[name] = flops * per_step / median / (known.peak() / known.devices * mesh.size)
  return value


def decoding(experiment: Any, context_length: int, new_tokens: int) -> dict[str, Any]:
  """Prefill and decoding at one context length, batch 1."""
  import jax

  from jaxformer.inference import time_decode
  from jaxformer.models.params import define
  from jaxformer.sharding import make_mesh
  from jaxformer.training.step import compute_dtype

  definition = define(experiment.model)
  dtype = compute_dtype(experiment.training.dtype, make_mesh(experiment.mesh))
  found = time_decode(
    definition, definition.init(jax.random.key(0)), context_length, new_tokens, dtype=dtype
  )
  return {
    'context_length': context_length,
    'state_bytes': 2 * experiment.model.state_size(context_length + new_tokens),
  } | found._asdict()
