"""Inspect the data of an experiment, or train a tokenizer on them.

`jaxformer data info` prints what the splits hold, as bytes and tokens, and the bits per byte of
unigram and bigram models of bytes. `jaxformer data train-tokenizer OUT --vocab-size 4096` trains
byte pairs (BPE) and writes OUT, a tokenizer.json that --data.tokenizer TokenizerFile
--data.tokenizer.path OUT uses; for pairs it is trained on both sides. Both accept --data...
overrides; pairs are `--data Pairs --data.corpus Tsv --data.corpus.path FILE`."""

import argparse
from typing import Any

import jaxformer as jf
from jaxformer.cli.output import json_option, show

OVERRIDES = True


def arguments(parser: argparse.ArgumentParser) -> None:
  actions = parser.add_subparsers(dest='action', required=True, metavar='info|train-tokenizer')
  info = actions.add_parser('info', help='print what the splits hold', allow_abbrev=False)
  json_option(info, 'one JSON object')
  train = actions.add_parser('train-tokenizer', help='train byte pairs', allow_abbrev=False)
  train.add_argument('out', metavar='OUT', help='the file to write, such as tokenizer.json')
  train.add_argument('--vocab-size', type=int, default=4096, help='tokens of the vocabulary (4096)')


def run(action: str, json: bool = False, **options: Any) -> None:
  if action == 'info':
    show(jf.inspect_data(**options), json)
  else:
    jf.train_tokenizer(**options)
