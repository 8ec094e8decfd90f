"""RWKV and Mamba decode in constant memory; transformers do not. No context limit does not mean
good long-context quality.

Question: how large is the decoding state of each, and is a model without a context limit still good
well beyond its training length?

    python experiments/claims/constant_memory.py

Memory: the decoding state, allocated for contexts up to 65,536 tokens and compared with the count
that each config derives from its shapes.

Quality: a transformer (with rotary positions, so that it has no limit either), RWKV-4, RWKV-7,
Mamba and Mamba-2 of equal size, trained on the built-in text in rows of 128 bytes at one learning
rate, with three seeds that see the same rows. Every run then reads held-out rows of 16 times that
length twice: at once, and in pieces of the training length. The loss of the same targets is
compared, those in the later half of each piece: once with 64 to 127 preceding bytes, once with all
preceding bytes of the row. So neither the position in a file nor the choice of rows affects the
comparison; rows are cut from the stream of documents regardless of document boundaries, as in
training. A difference above zero means that reading beyond the training length costs quality, below
zero that the model gains from it. Intervals are over seeds, and verdicts are corrected for the five
comparisons (Holm).

The first sentence of the claim is supported if the state of the recurrences does not grow and that
of the transformer grows in proportion; the second if at least one recurrence gets worse beyond its
training length, or at least does not get better.

Cost: six minutes on one CPU core.

Result (jax 0.10.2): partly supported. From 256 to 65,536 tokens the state of the transformer grows
256 times (131 kB to 33.6 MB), that of RWKV-4, RWKV-7, Mamba and Mamba-2 is constant (2.24, 8.7,
21.9 and 109 kB). Read at once over 16 times the training length, the loss of the same targets
differs by +0.393 ± 0.463 nats per byte for the transformer (worse in each of the three seeds, but
by amounts too unequal for significance), and by -0.001 ± 0.003, +0.002 ± 0.007, +0.001 ± 0.001 and
+0.001 ± 0.004 for the recurrences: they read on without loss and without gain."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import gallery
import jax
import numpy as np
from gallery import signed

from jaxformer.data import Batch, Dataset, Text, open_data
from jaxformer.evaluation import loss_by_position
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import Definition, define
from jaxformer.study.charts import Axis, Point, Series
from jaxformer.study.runner import Tuned, run_study
from jaxformer.study.statistics import Difference, compare, estimate
from jaxformer.study.study import ScaledFamily, Study
from jaxformer.study.tables import amount
from jaxformer.training import load_params
from jaxformer.training.interrupt import Interrupt

CLAIM = (
  'RWKV and Mamba decode in constant memory; transformers do not. No context limit does not mean '
  'good long-context quality '
  '(loss by position beyond the training length).'
)
TRANSFORMER = 'transformer'
FAMILIES = {
  TRANSFORMER: 'llama3',
  'RWKV-4': 'rwkv4',
  'RWKV-7': 'rwkv7',
  'Mamba': 'mamba',
  'Mamba-2': 'mamba2',
}
LENGTH, TIMES = 128, 16
CONTEXTS = (256, 1024, 4096, 16384, 65536)
REACHES = (2, 4, 16)  # times the training length, up to which a difference is taken
ROWS, BATCH = 16, 16  # of held-out text
BIN = 64  # positions of a point in the picture

Found = dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]
"""Family -> seed -> the loss at each position of a row read in one go, and of the same row read in
pieces."""
NO_EFFECT = 'The recurrences neither lose nor gain from context beyond their training length. '


def study(args) -> Study:
  """Return the study: equal size, the same rows, one rate."""
  return Study(
    name=f'claim-03-{args.scale:g}',
    entries=tuple(ScaledFamily(family=f, name=n) for n, f in FAMILIES.items()),
    target=1e5,
    tasks=(Text(sequence_length=LENGTH, packing='stream'),),
    tokens=int(150_000 * args.scale),
    batch_size=4,
    learning_rates=(3e-3,),
    seeds=(1, 2, 3),
    runs_per_program=3,
    eval_batches=32,
    contexts=(),
    timing_repeats=0,
    dir=args.runs,
  )


# ---- memory ------------------------------------------------------------------------------------


def state_bytes(config: ModelConfig, contexts: tuple[int, ...]) -> list[int]:
  """Of the numbers that decoding one sequence carries in fp32, for each context; held to the
  config's own count."""
  definition = define(config)
  module: Any = definition.merge(definition.init(jax.random.key(0)))
  sizes = [
    sum(x.nbytes for x in jax.tree.leaves(module.init_state(1, c).stack) if x.dtype == 'float32')
    for c in contexts
  ]
  assert sizes == [4 * (config.state_size(c) or 0) for c in contexts], (
    f'{sizes} bytes are not those declared'
  )
  return sizes


