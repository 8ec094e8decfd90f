"""Score a trained model on held-out data: text in bits per byte, tasks by accuracy.

RUN is a run folder (which may be gs://BUCKET/FOLDER) or a name in runs/, with @STEP for an older
checkpoint, or a folder of Hugging Face weights with its tokenizer.json. The data are the validation
split of those that the run was trained on, or what --data... overrides select: --data.corpus Files
--data.corpus.path other.txt. Bits per byte do not depend on the tokenizer. A model trained on a
task is scored on its test sequences; a translation model also by BLEU and chrF."""

import argparse
from typing import Any

import jaxformer as jf
from jaxformer.cli.output import json_option, run_argument, show

OVERRIDES = True
JOINS = True


def arguments(parser: argparse.ArgumentParser) -> None:
  run_argument(parser)
  parser.add_argument('--batch-size', type=int, help='sequences per batch (16)')
  parser.add_argument(
    '--batches', type=int, help='number of batches, spread over the split; default: all'
  )
  parser.add_argument(
    '--translations',
    type=int,
    help='for translation: number of held-out sources to translate and score, spread over all '
    '(200); 0 for none',
  )
  parser.add_argument(
    '--by-position', action='store_true', help='also report the loss at each position'
  )
  json_option(parser, 'the scores as one JSON object')


def run(json: bool, **options: Any) -> None:
  show(jf.evaluate(**options), json)
