"""Costs of each architecture of a study on this machine: counted from its shapes, and measured side
by side."""

import collections
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jaxformer import config
from jaxformer.data import Dataset, open_data
from jaxformer.evaluation import loss_by_position, translate_held_out
from jaxformer.files import write_atomically
from jaxformer.inference import DecodeTime, time_decode
from jaxformer.models.params import Definition, Params, define
from jaxformer.sharding import MeshConfig, Parallel, make_parallel
from jaxformer.study.runner import Tuned
from jaxformer.study.sharing import Interrupted
from jaxformer.study.study import Log, Study, file_name
from jaxformer.task_type import LANGUAGE_MODELING, TRANSLATION
from jaxformer.training import load_params
from jaxformer.training.environment import software
from jaxformer.training.interrupt import Interrupt
from jaxformer.training.step import compute_dtype
from jaxformer.training.timing import timed_step

NEW_TOKENS = 32  # decoded at each context length
REPEATS = 3
EVAL_LENGTH_FACTOR = 2  # times the training length at which the loss by position is measured


@dataclasses.dataclass(frozen=True)
class Costs:
  """Measured costs of a model.

  Attributes:
    tokens_per_second: of training, one run at a time on all devices; the median of timings taken in
      turns with the other architectures; None if not measured.
    compile_seconds: of the training step.
    step_bytes: memory of the training step by the compiler's account, arguments included; None
      where it gives none.
    contexts: decoding, by context length; empty for models that do not decode.
  """

  tokens_per_second: float | None
  compile_seconds: float | None
  step_bytes: int | None
  contexts: tuple[DecodeTime, ...]


def measure_costs(
  study: Study, tuned: Sequence[Tuned], dataset: Dataset, log: Log, interrupt: Interrupt
) -> dict[str, Costs]:
  """Return the costs of a study's models on one of its tasks, by title. Earlier measurements are
  read from the study's folder. Times of one study are compared, so those of training come from one
  process on one machine."""
  key = {
    'models': {t.title: config.to_json(t.model) for t in tuned},
    'task': dataset.config,
    'rounds': study.timing_repeats,
    'batch': study.batch_size,
  }
  training = _kept(
    study, 'training', key, lambda: _time_training(study, tuned, dataset, log, interrupt)
  )
  contexts = study.contexts if dataset.config.task == LANGUAGE_MODELING else ()
  found = {}
  for t in tuned:
    key = {'model': t.model, 'contexts': contexts}
    decoding = _kept(
      study, f'decoding-{t.title}', key, lambda t=t: _time_decoding(t, contexts, log)
    )
    if interrupt.signal is not None:
      raise Interrupted
    times = tuple(DecodeTime(**fields) for fields in decoding)
    found[t.title] = Costs(**training[t.title], contexts=times)
  return found


def by_position(study: Study, where: str, t: Tuned, dataset: Dataset) -> list[float | None] | None:
  """Return the mean held-out loss of an entry's runs at each position, in nats; None for a task
  with one target per sequence. Text is read in sequences of `EVAL_LENGTH_FACTOR` times the length,
  if the model can read them."""
  if dataset.tokenizer is None:
    return None
  task, most = dataset.config, t.model.max_len
  long = task.at_length(EVAL_LENGTH_FACTOR * task.positions)
  if most is not None and most < long.positions:
    long = task

  def measure() -> list[float | None]:
    data = dataset if long == task else open_data(long, tokenizer=dataset.tokenizer)
    runs = [
      loss_by_position(
        definition,
        params,
        data.validation_batches(study.batch_size, study.eval_batches),
        dtype=dtype,
      )
      for definition, params, dtype in _finished_runs(t)
    ]
    # all runs are scored on the same targets
    return [
      statistics.mean(r.loss for r in at) if all(at) else None for at in zip(*runs, strict=True)
    ]

  key = {'runs': t.folder_names, 'batches': study.eval_batches, 'length': long.positions}
  return _kept(study, f'positions-{where}-{t.title}', key, measure)


