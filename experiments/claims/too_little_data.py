"""Claim 9: a larger model underperforms a smaller one when it has too little data.

Question: of two models that differ only in size, when does the larger one end worse?

    python experiments/claims/too_little_data.py [--scale 1]

"Too little data" has two senses; both are tested with a Llama-like transformer of 30 thousand and
one of 150 thousand parameters:

- Few texts. Both are trained for equal steps on equal numbers of tokens, but the texts are a few
  pieces of 500 characters of the built-in corpus, read repeatedly. A run is scored at its end and
  during training: its best score is that of early stopping (chosen on the held-out text itself,
  which is slightly optimistic for both).
- Few tokens for the compute. Both use equal training FLOPs on fresh text, so that the larger sees
  about a fifth of the tokens: the right-hand side of an isoFLOP curve.

In addition, both are trained on equally few tokens of fresh text, and, as a control, on as many
tokens as the smaller has at equal FLOPs, with which the larger should be better. The held-out text
is the same for all, from files that no training piece is from.

Each size has its own learning rate in each setting, the best of one grid on a separate seed. Four
seeds are paired by their data; differences are those of held-out bits per byte, larger minus
smaller, with 95 % intervals by Student's t, and p-values are corrected for all four comparisons
(Holm).

Verdict: supported if the larger is worse at the end on few texts and at equal FLOPs, and better in
the control; partly supported if one of these three fails; contradicted if the larger is better
everywhere; otherwise not supported.

`--scale` multiplies tokens and texts, and above 1 the larger size by its root.

Cost: 49 trainings, about a quarter of an hour on one shared core.

Result (jax 0.10.2): supported. On 3,000 tokens of text, read 27 times, the larger ends worse by
0.281 +- 0.121 bits per byte (p 0.01), although its learning rate was chosen by the score at the
end; with early stopping there is no significant difference (-0.014 +- 0.113). At equal FLOPs it
ends worse by 0.780 +- 0.144 (p 0.0013). In the control it is better by 0.167 +- 0.026 (p 0.001).
The control was added second: the first, on 80 thousand tokens for both, showed no significant
difference (-0.113 +- 0.267), since they are too few to train either, and is in the table as "few
tokens". The best rate of the smaller one on fresh text lay at an end of the grid, which had been
extended by one."""

from __future__ import annotations

import dataclasses
import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from gallery import Picture, Result, Verdict, arguments, publish, signed, to_the_end

from jaxformer.data import ByPosition, Files, StandardLibrary, Text, open_data
from jaxformer.data.splits import content_hash
from jaxformer.models.params import define
from jaxformer.planning.cost import flops_per_token
from jaxformer.study.charts import Axis, Point, Series
from jaxformer.study.runner import Trial, Tuned, run_study
from jaxformer.study.statistics import Estimate, compare, estimate, holm
from jaxformer.study.study import ScaledFamily, Study
from jaxformer.study.tables import amount
from jaxformer.training import read_metrics
from jaxformer.training.interrupt import Interrupt

CLAIM = 'A larger model underperforms a smaller one when it has too little data.'
SMALL, LARGE = 3e4, 1.5e5
FEW, FRESH = 3_000, 5_000_000  # characters of training text
PIECE, HELD_OUT = 500, 0.1  # characters of a piece; the share of files that are held out
TOKENS = 80_000
SEEDS = (1, 2, 3, 4)
BATCH, LENGTH = 4, 64
BITS = 'eval/bits_per_byte'


@dataclasses.dataclass(frozen=True)
class Run:
  """Held-out bits per byte: at the end, the best during training, and (step, bits) throughout."""

  end: float
  best: float
  curve: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Setting:
  """One comparison: what it is called, the tokens of its training text, those that each size was
  trained on, each size's parameters, training FLOPs per token, learning rate, whether that is at an
  end of what was tried, and runs by seed."""

  name: str
  texts: int
  tokens: tuple[int, int]
  params: tuple[int, int]
  flops_per_token: tuple[float, float]
  rates: tuple[float, float]
  at_edge: tuple[bool, bool]
  runs: tuple[dict[int, Run], dict[int, Run]]

  @property
  def passes(self) -> tuple[float, float]:
    return self.tokens[0] / self.texts, self.tokens[1] / self.texts

  def scores(self, of: str) -> dict[str, dict[int, float]]:
    names = ('smaller', 'larger')
    return {
      name: {seed: getattr(run, of) for seed, run in runs.items()}
      for name, runs in zip(names, self.runs, strict=True)
    }

  def mean(self, size: int, of: str) -> Estimate:
    return estimate([getattr(run, of) for run in self.runs[size].values()])


