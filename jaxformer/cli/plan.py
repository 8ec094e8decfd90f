"""Show what a model costs, from shapes alone; with --target also time, price, memory per device and
the bottleneck.

The run is the one that `train NAME --show` shows: its tokens, sequence length, batch and remat
policy, of a published model those of its paper. On a target, a mesh and as few microbatches as fit
are chosen unless given. FLOPs per token are averaged over the sequence length, of inference over
the model's context length. Overrides are those of `train`.

With a size (--params 125M, --active-params, --flops-per-token or --state-bytes) the name is a
family, such as mamba or llama3, or a layer of your own as FILE.py:NAME, in a model like Llama. The
closest width, depth and hidden units are found, for bytes and 256 tokens of context unless
--model.vocab-size and --model.context-length are given. From 30M parameters on such a model trains
on 20 tokens per active parameter, which have to be given. `plan families`, and several sizes as in
--params 1M,10M,125M, print a table of shapes."""

import argparse
from typing import Any

import jaxformer as jf
from jaxformer.cli.output import SIZES, json_option, prices_option, show, size_options

OVERRIDES = True


def arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add(
    'model',
    metavar='PRESET|FILE|FAMILY|FILE:NAME',
    help='a name of `jaxformer list`, a Python file that defines `experiment`, a family with a '
    'size, or a layer config in a Python file',
  )
  size_options(parser, '; several (1M,10M) print a table')
  add('--target', help='slice or host of GPUs: v5p-2048, v6e-256, 2 x v5e-256, v5e:2x4, h100:8')
  add('--tokens', help='tokens to train on, e.g. 2T, in place of those of the run')
  add('--utilization', type=float, help='assumed share of the peak FLOPs (0.4)')
  add('--price', type=float, help='USD per chip-hour, in place of the list price')
  prices_option(parser)
  add('--hardware', metavar='FILE', help='TOML or JSON file with chips of your own')
  add('--phase', choices=('train', 'prefill', 'decode'), help='what runs (train)')
  add(
    '--compile',
    action='store_true',
    help='compile the program with the TPU compiler, and report its memory, FLOPs, collectives and '
    'predicted time',
  )
  add('--profile', action='store_true', help='with --compile, also where the predicted time goes')
  add(
    '--search',
    action='store_true',
    help='try meshes, batch sizes (unless given) and remat policies, compile the best few and '
    'recommend one',
  )
  json_option(parser, 'all figures and their assumptions as one JSON object')


def run(model: str, json: bool, target: str | None = None, **options: Any) -> None:
  size = {name: options[name] for name in SIZES if name in options}
  if model == 'families' or any(',' in text for text in size.values()):
    if target is not None:
      raise jf.InputError('--target: needs one family and one size')
    show(jf.shapes(model, overrides=options['overrides'], **size), json)
  else:
    show(jf.plan(model, target=target, **options), json)
