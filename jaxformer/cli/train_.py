"""Trains a preset or an experiment file.

Everything about the run is in runs/NAME, or in a bucket with --run.dir gs://BUCKET/FOLDER. The same
command goes on where the run stopped. Any field of the experiment can be given as an override:
--model.width 256 --training.steps 1000 --optimizer Lion --optimizer.learning-rate 1e-4 --mesh.fsdp
4 --data.corpus Files --data.corpus.path my.txt --data.split ByPosition --run.name mine. A name that
is no field where it stands is looked for below: --model.heads 8 sets the heads of every attention
layer. `--show` says what there is.

A family at a size is a target too (`train mamba --params 1M`), and so is a layer of yours in a
frame like Llama's (`train my_layer.py:MyMixer.Config`, of a million parameters unless another size
is given); see `jaxformer plan --help`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from jaxformer.cli import sizes
from jaxformer.cli.common import (
  Overrides,
  answer,
  experiment_of,
  foreign_weights,
  join_processes,
  note,
  trained_folder,
)
from jaxformer.config import InputError

OVERRIDES = True
SAMPLE_TOKENS = 200
SAMPLE_PAIRS = 4
# Settings of a model that do not change what its weights compute.
FREE = {'dropout', 'init', 'key_init', 'out_init', 'embedding_init', 'head_init'}


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    'target',
    metavar='PRESET|FILE|FAMILY|FILE:NAME',
    help='a name of `jaxformer list`, a Python file that '
    'defines `experiment`, or what a model of a size is made of: a family, or a layer in a Python '
    'file',
  )
  sizes.arguments(parser)
  parser.add_argument(
    '--init-from',
    metavar='RUN',
    help='begin a new run with the weights of another: a run folder, RUN@STEP, '
    'a folder of Hugging Face weights, or a file of RWKV weights',
  )
  parser.add_argument(
    '--show', action='store_true', help='print the whole experiment as JSON and stop'
  )
  parser.add_argument('--json', action='store_true', help='print the result as one JSON object')


def run(args: argparse.Namespace, overrides: Overrides) -> int:
  from jaxformer.config import text

  experiment = experiment_of(args.target, overrides, sizes.size_of(args))
  if args.show:
    print(text(experiment), end='')
    return 0
  import jax

  from jaxformer.data import open_data
  from jaxformer.planning.cost import flops_per_token
  from jaxformer.planning.hardware import chip
  from jaxformer.training import check, train
  from jaxformer.training.run import Run

  join_processes()
  check(experiment)  # before the text is read, which may take long
  Run(experiment)  # and may the folder be used?
  init_from = None if args.init_from is None else initial(args.init_from, experiment)
  dataset = open_data(experiment.data, log=note)
  known = chip(jax.devices()[0].device_kind)
  sample = sampler(experiment, dataset)
  result = train(
    experiment,
    init_from=init_from,
    dataset=dataset,
    flops_per_token=flops_per_token,
    peak_flops_per_second=None if known is None else known.peak() / known.devices,
    sample=sample,
  )
  if result.exit_code == 0 and jax.process_index() == 0:
    report(args, result, dataset)
  return result.exit_code


def initial(source: str, experiment: Any) -> Any:
  """What `--init-from` names, as `jaxformer.training.train` takes it: the path of a checkpoint, or
  weights of another library."""
  from jaxformer.config import differences, to_json
  from jaxformer.interop import load_rwkv
  from jaxformer.sharding import make_mesh
  from jaxformer.training.checkpoint import steps_in
  from jaxformer.training.run import run_folder

  foreign = foreign_weights(source)
  if foreign is None:
    return ''.join(map(str, trained_folder(source)))
  path, load = foreign
  if steps_in(run_folder(experiment) / 'checkpoints'):  # a run that goes on needs no weights
    return str(path)
  model, params = load(path, mesh=make_mesh(experiment.mesh), rules=experiment.mesh.rules)
  if load is load_rwkv:  # such a file does not say what context its model is meant for
    model = model.replace(context_length=experiment.model.context_length)
  lines = [
    d
    for d in differences(to_json(model), to_json(experiment.model))
    if not FREE & set(d.partition(':')[0].split('.'))
  ]
  if lines:
    shown = '\n  '.join(lines[:12] + ([f'and {len(lines) - 12} more'] if len(lines) > 12 else []))
    raise InputError(
      f'--init-from {source}: its model is not that of the experiment (its own -> the '
      f"experiment's):\n  {shown}"
    )
  return params


def sampler(experiment: Any, dataset: Any) -> Callable[[Any, int], str] | None:
  """A function from parameters to a piece of text, always from the same prompt and seed so that
  steps can be compared; None for a model that writes none."""
  from jaxformer.inference import Sampling, generate_text
  from jaxformer.models.params import define
  from jaxformer.sharding import make_mesh
  from jaxformer.task_type import LANGUAGE_MODELING

  if dataset.tokenizer is not None and dataset.source_vocab_size is not None:
    return translator(experiment, dataset)
  if experiment.model.task != LANGUAGE_MODELING or dataset.tokenizer is None:
    return None
  definition, tokenizer = define(experiment.model), dataset.tokenizer
  prompt = (
    []
    if tokenizer.end_of_document is not None
    else next(iter(dataset.validation_batches(1))).inputs[0, :1].tolist()
  )
  mesh = make_mesh(experiment.mesh)

  def sample(params: Any, step: int) -> str:
    room = (experiment.model.max_len or SAMPLE_TOKENS + 1) - 1
    texts = generate_text(
      definition,
      params,
      [prompt],
      tokenizer.decode_bytes,
      max_new_tokens=min(SAMPLE_TOKENS, room),
      sampling=Sampling(temperature=0.8),
      end_of_document=tokenizer.end_of_document,
      vocab_size=tokenizer.vocab_size,
      mesh=mesh,
      rules=experiment.mesh.rules,
    )
    return tokenizer.decode(prompt) + texts[0].text

  return sample


def translator(experiment: Any, dataset: Any) -> Callable[[Any, int], str]:
  """A function from parameters to translations of some held-out sources, always the same, each
  beside what it should be."""
  from jaxformer.inference import translate
  from jaxformer.models.params import define
  from jaxformer.sharding import make_mesh

  definition, tokenizer, pairs = (
    define(experiment.model),
    dataset.tokenizer,
    dataset.held_out_pairs(SAMPLE_PAIRS),
  )
  mesh = make_mesh(experiment.mesh)

  def sample(params: Any, step: int) -> str:
    found = translate(
      definition,
      params,
      [p.source_ids.tolist() for p in pairs],
      end=tokenizer.end_of_document,
      vocab_size=tokenizer.vocab_size,
      mesh=mesh,
      rules=experiment.mesh.rules,
    )
    return '\n'.join(
      f'{p.source} -> {tokenizer.decode(t.tokens)} (should be {p.reference})'
      for p, t in zip(pairs, found, strict=True)
    )

  return sample


def report(args: argparse.Namespace, result: Any, dataset: Any) -> None:
  """What came of it: the last sample, and the score beside what counting bytes would give; of a
  task the accuracy."""
  if not (baselines := dataset.baselines()):
    value = {'run': str(result.folder), 'step': result.step, 'metrics': result.metrics}
    accuracy, source = result.metrics.get('eval/accuracy'), result.metrics.get('eval/source')
    loss = result.metrics.get('eval/loss')
    score = (
      'not evaluated'
      if loss is None
      else f'{loss:.4f} nats a target'
      if accuracy is None
      else f'{accuracy:.2%} right'
    )
    score += f' after {result.step} steps'
    answer(
      json.loads(json.dumps(value, default=float)),
      args.json,
      lambda: [f'{source}: {score}', f'run folder: {result.folder}'],
    )
    return
  samples = result.folder / 'samples.txt'
  value = {'run': str(result.folder), 'step': result.step, 'metrics': result.metrics} | baselines

  def lines() -> list[str]:
    trained = result.metrics.get('eval/bits_per_byte')
    return [
      '',
      samples.read_text().rpartition('==== step ')[2].partition('\n')[2].rstrip()
      if samples.exists()
      else '',
      '',
      f'bits per byte on held-out text ({result.metrics.get("eval/source")}):',
      f'  {trained:.3f}  this model after {result.step} steps'
      if trained is not None
      else '  not evaluated',
      f'  {baselines["bigram_bits_per_byte"]:.3f}  bigram model of bytes',
      f'  {baselines["unigram_bits_per_byte"]:.3f}  unigram model of bytes',
      f'run folder: {result.folder}',
    ]

  answer(json.loads(json.dumps(value, default=float)), args.json, lines)
