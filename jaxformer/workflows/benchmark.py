"""Time of training and decoding on this machine, with random weights and tokens."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxformer.config import InputError
from jaxformer.data import open_data
from jaxformer.hardware import chip
from jaxformer.inference import time_decode
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import define
from jaxformer.planning.cost import flops_per_token
from jaxformer.planning.step_clock import time_program
from jaxformer.sharding import make_parallel
from jaxformer.study.tables import amount
from jaxformer.task_type import LANGUAGE_MODELING, Batch
from jaxformer.training import Experiment, check
from jaxformer.training.step import compute_dtype
from jaxformer.training.timing import timed_step
from jaxformer.workflows.names import experiment
from jaxformer.workflows.overrides import Overrides
from jaxformer.workflows.progress import Log, log_progress
from jaxformer.workflows.tables import table

WARM_UP = 2  # steps before the first that counts


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """Medians of measured times.

  Attributes:
    name: of the model.
    device, devices: kind and number.
    training: tokens per second, seconds per step and MFU; None if not measured.
    decoding: per context length prefill and decoding times, batch size 1.
  """

  name: str
  device: str
  devices: int
  training: dict[str, Any] | None
  decoding: list[dict[str, Any]]

  def json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  def lines(self) -> list[str]:
    lines = [f'{self.name} on {self.devices} x {self.device}']
    if t := self.training:
      mfu = f', MFU {t["mfu"]:.1%} (causal), {t["mfu_full"]:.1%} (full)' if 'mfu' in t else ''
      lines.append(
        f'training: {t["tokens_per_second"]:,.0f} tokens per second, '
        f'{1e3 * t["step_seconds"]:.1f} ms per step of {t["tokens_per_step"]:,} tokens{mfu}'
      )
    if d := self.decoding:
      rows = [('context length', 'prefill ms', 'ms per token', 'state')]
      rows += [
        (
          f'{r["context_length"]:,}',
          f'{1e3 * r["prefill_seconds"]:.1f}',
          f'{1e3 * r["seconds_per_token"]:.2f}',
          amount(r['state_bytes'], 'B'),
        )
        for r in d
      ]
      lines += ['decoding, batch size 1:', *table(rows)]
      if len(d) > 1:
        first, last = d[0], d[-1]
        lines.append(
          f'from {first["context_length"]:,} to {last["context_length"]:,} tokens of context: '
          f'{last["seconds_per_token"] / first["seconds_per_token"]:.2f} times the time per token, '
          f'{last["state_bytes"] / max(1, first["state_bytes"]):.2f} times the state'
        )
    return lines


def bench(
  target: Experiment | ModelConfig | str,
  *,
  overrides: Overrides = (),
  steps: int = 10,
  context_lengths: Sequence[int] = (),
  new_tokens: int = 128,
  log: Log = log_progress,
) -> Benchmark:
  """Measure training and decoding on this machine, with random weights and tokens.

  Args:
    target, overrides: see `experiment`.
    steps: training steps measured; 0 omits training.
    context_lengths: tokens in the prompt before decoding is measured; by default 128 and 1,024.
    new_tokens: tokens decoded after each prompt; 0 omits decoding.
  """
  e = experiment(target, overrides=overrides)
  if steps < 0:
    raise InputError('steps', steps, 'at least 0')
  if new_tokens < 0 or new_tokens == 1:
    raise InputError('new_tokens', new_tokens, 'at least 2, or 0 for no decoding')
  if wrong := [n for n in context_lengths if n < 1]:
    raise InputError('context_length', wrong[0], 'positive')
  if steps:
    check(e)  # before a batch is made
  training = _training(e, steps, log) if steps else None
  decoding = []
  if new_tokens and e.model.task == LANGUAGE_MODELING:
    longest = e.model.max_len
    usual = [n for n in (128, 1024) if longest is None or n + new_tokens <= longest] or [64]
    definition, dtype = define(e.model), compute_dtype(e.training.dtype, make_parallel(e.mesh))
    params = definition.init(jax.random.key(0))
    for n in context_lengths or usual:
      log(f'compiling decoding at a context of {n:,} tokens')
      times = time_decode(definition, params, n, new_tokens, dtype=dtype)
      decoding.append(times._asdict())
  name = target if isinstance(target, str) else e.run.name or e.model.tag
  return Benchmark(name, jax.devices()[0].device_kind, jax.device_count(), training, decoding)


def _training(e: Experiment, steps: int, log: Log) -> dict[str, Any]:
  """Time the compiled step on one batch, of random tokens for text, else of the data, or of
  their shape where the corpus has to be given."""
  t = e.training
  if e.data.has_text and e.model.task == LANGUAGE_MODELING:
    shape = t.batch_size, e.data.positions + 1
    tokens = np.random.default_rng(0).integers(0, e.model.task.vocab_size, shape).astype(np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
  elif e.data.missing():  # a published corpus: its largest shape
    parts = (None if a is None else np.repeat(a, t.batch_size, 0) for a in e.data.example())
    batch = Batch(*parts)
  else:
    batch = open_data(e.data).train_batch(0, t.batch_size, t.seed)
  log('compiling the step')
  step, compile_seconds, _ = timed_step(e, batch)
  log(f'compiled the step in {compile_seconds:.1f} s')
  median = statistics.median([step() for _ in range(steps + WARM_UP)][WARM_UP:])
  per_step = t.batch_size * e.data.positions
  value = {
    'tokens_per_second': per_step / median,
    'step_seconds': median,
    'tokens_per_step': per_step,
    'compile_seconds': compile_seconds,
  }
  per_device = per_step / median / make_parallel(e.mesh).mesh.size
  at_one = utilization(e.model, e.data.positions)
  return value | {name: per_device * one for name, one in at_one.items()}


def predicted_seconds(step: jax.stages.Compiled, mesh: Mesh) -> float | None:
  """Return the predicted time of a step that is compiled for the TPUs of a mesh
  (`planning.step_clock`); None for another device."""
  known = chip(mesh.devices.flat[0].device_kind)
  if known is None or known.clock_hz is None:
    return None
  return sum(t.seconds for t in time_program(step, mesh, known))


def utilization(model: ModelConfig, length: int) -> dict[str, float]:
  """Return the model FLOPs utilization of training on one device of this machine at one token per
  second: `mfu` counts the FLOPs of causal attention, `mfu_full` those of all pairs. Empty for a
  device whose peak is unknown."""
  known = chip(jax.devices()[0].device_kind)
  if known is None:
    return {}
  peak = known.peak() / known.devices
  return {
    name: flops_per_token(model, length, causal) / peak
    for name, causal in (('mfu', True), ('mfu_full', False))
  }