def texts(characters: int, runs: str) -> Text:
  """So many characters of pieces to train on, and then the text that is held out, as one file under
  the runs."""
  # an order that chance decides, once for all
  files = sorted((row.texts[0] for row in StandardLibrary().rows()), key=content_hash)
  held_out = ''.join(files[: round(HELD_OUT * len(files))])
  rest = [
    text[i : i + PIECE]
    for text in files[round(HELD_OUT * len(files)) :]
    for i in range(0, len(text), PIECE)
  ]
  train = ''.join(sorted(rest, key=content_hash))[:characters]
  file = pathlib.Path(runs) / 'too-little-data' / f'texts-{characters}.txt'
  content = (train + held_out).encode()
  if not file.exists() or file.read_bytes() != content:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
  split = ByPosition(fraction=len(held_out) / (len(train) + len(held_out)))
  return Text(corpus=Files(path=str(file)), sequence_length=LENGTH, split=split)


def study(target: float, tokens: int, data: Text, runs: str) -> Study:
  return Study(
    name='too-little-data',
    entries=(ScaledFamily(family='llama2', name='transformer'),),
    target=target,
    tolerance=0.05,
    tasks=(data,),
    tokens=tokens,
    batch_size=BATCH,
    learning_rates=(3e-4, 1e-3, 3e-3),
    max_grid_extensions=1,
    seeds=SEEDS,
    runs_per_program=4,
    eval_batches=64,
    evaluations=6,
    contexts=(),
    timing_repeats=0,
    dir=runs,
  )


def trained(s: Study, interrupt: Interrupt) -> tuple[Tuned, dict[int, Run]]:
  ((found,),) = run_study(s, lambda line: print(line, flush=True), interrupt).values()
  return found, {trial.seed: _run(trial) for trial in found.runs}


def _run(trial: Trial) -> Run:
  curve = tuple(
    (row['step'], row[BITS]) for row in read_metrics(trial.folder) if row.get(BITS) is not None
  )
  return Run(curve[-1][1], min(bits for _, bits in curve), curve)


def settings(scale: float, runs: str, interrupt: Interrupt) -> list[Setting]:
  sizes, tokens = (SMALL, LARGE * max(1, scale) ** 0.5), int(TOKENS * scale)
  few, fresh = (texts(round(n * max(1, scale)), runs) for n in (FEW, FRESH))
  vocabulary = open_data(fresh).tokenizer.vocab_size
  models = [
    s.entries[0].model(s, vocabulary, LENGTH)
    for s in (study(size, tokens, fresh, runs) for size in sizes)
  ]
  params, costs = [define(m).size for m in models], [flops_per_token(m, LENGTH) for m in models]

  def setting(name: str, data: Text, tokens: tuple[int, int]) -> Setting:
    studies = [study(size, n, data, runs) for size, n in zip(sizes, tokens, strict=True)]
    (small, small_runs), (large, large_runs) = (trained(s, interrupt) for s in studies)
    read = [s.steps(data) * BATCH * LENGTH for s in studies]
    return Setting(
      name,
      open_data(data).train_tokens,
      (read[0], read[1]),
      (params[0], params[1]),
      (costs[0], costs[1]),
      (small.rate, large.rate),
      (small.at_edge, large.at_edge),
      (small_runs, large_runs),
    )

  many = int(tokens * costs[1] / costs[0])
  return [
    setting('few texts', few, (tokens, tokens)),
    setting('few tokens', fresh, (tokens, tokens)),
    setting('control', fresh, (many, many)),
    setting('equal FLOPs', fresh, (many, tokens)),
  ]


def judged(found: list[Setting]) -> list[dict]:
  """Return the differences of each setting, larger minus smaller, at the end and at the best during
  training; p of the ends is corrected over settings (Holm)."""
  ends = [compare(s.scores('end'), 'smaller')[0] for s in found]
  best = [compare(s.scores('best'), 'smaller')[0] for s in found]
  adjusted = holm([d.p for d in ends]), holm([d.p for d in best])

  def word(d, p: float) -> str:
    return 'no difference seen' if not p < 0.05 else 'better' if d.estimate.mean < 0 else 'worse'

  return [
    {
      'end': e.estimate,
      'end_p': pe,
      'end_word': word(e, pe),
      'best': b.estimate,
      'best_p': pb,
      'best_word': word(b, pb),
    }
    for e, b, pe, pb in zip(ends, best, *adjusted, strict=True)
  ]


def verdict(judgements: list[dict]) -> Verdict:
  few, _, control, flops = (j['end_word'] for j in judgements)
  borne_out = [few == 'worse', flops == 'worse', control == 'better']
  if all(borne_out):
    return 'supported'
  if sum(borne_out) == 2 and 'worse' in (few, flops):
    return 'partly supported'
  return 'contradicted' if all(j['end_word'] == 'better' for j in judgements) else 'not supported'


