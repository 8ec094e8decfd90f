"""A plan of every preset on every chip, in training, prefill and decoding.

Question: does `jaxformer plan NAME --target TARGET --phase PHASE` answer for each of them, with
numbers that are finite and bounds that are positive?

    python experiments/plan_every_target.py            # all
    python experiments/plan_every_target.py mamba h100 # presets and targets with these names
    python experiments/plan_every_target.py --sample 3 # three random targets for each preset

Traces shapes alone. A preset that does not decode, or whose batch a target does not divide, is
refused by field, value and what is accepted; a refusal without them, or anything else than a plan
or an `InputError`, is listed as a failure (exit code 1).

Cost: some twenty minutes of one CPU core, a sample of three five; programs that were traced once
are not traced again.
Result: see `main`'s last lines, with the kinds of refusals.
"""

import argparse
import collections
import json
import os
import random
import re
import sys
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jaxformer as jf
from jaxformer.models.zoo import PRESETS
from jaxformer.planning.hardware import CHIPS

# of each chip, a slice or host of moderate size
TARGETS = {name: f'{name}:8' if c.domain else f'{name}-{16 * c.cores}' for name, c in CHIPS.items()}
TARGETS |= {'v3': 'v3-32', 'several slices': '2 x v5e-16', 'hosts': 'h100:64'}
PHASES = 'train', 'prefill', 'decode'
REFUSAL = re.compile(
  r'(\S.*) = (.+): (must be|a \S+ (reads|is)) '
)  # field, value, what is accepted


def plan(preset: str, target: str, phase: str) -> str:
  """Return 'planned', why it was refused, or what failed."""
  try:
    found = jf.plan(preset, target=target, phase=phase, log=lambda line: None)
    text = json.dumps(found.json(), allow_nan=False)
    bound = found.json()['step']['seconds']
    return 'planned' if text and found.lines() and 0 < bound < 1e12 else f'failed: bound {bound}'
  except jf.InputError as e:
    return f'refused: {e}' if REFUSAL.match(str(e)) else f'failed: refused without a field: {e}'
  except Exception as e:
    return f'failed: {type(e).__name__}: {e}'


def main(words: list[str]) -> int:
  parser = argparse.ArgumentParser()
  parser.add_argument('words', nargs='*')
  parser.add_argument('--sample', type=int)
  options = parser.parse_args(words)
  words, sample = options.words, options.sample
  presets = [n for n in PRESETS if any(w in n for w in words)] or list(PRESETS)
  targets = [t for n, t in TARGETS.items() if n in words] or list(TARGETS.values())
  counts: collections.Counter[str] = collections.Counter()
  kinds: collections.Counter[str] = collections.Counter()
  choose = random.Random(0)
  began = time.perf_counter()
  for i, preset in enumerate(presets, 1):
    some = targets if sample is None else choose.sample(targets, sample)
    answers = {(t, p): plan(preset, t, p) for p in PHASES for t in some}
    for (target, phase), answer in answers.items():
      counts[answer.partition(':')[0]] += 1
      if answer.startswith('failed'):
        print(f'{preset} on {target}, {phase}: {answer}', flush=True)
      if answer.startswith('refused'):
        kinds[re.sub(r'\d+', 'N', answer)] += 1
    print(f'{i}/{len(presets)} {preset} {time.perf_counter() - began:.0f} s', flush=True)
  print(', '.join(f'{n} {what}' for what, n in counts.items()))
  for kind, n in kinds.most_common():
    print(f'{n} x {kind}')
  return int(counts['failed'] > 0)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