# ---- quality -----------------------------------------------------------------------------------


def losses(
  definition: Definition, folder: str, data: Dataset, rows: int
) -> tuple[np.ndarray, np.ndarray]:
  """Of a run: the held-out loss at each position of so many long rows, read in one go, and in
  pieces of the training length. Kept in the run's folder."""
  length = data.config.positions
  file = pathlib.Path(folder) / f'losses-{rows}-{length}.npy'
  if not file.exists():
    params = load_params(folder, definition).params
    batches = data.validation_batches(min(rows, BATCH), -(-rows // BATCH))
    whole = [Batch(b.inputs, b.targets_BT, None) for b in batches if isinstance(b, Batch)]
    parts = [slice(i, i + LENGTH) for i in range(0, length, LENGTH)]

    def loss(batches: Iterable[Batch]) -> list[float]:
      return [r.loss if r else math.nan for r in loss_by_position(definition, params, batches)]

    cut = [loss(Batch(b.inputs[:, p], b.targets_BT[:, p], None) for b in whole) for p in parts]
    np.save(file, [loss(whole), np.concatenate(cut)])
  in_one_go, in_pieces = np.load(file)
  return in_one_go, in_pieces


def compared(reach: int, start: int = 1) -> np.ndarray:
  """Positions of a row from piece `start` on and below piece `reach`, the later half of each
  piece."""
  at = np.arange(start * LENGTH, reach * LENGTH)
  return at[at % LENGTH >= LENGTH // 2]


def differences(found: Found, reach: int, start: int = 1) -> dict[str, Difference]:
  """Return, by family, the loss read at once minus the loss read in pieces, of the same targets."""
  at = compared(reach, start)
  scores = {
    title: {seed: float(whole[at].mean() - cut[at].mean()) for seed, (whole, cut) in runs.items()}
    for title, runs in found.items()
  }
  zero = dict.fromkeys(next(iter(scores.values())), 0.0)
  return {d.name: d for d in compare(scores | {'pieces': zero}, 'pieces')}


# ---- the answer --------------------------------------------------------------------------------


def decide(
  memory: dict[str, list[int]], beyond: dict[int, dict[str, Difference]]
) -> tuple[gallery.Verdict, str]:
  """Return the verdict, and why."""
  growth = {name: sizes[-1] / sizes[0] for name, sizes in memory.items()}
  recurrences = [name for name in FAMILIES if name != TRANSFORMER]
  constant = all(growth[n] == 1 for n in recurrences) and growth[TRANSFORMER] > 1
  farthest = beyond[max(beyond)]
  said = {
    v: [n for n in FAMILIES if farthest[n].verdict == v]
    for v in {d.verdict for d in farthest.values()}
  }
  worse = [n for n in said.get('worse', []) if n != TRANSFORMER]
  gains = [n for n in said.get('better', []) if n != TRANSFORMER]
  limited = bool(worse) or len(gains) < len(recurrences)
  verdict: gallery.Verdict = (
    'supported'
    if constant and worse
    else 'partly supported'
    if constant or limited
    else 'contradicted'
  )
  parts = [f'{n} {signed(farthest[n].estimate)}' for n in FAMILIES]
  words = {
    'better': 'gain',
    'worse': 'lose',
    'no significant difference': 'show no significant difference',
  }
  summary = '; '.join(f'{", ".join(names)} {words.get(v, v)}' for v, names in sorted(said.items()))
  because = (
    f"From {CONTEXTS[0]:,} to {CONTEXTS[-1]:,} tokens the transformer's state grows "
    f'{growth[TRANSFORMER]:.0f} times, that of the '
    f'recurrences {"not at all" if constant else "too"}. Reading rows of {TIMES} times the '
    'training length in one go '
    'instead of in pieces of it changes the loss of the same targets, in nats per byte (95 % over '
    f'seeds): {", ".join(parts)}; '
    f'{summary}. '
    f'{"" if worse or gains else NO_EFFECT}'
    'No family had a limit, the transformer included: its rotary positions extend to any length. '
    'Runs this short '
    'say little of large models.'
  )
  return verdict, because


def rows(
  entries: tuple[Tuned, ...],
  memory: dict[str, list[int]],
  beyond: dict[int, dict[str, Difference]],
  found: Found,
) -> tuple[tuple[str, ...], ...]:
  trained = {
    n: estimate([float(cut[compared(TIMES)].mean()) for _, cut in runs.values()])
    for n, runs in found.items()
  }
  return tuple(
    (
      t.title,
      f'{define(t.model).size:,}',
      amount(memory[t.title][0], 'B'),
      amount(memory[t.title][-1], 'B'),
      f'{trained[t.title].mean:.3f}',
      *(signed(beyond[r][t.title].estimate) for r in REACHES),
      beyond[max(REACHES)][t.title].verdict,
    )
    for t in entries
  )


def pictures(memory: dict[str, list[int]], found: Found) -> list[gallery.Picture]:
  kept, by_position = [], []
  for i, name in enumerate(FAMILIES):
    kept.append(
      Series(
        name, i, tuple(Point(c, s) for c, s in zip(CONTEXTS, memory[name], strict=True)), line=True
      )
    )
    mean = (
      np.mean([whole for whole, _ in found[name].values()], axis=0).reshape(-1, BIN).mean(axis=1)
    )
    each = [
      np.asarray(whole - cut).reshape(-1, BIN).mean(axis=1) for whole, cut in found[name].values()
    ]
    by_position.append((name, i, mean, [estimate(values) for values in np.array(each).T]))
  at = BIN * (np.arange(TIMES * LENGTH // BIN) + 0.5)
  later = [(k, x) for k, x in enumerate(at) if x % LENGTH >= LENGTH / 2]
  x = Axis(f'position (trained up to {LENGTH})', log=True, form='{:g}'.format)
  return [
    gallery.Picture.of(
      'state',
      'State size of one sequence in decoding, by context length',
      kept,
      Axis('tokens of context', log=True, form='{:,.0f}'.format),
      Axis('bytes', log=True, form=lambda v: amount(v, 'B')),
    ),
    gallery.Picture.of(
      'position',
      f'Held-out loss by position, trained at {LENGTH}; the mean over seeds',
      [
        Series(n, i, tuple(Point(a, m) for a, m in zip(at, mean, strict=True)), line=True)
        for n, i, mean, _ in by_position
      ],
      x,
      Axis('nats per byte'),
    ),
    gallery.Picture.of(
      'difference',
      'Loss of a row read at once minus loss in pieces of the training length',
      [
        Series(n, i, tuple(Point(a, e[k].mean, e[k].low, e[k].high) for k, a in later), line=True)
        for n, i, _, e in by_position
      ],
      x,
      Axis('nats per byte'),
    ),
  ]


def main() -> None:
  args = gallery.arguments(__doc__).parse_args()
  s = study(args)
  with Interrupt() as interrupt:
    entries = run_study(s, print, interrupt)[s.task_titles[0]]
  data = open_data(s.tasks[0].replace(sequence_length=TIMES * LENGTH))
  found = {
    t.title: {r.seed: losses(define(t.model), r.folder, data, ROWS) for r in t.runs}
    for t in entries
  }
  memory = {t.title: state_bytes(t.model, CONTEXTS) for t in entries}
  beyond = {reach: differences(found, reach) for reach in REACHES}
  verdict, because = decide(memory, beyond)
  gallery.publish(
    args,
    gallery.Result(
      3,
      CLAIM,
      verdict,
      because,
      f'{s.target:,.0f} parameters each, {s.tokens:,} bytes of text in rows of {LENGTH}, one rate '
      f'({s.learning_rates[0]:g}), '
      f'{len(s.seeds)} seeds; {ROWS} held-out rows of {TIMES * LENGTH:,}',
      (
        'family',
        'parameters',
        f'state at {CONTEXTS[0]:,}',
        f'at {CONTEXTS[-1]:,}',
        'loss in pieces',
        *(f'in one go, to {r}x' for r in REACHES),
        f'to {max(REACHES)}x',
      ),
      rows(entries, memory, beyond, found),
      {
        'state_bytes': {'contexts': CONTEXTS, **memory},
        'loss_by_position': {
          n: {
            s: [round(float(v), 4) for v in whole.reshape(-1, 16).mean(axis=1)]
            for s, (whole, _) in runs.items()
          }
          for n, runs in found.items()
        },
        'difference': {
          r: {
            n: [d.estimate.mean, d.estimate.low, d.estimate.high, d.p_adjusted]
            for n, d in by.items()
          }
          for r, by in beyond.items()
        },
      },
    ),
    pictures(memory, found),
  )


if __name__ == '__main__':
  gallery.to_the_end(main)
