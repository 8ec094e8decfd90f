"""Describe the text of an experiment, or train a tokenizer on it.

`jaxformer data info` shows what the splits hold, as bytes and tokens, and of plain text how well
byte frequencies predict them. `jaxformer data train-tokenizer OUT --vocab-size 4096` trains byte
pairs (BPE) and writes OUT, a tokenizer.json for --data.tokenizer TokenizerFile
--data.tokenizer.path OUT; for pairs it is trained on both sides. Both take --data... overrides;
pairs are `--data Pairs --data.corpus Tsv --data.corpus.path FILE`."""

from __future__ import annotations

import argparse

from jaxformer.cli.common import SECTIONS, Overrides, answer, note, of_data
from jaxformer.config import InputError
from jaxformer.overrides import override

OVERRIDES = True


def arguments(parser: argparse.ArgumentParser) -> None:
  actions = parser.add_subparsers(dest='action', required=True, metavar='info|train-tokenizer')
  info = actions.add_parser('info', help='what the splits hold', allow_abbrev=False)
  info.add_argument('--json', action='store_true')
  train = actions.add_parser('train-tokenizer', help='train byte pairs', allow_abbrev=False)
  train.add_argument('out', metavar='OUT', help='file to write, by convention tokenizer.json')
  train.add_argument('--vocab-size', type=int, default=4096)


def run(args: argparse.Namespace, overrides: Overrides) -> None:
  from jaxformer.data import DataSection, train_bpe

  for path, _ in overrides:
    if path.partition('.')[0] in SECTIONS and not of_data(path):
      raise InputError(f'--{path}: `jaxformer data {args.action}` takes overrides of data alone')
  data = override(DataSection(), overrides).data
  if args.action == 'train-tokenizer':
    note(f'{args.out}: {train_bpe(data.training_texts(), args.vocab_size, args.out)} tokens')
  else:
    data.training_texts()  # an error for a task
    dataset = data.open(log=note)
    answer(dataset.manifest | dataset.baselines(), args.json, dataset.info)
