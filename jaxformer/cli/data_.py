"""Looks at the text of an experiment, or trains a tokenizer on it.

`jaxformer data info` shows what the splits hold, as bytes and tokens, and how well counting bytes predicts them.
`jaxformer data train-tokenizer OUT --vocab-size 4096` learns byte pairs (BPE) and writes OUT, a tokenizer.json that
--data.tokenizer TokenizerFile --data.tokenizer.path OUT uses. Both take --data... overrides.
"""

from __future__ import annotations

import argparse

from jaxformer.cli.common import SECTIONS, Overrides, answer, note, of_data
from jaxformer.config import InputError, override

OVERRIDES = True


def arguments(parser: argparse.ArgumentParser) -> None:
  actions = parser.add_subparsers(dest='action', required=True, metavar='info|train-tokenizer')
  info = actions.add_parser('info', help='what the splits hold', allow_abbrev=False)
  info.add_argument('--json', action='store_true')
  train = actions.add_parser('train-tokenizer', help='learn byte pairs', allow_abbrev=False)
  train.add_argument('out', metavar='OUT', help='a file to write, tokenizer.json by custom')
  train.add_argument('--vocab-size', type=int, default=4096)


def run(args: argparse.Namespace, overrides: Overrides) -> None:
  from jaxformer.data import BytePairs, DataConfig, train_bpe
  for path, _ in overrides:
    if path.partition('.')[0] in SECTIONS and not of_data(path):
      raise InputError(f'--{path}: `jaxformer data` takes overrides of data alone')
  data = override(DataConfig(), overrides, root='data')
  if args.action == 'train-tokenizer':
    BytePairs(vocab_size=args.vocab_size)   # the same limits
    size = train_bpe(data.source, args.vocab_size, args.out, data.split)
    note(f'{args.out}: {size} tokens')
    return
  d = data.open(log=note)
  value = d.manifest | {'unigram_bits_per_byte': d.unigram_bits_per_byte(), 'bigram_bits_per_byte': d.bigram_bits_per_byte()}

  def lines() -> list[str]:
    return [
      f'{data.source.tag}, {data.tokenizer.tag} (vocabulary {d.vocab_size})', f'  training    {d.train_tokens:,} tokens',
      f'  validation  {d.validation_tokens:,} tokens, {d.validation_bytes:,} bytes',
      f'  bits per byte of the validation text: unigram model {value["unigram_bits_per_byte"]:.3f}, '
      f'bigram {value["bigram_bits_per_byte"]:.3f}']

  answer(value, args.json, lines)