def translations(
  study: Study, where: str, t: Tuned, dataset: Dataset
) -> dict[str, list[float]] | None:
  """Return the scores of the translations of held-out texts by each run of an entry, by metric:
  exact match as a fraction; BLEU and chrF, 0 to 100, if sacrebleu is installed. None unless the
  data are source-target pairs."""
  if dataset.config.task != TRANSLATION or not study.translations:
    return None

  def measure() -> dict[str, list[float]]:
    found = collections.defaultdict[str, list[float]](list)
    for definition, params, dtype in _finished_runs(t):
      scores = translate_held_out(
        definition, params, dataset, study.translations, bootstrap=None, dtype=dtype
      ).scores
      found['exact match'].append(scores.exact_match)
      for name, score in scores.metrics.items():
        found[name].append(score.value)
    return found

  key = {'runs': t.folder_names, 'texts': study.translations}
  return _kept(study, f'translations-{where}-{t.title}', key, measure)


def _finished_runs(t: Tuned) -> Iterator[tuple[Definition, Params, Any]]:
  """The definition, parameters and compute dtype of every run that did not diverge."""
  definition, dtype = define(t.model), compute_dtype('auto', make_parallel(MeshConfig()))
  for run in t.runs:
    if run.finite_loss is not None:
      yield definition, load_params(run.folder, definition).params, dtype


def _some_params(t: Tuned, definition: Definition, parallel: Parallel) -> Params:
  """The parameters of a run, which are there without compiling anything, or if all diverged initial
  ones."""
  for run in t.runs:
    if run.finite_loss is not None:
      return load_params(run.folder, definition, parallel).params
  return definition.init(jax.random.key(0), parallel)


def _kept(study: Study, name: str, key: dict[str, Any], measure: Callable[[], Any]) -> Any:
  """Return JSON data from `measure`, cached in the study's folder while `key`, the device and the
  software are unchanged."""
  file = study.folder / 'measured' / f'{file_name(name)}.json'
  machine = {
    'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    'software': software(),
  }
  wanted = json.loads(json.dumps(machine | key, default=config.to_json))
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
  study: Study, tuned: Sequence[Tuned], dataset: Dataset, log: Log, interrupt: Interrupt
) -> dict[str, dict[str, Any]]:
  """Time every model's training step, in turns, so that other load on the machine affects all
  equally."""
  if not study.timing_repeats:
    nothing = dict.fromkeys(('tokens_per_second', 'compile_seconds', 'step_bytes'))
    return {t.title: nothing for t in tuned}
  steps, found = {}, {}
  for t in tuned:
    log(f'costs | {t.title} | compiling the training step')
    steps[t.title], found[t.title] = _compiled_step(study, t, dataset)
    log(f'costs | {t.title} | training step compiled in {found[t.title]["compile_seconds"]:.1f} s')
    if interrupt.signal is not None:
      raise Interrupted
  rounds = []
  for _ in range(study.timing_repeats + 1):
    rounds.append({title: step() for title, step in steps.items()})
    if interrupt.signal is not None:
      raise Interrupted
  for title, of in found.items():  # the first round warms up
    of['tokens_per_second'] = 1 / statistics.median(seconds[title] for seconds in rounds[1:])
  return found


def _compiled_step(
  study: Study, t: Tuned, dataset: Dataset
) -> tuple[Callable[[], float], dict[str, Any]]:
  """Return a function that runs one training step and returns its seconds per token, and the costs
  of compiling it."""
  rate, seed = study.learning_rates[0], study.tuning_seed
  experiment = study.experiment(t.planned.entry, t.model, dataset, rate, seed)
  batch = dataset.train_batch(0, study.batch_size, seed)
  params = _some_params(t, define(t.model), make_parallel(experiment.mesh))
  run, compile_seconds, program = timed_step(experiment, batch, params)
  m = program.memory_analysis()
  size = m and int(
    m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
  )
  costs = {'compile_seconds': compile_seconds, 'step_bytes': size}
  return lambda: run() / batch.targets_BT.size, costs


def _time_decoding(t: Tuned, contexts: Sequence[int], log: Log) -> list[dict[str, Any]]:
  """Time prefill and decoding at each context length that the model can read."""
  definition, parallel = define(t.model), make_parallel(MeshConfig())
  params = _some_params(t, definition, parallel) if contexts else {}
  dtype, most = compute_dtype('auto', parallel), t.model.max_len or math.inf
  found, lengths = [], [n for n in contexts if n + NEW_TOKENS <= most]
  if lengths:
    log(f'costs | {t.title} | compiling decoding')
  for length in lengths:
    times = time_decode(definition, params, length, NEW_TOKENS, repeats=REPEATS, dtype=dtype)
    found.append(times._asdict())
    log(
      f'costs | {t.title} | context of {length:,} tokens: '
      f'{1e3 * times.seconds_per_token:.2f} ms per token'
    )
  return found
