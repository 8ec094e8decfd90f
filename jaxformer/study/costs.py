"""Costs of each architecture of a study on this machine: counted from its shapes, and measured side
by side."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxformer import config
from jaxformer.data import Dataset, DatasetConfig, open_data
from jaxformer.evaluation import evaluate_translation, loss_by_position
from jaxformer.files import write_atomically
from jaxformer.inference import DecodeTime, time_decode, translate
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import define
from jaxformer.planning.cost import cost
from jaxformer.sharding import MeshConfig, make_parallel, use_mesh
from jaxformer.study.runner import Log
from jaxformer.study.sharing import Interrupted
from jaxformer.study.study import Study, file_name
from jaxformer.task_type import LANGUAGE_MODELING, TRANSLATION
from jaxformer.training import load_params
from jaxformer.training.interrupt import Interrupt
from jaxformer.training.setup import Setup
from jaxformer.training.step import compiled_train_step, compute_dtype, init_state

NEW_TOKENS = 32  # decoded at each context length
REPEATS = 3
EVAL_LENGTH_FACTOR = 2  # times the training length at which the loss by position is measured


@dataclasses.dataclass(frozen=True)
class Costs:
  """Costs of a model.

  Attributes:
    params, active_params: number of parameters, and of those used per token.
    train_flops_per_token: at the task's length, attention counted causally.
    tokens_per_second: of training, one run at a time on all devices; the median of timings taken in
      turns with the other architectures; None if not measured.
    compile_seconds: of the training step.
    step_bytes: memory of the training step by the compiler's account, arguments included; None
      where it gives none.
    contexts: decoding, by context length; empty for models that do not decode.
  """

  params: int
  active_params: int
  train_flops_per_token: float
  tokens_per_second: float | None
  compile_seconds: float | None
  step_bytes: int | None
  contexts: tuple[DecodeTime, ...]


def measure_costs(
  study: Study,
  models: dict[str, ModelConfig],
  task: DatasetConfig,
  dataset: Dataset,
  log: Log,
  interrupt: Interrupt,
) -> dict[str, Costs]:
  """Return the costs of a study's models on one of its tasks, by title. Earlier measurements are
  read from the study's folder. Times of one study are compared, so those of training come from one
  process on one machine."""
  training = _kept(
    study,
    'training',
    {'models': models, 'task': task, 'rounds': study.timing_repeats, 'batch': study.batch_size},
    lambda: _time_training(study, models, task, dataset, log, interrupt),
  )
  found = {}
  contexts = study.contexts if task.task == LANGUAGE_MODELING else ()
  for title, model in models.items():
    c = cost(model, task.positions)
    key = {'model': model, 'contexts': contexts}
    rows = _kept(
      study,
      f'decoding-{title}',
      key,
      lambda model=model, title=title: _decoding(model, title, contexts, log),
    )
    if interrupt.signal is not None:
      raise Interrupted
    found[title] = Costs(
      c.params,
      c.active_params,
      c.train_flops_per_token,
      **training[title],
      contexts=tuple(DecodeTime(**row) for row in rows),
    )
  return found


def longer(task: DatasetConfig, dataset: Dataset) -> Dataset:
  """Return text in sequences of `EVAL_LENGTH_FACTOR` times the length; any other task as it is."""
  long = task.at_length(EVAL_LENGTH_FACTOR * task.positions)
  return dataset if long == task else open_data(long, tokenizer=dataset.tokenizer)


def by_position(
  study: Study,
  where: str,
  title: str,
  folders: Sequence[str],
  model: ModelConfig,
  dataset: Dataset,
  long: Dataset,
) -> list[float | None] | None:
  """Return the mean held-out loss of runs at each position, in nats, on the `longer` sequences if
  the model can read them; None for a task with one target per sequence."""
  if dataset.tokenizer is None:
    return None
  if model.max_len is None or model.max_len >= long.config.positions:
    dataset = long
  definition, dtype = define(model), compute_dtype('auto', make_parallel(MeshConfig()))

  def measure() -> list[float | None]:
    runs = []
    for folder in folders:
      params, _ = load_params(folder, definition)
      batches = dataset.validation_batches(study.batch_size, study.eval_batches)
      runs.append(loss_by_position(definition, params, batches, dtype=dtype))
    # all runs are scored on the same targets
    return [
      statistics.mean(r.loss for r in at) if all(at) else None for at in zip(*runs, strict=True)
    ]

  key = {
    'runs': [Path(f).name for f in folders],
    'batches': study.eval_batches,
    'length': dataset.config.positions,
  }
  return _kept(study, f'positions-{where}-{title}', key, measure)


def translations(
  study: Study, where: str, title: str, folders: Sequence[str], model: ModelConfig, dataset: Dataset
) -> dict[str, list[float]] | None:
  """Return the scores of each run's translations of held-out texts, by metric: exact match as a
  fraction; BLEU and chrF, 0 to 100, if sacrebleu is installed. None unless the data are
  source-target pairs."""
  tokenizer = dataset.tokenizer
  if (
    dataset.config.task != TRANSLATION
    or not study.translations
    or tokenizer is None
    or tokenizer.end_of_document is None
  ):
    return None
  definition, dtype, end = (
    define(model),
    compute_dtype('auto', make_parallel(MeshConfig())),
    tokenizer.end_of_document,
  )

  def measure() -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    pairs = dataset.held_out_pairs(study.translations)
    for folder in folders:
      params, _ = load_params(folder, definition)
      outputs = translate(
        definition,
        params,
        [p.source_ids for p in pairs],
        end=end,
        vocab_size=dataset.vocab_size,
        dtype=dtype,
      )
      s = evaluate_translation([t.tokens for t in outputs], pairs, tokenizer, bootstrap=None).scores
      rows = {'exact match': s.exact_match} | {
        n: x.value for n, x in (('BLEU', s.bleu), ('chrF', s.chrf)) if x is not None
      }
      for name, value in rows.items():
        found.setdefault(name, []).append(value)
    return found

  key = {'runs': [Path(f).name for f in folders], 'texts': study.translations}
  return _kept(study, f'translations-{where}-{title}', key, measure)


def _kept(study: Study, name: str, key: dict[str, Any], measure: Callable[[], Any]) -> Any:
  """Return JSON data from `measure`, cached in the study's folder while `key` and the device are
  unchanged."""
  file = study.folder / 'measured' / f'{file_name(name)}.json'
  wanted: dict[str, Any] = {
    'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    'jax': jax.__version__,
  }
  for k, v in key.items():
    wanted[k] = (
      {n: config.to_json(m) for n, m in v.items()} if isinstance(v, dict) else config.to_json(v)
    )
  try:
    saved = json.loads(file.read_text())
    if saved['key'] == wanted:
      return saved['value']
  except (OSError, ValueError, KeyError, TypeError):
    pass
  value = measure()
  file.parent.mkdir(parents=True, exist_ok=True)
  write_atomically(file, json.dumps({'key': wanted, 'value': value}, indent=1) + '\n')
  return value


def _time_training(
  study: Study,
  models: dict[str, ModelConfig],
  task: DatasetConfig,
  dataset: Dataset,
  log: Log,
  interrupt: Interrupt,
) -> dict[str, dict[str, Any]]:
  """Time every model's training step, in turns, so that other load on the machine affects all
  equally."""
  if not study.timing_repeats:
    return {
      title: {'tokens_per_second': None, 'compile_seconds': None, 'step_bytes': None}
      for title in models
    }
  steps, found = {}, {}
  for title, model in models.items():
    steps[title], found[title] = _compiled_step(study, title, model, task, dataset)
    log(f'costs | {title} | training step compiled in {found[title]["compile_seconds"]:.1f} s')
    if interrupt.signal is not None:
      raise Interrupted
  seconds: dict[str, list[float]] = {title: [] for title in models}
  for repeat in range(study.timing_repeats + 1):  # the first warms up
    for title, step in steps.items():
      took = step()
      seconds[title] += [took] if repeat else []
    if interrupt.signal is not None:
      raise Interrupted
  return {
    title: {'tokens_per_second': 1 / statistics.median(seconds[title]), **of}
    for title, of in found.items()
  }


def _compiled_step(
  study: Study, title: str, model: ModelConfig, task: DatasetConfig, dataset: Dataset
) -> tuple[Callable[[], float], dict[str, Any]]:
  """Return a function that runs one training step and returns its seconds per token, and the costs
  of compiling it."""
  entry = next(e for e in study.entries if e.title == title)
  rate, seed = study.learning_rates[0], study.tuning_seed
  s = Setup.of(study.experiment(entry, model, task, rate, seed), dataset)
  with use_mesh(s.parallel):
    first = dataset.train_batch(0, study.batch_size, seed)
    batch = jax.device_put(first, s.parallel.batch)
    state = init_state(s.definition, s.optimizer, seed, s.parallel)
    step = compiled_train_step(s.definition, s.optimizer, s.step_config, s.parallel)
    began = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - began

  def run() -> float:
    nonlocal state
    with use_mesh(s.parallel):
      began = time.perf_counter()
      state, metrics = compiled(state, batch)
      jax.block_until_ready(metrics)
      return (time.perf_counter() - began) / first.targets_BT.size

  m = compiled.memory_analysis()
  size = m and int(
    m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
  )
  return run, {'compile_seconds': compile_seconds, 'step_bytes': size}


def _decoding(
  model: ModelConfig, title: str, contexts: Sequence[int], log: Log
) -> list[dict[str, Any]]:
  """Time prefill and decoding at each context length that the model can read."""
  rows = []
  definition, parallel = define(model), make_parallel(MeshConfig())
  params = definition.init(jax.random.key(0), parallel) if contexts else {}
  for context_length in contexts:
    end = context_length + NEW_TOKENS
    if model.max_len is not None and end > model.max_len:
      continue
    dtype = compute_dtype('auto', parallel)
    t = time_decode(definition, params, context_length, NEW_TOKENS, repeats=REPEATS, dtype=dtype)
    rows.append(t._asdict())
    log(
      f'costs | {title} | context of {context_length:,} tokens: '
      f'{1e3 * t.seconds_per_token:.2f} ms per token'
    )
  return rows