def because(found: list[Setting], judgements: list[dict]) -> str:
  parts = [
    f'The larger model has {found[0].params[1]:,} parameters, the smaller {found[0].params[0]:,}; '
    'differences are larger '
    'less smaller in held-out bits per byte, with 95 % intervals over paired seeds.'
  ]
  for s, j in zip(found[:-1], judgements[:-1], strict=True):
    parts.append(
      f'{s.name.capitalize()} ({amount(s.tokens[1])} for each, {s.passes[1]:.2g} passes): '
      f'{signed(j["end"])} at the end '
      f'({j["end_word"]}), {signed(j["best"])} at the best moment ({j["best_word"]}).'
    )
  s, j = found[-1], judgements[-1]
  parts.append(
    f'At equal FLOPs on fresh text, {amount(s.tokens[1])} tokens against {amount(s.tokens[0])}: '
    f'{signed(j["end"])} '
    f'({j["end_word"]}).'
  )
  if judgements[0]['end_word'] == 'worse':
    parts.append(
      {
        'worse': 'Stopping in time does not save the larger model on few texts.',
        'better': 'Stopped in time, the larger model is better even on few texts: it is training '
        'on that harms.',
        'no difference seen': 'Stopped in time, no difference is seen on few texts: it is training '
        'on that harms.',
      }[judgements[0]['best_word']]
    )
  return ' '.join(parts)


def table(found: list[Setting], judgements: list[dict]) -> tuple[tuple[str, ...], ...]:
  rows = []
  for s, j in zip(found, judgements, strict=True):
    for size, name in enumerate(('smaller', 'larger')):
      rates = f'{s.rates[size]:g}' + (' (at an end)' if s.at_edge[size] else '')
      own = (
        (signed(j['end']), f'{j["end_p"]:.2g}', signed(j['best']), f'{j["best_p"]:.2g}')
        if size
        else ('', '', '', '')
      )
      end, best = s.mean(size, 'end'), s.mean(size, 'best')
      rows.append(
        (
          s.name,
          f'{name}, {s.params[size]:,}',
          f'{s.tokens[size]:,}',
          f'{s.passes[size]:.2g}',
          rates,
          f'{end.mean:.3f} ± {end.half_width:.3f}',
          f'{best.mean:.3f} ± {best.half_width:.3f}',
          *own,
        )
      )
  return tuple(rows)


def pictures(found: list[Setting]) -> list[Picture]:
  few, flops, names = found[0], found[-1], ('smaller', 'larger')

  def on_the_way(s: Setting, size: int, unit: float) -> Series:
    runs, points = s.runs[size].values(), []
    for i, (step, _) in enumerate(next(iter(runs)).curve):
      e = estimate([run.curve[i][1] for run in runs])
      points.append(Point(step * BATCH * LENGTH * unit, e.mean, e.low, e.high))
    return Series(names[size], size, tuple(points), line=True)

  bits = Axis('bits per byte, held out')
  return [
    Picture.of(
      'passes',
      f'Held-out score on the way through {few.texts:,} tokens of text, read again and again',
      [on_the_way(few, size, 1 / few.texts) for size in (0, 1)],
      Axis('passes over the texts'),
      bits,
    ),
    Picture.of(
      'flops',
      'Held-out score during training on fresh text, against training FLOPs, to equal totals',
      [on_the_way(flops, size, flops.flops_per_token[size]) for size in (0, 1)],
      Axis('training FLOPs', True, amount),
      bits,
    ),
  ]


def main() -> None:
  args = arguments(__doc__).parse_args()
  with Interrupt() as interrupt:
    found = settings(args.scale, args.runs, interrupt)
  judgements = judged(found)
  data = {
    s.name: {
      **dataclasses.asdict(s),
      **{k: dataclasses.asdict(v) if isinstance(v, Estimate) else v for k, v in j.items()},
    }
    for s, j in zip(found, judgements, strict=True)
  }
  header = (
    'setting',
    'model',
    'tokens trained',
    'passes',
    'rate',
    'end',
    'best moment',
    'larger minus smaller, end',
    'p (Holm)',
    'larger minus smaller, best',
    'p (Holm)',
  )
  publish(
    args,
    Result(
      9,
      CLAIM,
      verdict(judgements),
      because(found, judgements),
      f'{found[0].params[0]:,} and {found[0].params[1]:,} parameters; {found[0].tokens[0]:,} '
      'tokens per run, at equal FLOPs '
      f'{found[-1].tokens[0]:,} of the smaller; bytes of the standard library in sequences of '
      f'{LENGTH}; {len(SEEDS)} seeds.',
      header,
      table(found, judgements),
      data,
    ),
    pictures(found),
  )


if __name__ == '__main__':
  to_the_end(main)
