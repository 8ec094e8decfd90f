"""A plan of every preset on every chip, in training, prefill and decoding.

Question: does `jaxformer plan NAME --target TARGET --phase PHASE` answer for each of them on a
machine without an accelerator: with a plan whose numbers are finite and whose bound is positive, or
with a refusal that names field, value and what is accepted?

    python experiments/plan_every_target.py             # all
    python experiments/plan_every_target.py mamba h100  # presets with `mamba` in the name, one chip
    python experiments/plan_every_target.py --sample 30 # so many random ones

Of each chip the target has 8, 64, 512 or 4,096 devices, or is the largest slice offered: the first
that holds the model, else the first that has a plan. Traces shapes alone. A refusal without field,
value and what is accepted, and anything else than a plan or an `InputError`, is listed as a failure
(exit code 1); so are those of the targets that were tried before.

Cost: 3 to 50 seconds of a CPU core per preset; programs are traced once per platform and batch.
Result (2026-11-30, two shared CPU cores without an accelerator): 56 of 97 presets on all 24 chips
in the three phases, 4,032 combinations: 3,864 planned, of which 64 fit on no target that was tried
(gpt3-175b 52, gpt3-13b 10, gpt3-6.7b 2), 168 refused, none failed. Refused are the prefill and
decoding of classifiers (144), and the training of lstm-zaremba-medium, whose batch of 20 no target
that was tried divides (24). At first these 24 failed: the refusal did not say what is accepted. Not
run yet: jamba-v0.1 and the presets of Llama, Mamba, Mamba-2, Mixtral and RWKV other than the tiny
ones, 41 in all.
"""

import argparse
import collections
import json
import os
import random
import re
import sys
import time
from collections.abc import Iterator

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jaxformer as jf
from jaxformer.hardware import CHIPS
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from jaxformer.planning.target import offered_sizes, parse_target

PHASES = 'train', 'prefill', 'decode'
DEVICES = 8, 64, 512, 4096
REFUSAL = re.compile(
  r'(\S.*) = (.+): (must be|\S+ .*(reads|is)) '
)  # field, value, what is accepted


def targets(chip: str) -> Iterator[str]:
  """Slices or hosts of a chip with the numbers of devices of `DEVICES`, smallest first."""
  c = CHIPS[chip]
  sizes = [n // c.devices for n in DEVICES]
  if c.domain:
    yield from (f'{chip}:{n}' for n in sizes)
    return
  offered = list(offered_sizes(chip))
  sizes = [next((o for o in offered if o >= n), offered[-1]) for n in sizes] + [offered[-1]]
  yield from (f'{chip}-{n * c.cores}' for n in dict.fromkeys(sizes))


def plan(preset: str, target: str, phase: str) -> str:
  """Return 'planned' (with 'fits' or 'does not fit'), why it was refused, or what failed."""
  try:
    found = jf.plan(preset, target=target, phase=phase, log=lambda line: None)
    value = json.loads(json.dumps(found.json(), allow_nan=False))
    bound = value['step']['seconds']
    if not (found.lines() and 0 < bound < 1e12):
      return f'failed: bound {bound}'
    return 'planned: ' + ('fits' if value['memory']['fits'] else 'does not fit')
  except jf.InputError as e:
    return f'refused: {e}' if REFUSAL.match(str(e)) else f'failed: refused without a field: {e}'
  except Exception as e:
    return f'failed: {type(e).__name__}: {e}'


def tried(preset: str, chip: str, phase: str) -> tuple[str, list[tuple[str, str]]]:
  """Return the answer for a preset on a chip, and each target that was tried with its answer."""
  least = define(PRESETS[preset].model).size * (14 if phase == 'train' else 2)
  names = [(n, parse_target(n)) for n in targets(chip)]
  large = [n for n, t in names if t.devices * t.device_memory_bytes > least] or [names[-1][0]]
  answers: list[tuple[str, str]] = []
  for name in large:
    answers.append((name, plan(preset, name, phase)))
    if answers[-1][1] == 'planned: fits' or 'phase = ' in answers[-1][1]:
      break
  best = max(reversed(answers), key=lambda a: (a[1] == 'planned: fits', a[1].startswith('planned')))
  failed = [a for _, a in answers if a.startswith('failed')]
  return failed[0] if failed else best[1], answers


def combinations(words: list[str], sample: int | None) -> list[tuple[str, str, str]]:
  """Presets, chips and phases, those of one preset after one another."""
  presets = [n for n in PRESETS if any(w in n for w in words)] or list(PRESETS)
  chips = [n for n in CHIPS if n in words] or list(CHIPS)
  every = [(n, c, p) for n in presets for p in PHASES for c in chips]
  return every if sample is None else random.Random(0).sample(every, sample)


def main(words: list[str]) -> int:
  parser = argparse.ArgumentParser()
  parser.add_argument('words', nargs='*')
  parser.add_argument('--sample', type=int)
  options = parser.parse_args(words)
  counts: collections.Counter[str] = collections.Counter()
  kinds: collections.Counter[str] = collections.Counter()
  began, plans, before = time.perf_counter(), 0, None
  for preset, chip, phase in combinations(options.words, options.sample):
    if preset != before:
      print(f'{time.perf_counter() - began:.0f} s, {dict(counts)}: {preset}', flush=True)
      before = preset
    answer, answers = tried(preset, chip, phase)
    plans += len(answers)
    counts[answer if answer.startswith('planned') else answer.partition(':')[0]] += 1
    for target, each in answers:
      if each.startswith('failed'):
        print(f'{preset} on {target}, {phase}: {each}', flush=True)
      if each.startswith('refused'):
        kinds[re.sub(r'\d[\d,]*', 'N', each)] += 1
  what = ', '.join(f'{n} {what}' for what, n in sorted(counts.items()))
  print(f'{counts.total()} combinations, {plans} plans: {what}')
  for kind, n in kinds.most_common():
    print(f'{n} x {kind}')
  return int(counts['failed'] > 0)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
