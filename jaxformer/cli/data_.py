"""Looks at the text of an experiment, trains a tokenizer on it, or prepares a parallel corpus.

`jaxformer data info` shows what the splits hold, as bytes and tokens, and of plain text how well
counting bytes predicts them. `jaxformer data train-tokenizer OUT --vocab-size 4096` learns byte
pairs (BPE) and writes OUT, a tokenizer.json that --data.tokenizer TokenizerFile
--data.tokenizer.path OUT uses; of pairs it is learned on both sides. Both take --data... overrides;
pairs are `--data Pairs --data.corpus Tsv --data.corpus.path FILE`. `jaxformer data kjv-es --out
DIR` writes 31,084 verses in English and Spanish, `kjv-web` in old and modern English, as
DIR/NAME.tsv with a manifest, from packages of Debian and Ubuntu that it downloads and unpacks
without root."""

from __future__ import annotations

import argparse
import os
from typing import Any

from jaxformer.cli.common import SECTIONS, Overrides, answer, note, of_data
from jaxformer.config import InputError
from jaxformer.overrides import override

OVERRIDES = True
BIBLES = {'kjv-es': 'verses in English and Spanish', 'kjv-web': 'verses in old and modern English'}


def arguments(parser: argparse.ArgumentParser) -> None:
  actions = parser.add_subparsers(
    dest='action', required=True, metavar='info|train-tokenizer|kjv-es|kjv-web'
  )
  info = actions.add_parser('info', help='what the splits hold', allow_abbrev=False)
  info.add_argument('--json', action='store_true')
  train = actions.add_parser('train-tokenizer', help='learn byte pairs', allow_abbrev=False)
  train.add_argument('out', metavar='OUT', help='a file to write, tokenizer.json by custom')
  train.add_argument('--vocab-size', type=int, default=4096)
  for name, what in BIBLES.items():
    bible = actions.add_parser(name, help=what, allow_abbrev=False)
    bible.add_argument('--out', required=True, metavar='DIR', help='a folder to write into')
    bible.add_argument(
      '--packages',
      metavar='DIR',
      help='a folder with the .deb files, or with what is in them; else they are '
      'looked for in /usr/share/sword and downloaded by apt-get',
    )
    bible.add_argument('--json', action='store_true', help='print the manifest')


def run(args: argparse.Namespace, overrides: Overrides) -> None:
  for path, _ in overrides:
    if path.partition('.')[0] in SECTIONS and (not of_data(path) or args.action in BIBLES):
      raise InputError(
        f'--{path}: `jaxformer data {args.action}` takes '
        + ('no overrides' if args.action in BIBLES else 'overrides of data alone')
      )
  if args.action in BIBLES:
    _prepare(args)
    return
  from jaxformer.data import BytePairs, DataConfig, Pairs
  from jaxformer.data.pipeline import DataSection

  data = override(DataSection(), overrides).data
  if not isinstance(data, DataConfig | Pairs):
    raise InputError(f'--data {data.tag}: a task, which has no text; DataConfig and Pairs have')
  if args.action == 'train-tokenizer':
    BytePairs(vocab_size=args.vocab_size)  # the same limits
    note(f'{args.out}: {_train_tokenizer(data, args.vocab_size, args.out)} tokens')
  elif isinstance(data, DataConfig):
    _text_info(data, args.json)
  else:
    _pairs_info(data, args.json)


def _train_tokenizer(data: Any, vocab_size: int, out: str) -> int:
  from jaxformer.data import DataConfig, train_bpe
  from jaxformer.data.pair_cache import training_texts
  from jaxformer.data.tokenizers import write_bpe

  if isinstance(data, DataConfig):
    return train_bpe(data.source, vocab_size, out, data.split)
  return write_bpe(
    training_texts(data.corpus, data.split, source=True, target=True), vocab_size, out
  )


def _prepare(args: argparse.Namespace) -> None:
  from jaxformer.data.sword import prepare

  manifest = prepare(args.action, args.out, args.packages, note)
  path = os.path.join(args.out, manifest['file']['name'])

  def lines() -> list[str]:
    left = manifest['left_out']
    return [
      f'{path}: {manifest["pairs"]:,} pairs in {manifest["chapters"]:,} chapters, sha256 '
      f'{manifest["file"]["sha256"]}',
      f'  verses of one side alone: {left["source"]:,} of {manifest["source"]["title"]}, '
      f'{left["target"]:,} of '
      f'{manifest["target"]["title"]}',
      f'  to use it: --data Pairs --data.corpus Tsv --data.corpus.path {path} '
      '--data.corpus.document_column 3',
    ]

  answer(manifest, args.json, lines)


def _text_info(data: Any, as_json: bool) -> None:
  d = data.open(log=note)
  value = d.manifest | {
    'unigram_bits_per_byte': d.unigram_bits_per_byte(),
    'bigram_bits_per_byte': d.bigram_bits_per_byte(),
  }

  def lines() -> list[str]:
    return [
      f'{data.source.tag}, {data.tokenizer.tag} (vocabulary {d.vocab_size})',
      f'  training    {d.train_tokens:,} tokens',
      f'  validation  {d.validation_tokens:,} tokens, {d.validation_bytes:,} bytes',
      '  bits per byte of the validation text: unigram model '
      f'{value["unigram_bits_per_byte"]:.3f}, '
      f'bigram {value["bigram_bits_per_byte"]:.3f}',
    ]

  answer(value, as_json, lines)


def _pairs_info(data: Any, as_json: bool) -> None:
  d = data.open(log=note)

  def lines() -> list[str]:
    out = [
      f'{data.corpus.tag}, vocabulary {d.source_vocab_size} to {d.vocab_size}; '
      f'{d.manifest["empty"]:,} pairs left out with an '
      'empty text'
    ]
    for name in ('train', 'validation'):
      side = d.manifest[name]
      out.append(
        f'  {name:<10}  {side["pairs"]:,} pairs, {side["source"]["tokens"]:,} tokens to '
        f'{side["target"]["tokens"]:,}; '
        f'{side["too_long"]:,} left out as too long'
      )
      out += [f'    {b["pairs"]:>10,} in {b["source"]} x {b["target"]}' for b in side['buckets']]
    return out

  answer(d.manifest, as_json, lines)
