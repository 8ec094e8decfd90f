"""Claim 1: "A vanilla seq2seq decoder loses quality as the source grows longer; attention removes
that; the transformer does too and reads its input in parallel."

Question: does a decoder that sees its source as one vector lose quality on longer sources, and do
attention and the transformer avoid this?

Method: four generations of translation models, seq2seq LSTM (Sutskever et al. 2014), RNNsearch
(Bahdanau et al. 2014), GNMT (Wu et al. 2016) and the Transformer (Vaswani et al. 2017), with equal
numbers of parameters (within 2 %), the same grid of learning rates tried with a separate seed, and
the same pairs in the same order for equal seeds. There are two tasks:

- translation: English verses of the King James Bible to Spanish (`bible_pairs.py`), with
  byte pairs trained on both sides;
- copying: random letters. Everything that the decoder needs is in the source and nothing can be
  guessed, so whatever the one vector does not hold is missing from the output. This task is
  included because no model learns to translate at a budget of minutes: the output of a model
  trained this briefly hardly depends on the verse.

The grid of each task is centred on the best rates of a first trial, and is extended at most twice
if the best rate of a model lies at an end; the seeds of one model differ in initialization and in
the order of pairs.

Held-out pairs are scored in quarters by source length. The statistic is the increase of the
held-out loss (nats per target token, including the end) from the quarter of the shortest sources to
that of the longest, and its difference from that of the seq2seq LSTM, paired by seed: what makes
long texts easier or harder for every model cancels. BLEU of greedy translations (for copies, exact
match) is reported too; it varies less at this scale. The training step is timed in turns, and so is
encoding one source of 16 to 256 tokens; both are given only as ratios. A CPU core has little
parallelism, so this can only show that products over whole sequences use the core better than
sequential steps.

Verdict: of three statements, (1) the loss of seq2seq rises with source length; (2) that of
RNNsearch, of GNMT and of the transformer rises less, each; (3) the transformer's encoding time
grows less than that of each of the others. The first two are tested on both tasks. `p` is corrected
for the comparisons of a task (Holm).

Command: python experiments/claims/bottleneck.py (run again after an interruption, it resumes). It
needs the packages sword-text-kjv and sword-text-sparv, which it downloads by apt-get or finds under
--packages, and the extra `translation`.

Cost: about 45 minutes on one shared CPU core.

Result, of before the Transformer's matrices were initialized as in tensor2tensor (they were uniform
with variance 1 / inputs): partly supported, 4 of 11 comparisons. Copying supports it: seq2seq
copies all of the shortest texts (2 to 5 letters) exactly, and 8 % of the longest (14 to 16), while
RNNsearch and the Transformer stay at 99 % or more; its loss rises by +0.433 +- 0.017 nats, and
theirs by 0.431 +- 0.017 and 0.430 +- 0.008 less (p 0.0002 and less). GNMT falls as seq2seq does (99
% to 3 %; its loss rises by 0.236 +- 0.225 more, p 0.046), although it has attention; whether 625
steps are too few for it to learn to use attention was not investigated. Its tuning seed did much
better at the same rate. In a first trial with half the steps, two of its three seeds had learned
nothing, so the steps were doubled for all models.

Translation shows a gain from attention at every length, and no bottleneck: RNNsearch has BLEU 6.8
and 6.7 on the shortest and the longest quarter and 2.8 to 3.1 nats, the other three BLEU 1 to 2 and
3.4 to 3.7 nats; the loss of all four rises with source length, by 0.23 to 0.28, and no increase
differs significantly from that of seq2seq. A first trial with half of these steps gave the same
result (BLEU 3 at most). The output of a model trained this briefly hardly depends on the verse's
length.

Encoding time grows most for the Transformer (15 times from 16 to 256 tokens, the others 6 to 9; in
other trials on a busier machine 15 and 29): on a CPU core the recurrences lose little by being
sequential, and attention's quadratic cost shows. The third statement is contradicted there;
accelerators were not measured. A training step of RNNsearch takes 1.2 to 1.5 times that of seq2seq,
GNMT 1.2 to 1.9, the Transformer 1.1 to 1.5."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import numpy as np
from bible_pairs import prepare
from gallery import Picture, Result, arguments, note, publish, signed, to_the_end

from jaxformer.config import InputError
from jaxformer.data import BytePairs, Dataset, Pairs, PairTask, Tsv, open_data
from jaxformer.data.tasks.task import Side, integers
from jaxformer.evaluation import evaluate_translation, loss_by_source_length
from jaxformer.inference import translate
from jaxformer.models.params import Definition, define
from jaxformer.study.charts import Axis, Point, Series
from jaxformer.study.costs import measure_costs
from jaxformer.study.runner import Trial, Tuned, run_study
from jaxformer.study.sharing import Interrupted
from jaxformer.study.statistics import Difference, Estimate, compare, estimate
from jaxformer.study.study import ScaledFamily, Study
from jaxformer.training import load_params
from jaxformer.training.interrupt import Interrupt

CLAIM = (
  'A vanilla seq2seq decoder loses quality as the source grows longer; attention removes that; the '
  'transformer does too and '
  'reads its input in parallel.'
)
NAMES = {
  'seq2seq-lstm': 'seq2seq',
  'rnnsearch': 'RNNsearch',
  'gnmt': 'GNMT',
  'transformer': 'Transformer',
}
FIRST, LAST = 'seq2seq', 'Transformer'
LETTERS = 'abcdefghijklmnop'
TEXTS = 300  # translated a run
LENGTHS = (16, 32, 64, 128, 256)  # of sources to encode
ROUNDS = 15


class Copying(PairTask):
  """Random letters, `fewest` to `most` of them, to be copied. The numbers of the letters of
  a held-out text, and of no
  other, add up to a multiple of 16: no text is on both sides."""

  fewest: int = 2
  most: int = 24

  @property
  def positions(self) -> int:
    return self.most + 1

  @property
  def source_positions(self) -> int:
    return self.most + 1

  def texts(self, side: Side, index_N: np.ndarray) -> list[tuple[str, str]]:
    bits = self.random_bits(side, index_N, 1 + self.most)
    counts, letters = (
      self.fewest + integers(self.most - self.fewest + 1, bits[:, 0]),
      integers(len(LETTERS), bits[:, 1:]),
    )
    rows, last = np.arange(len(counts)), counts - 1
    sums = np.where(np.arange(self.most) < counts[:, None], letters, 0).sum(axis=1) % len(LETTERS)
    change = -sums if side == 'test' else (sums == 0).astype(sums.dtype)
    letters[rows, last] = (letters[rows, last] + change) % len(LETTERS)
    texts = [''.join(LETTERS[i] for i in row[:n]) for row, n in zip(letters, counts, strict=True)]
    return [(t, t) for t in texts]


def studies(args) -> dict[str, Study]:
  """Return the studies of the two tasks. Tokens grow with the scale, parameters with its root, the
  longest texts with its fourth root."""

  def length(at_one: int) -> int:
    return round(at_one * max(1.0, args.scale) ** 0.25 / 4) * 4

  file = pathlib.Path(args.runs) / 'kjv-es' / 'kjv-es.tsv'
  if not file.exists():
    prepare('kjv-es', file.parent, args.packages, note)
  verses = Pairs(
    corpus=Tsv(path=str(file), document_column=3),
    tokenizer=BytePairs(vocab_size=1024),
    source_lengths=(length(48),),
    target_lengths=(length(48),),
  )
  common = {
    'entries': tuple(ScaledFamily(family=f, name=n) for f, n in NAMES.items()),
    'target': 3e5 * max(1.0, args.scale) ** 0.5,
    'max_grid_extensions': 2,
    'seeds': (1, 2, 3),
    'runs_per_program': 3,
    'translations': 0,
    'contexts': (),
    'eval_batches': None,
    'batch_size': 32,
    'timing_repeats': 5,
    'dir': args.runs,
  }
  return {
    'copying': Study(
      name='bottleneck-copying',
      tasks=(Copying(most=length(16), test_sequences=600),),
      tokens=int(args.scale * 340_000),
      learning_rates=(0.003, 0.01),
      **common,
    ),
    'translation': Study(
      name='bottleneck-kjv-es',
      tasks=(verses,),
      tokens=int(args.scale * 800_000),
      learning_rates=(0.01, 0.0333),
      **common,
    ),
  }


@dataclasses.dataclass(frozen=True)
class Half:
  """Results of one of the two tasks.

  Attributes:
    quality: 'BLEU' or 'exact match', in per cent.
    groups: the shortest and the longest source of each quarter.
    tuned: of each model, by its name.
    runs: name -> seed -> {'loss': a number a quarter, 'quality': one a quarter}.
    step_seconds: of training, by name.
  """

  quality: str
  groups: list[tuple[int, int]]
  tuned: dict[str, Tuned]
  runs: dict[str, dict[int, dict[str, list[float]]]]
  step_seconds: dict[str, float]

  def rises(self, of: str) -> dict[str, dict[int, float]]:
    """From the shortest sources to the longest."""
    return {
      name: {s: r[of][-1] - r[of][0] for s, r in runs.items()} for name, runs in self.runs.items()
    }

  def over_seeds(self, name: str, of: str, group: int) -> Estimate:
    return estimate([r[of][group] for r in self.runs[name].values()])


def half_of(name: str, study: Study, interrupt: Interrupt) -> Half:
  """Train what is not trained yet, and measure."""
  task = study.tasks[0]
  done = run_study(study, note, interrupt)[study.task_titles[0]]
  dataset = open_data(task)
  quality = 'BLEU' if name == 'translation' else 'exact match'
  lengths = np.sort([len(p.source_ids) - 1 for p in dataset.held_out_pairs()])
  edges = np.unique(np.quantile(lengths, (0.25, 0.5, 0.75), method='lower')).tolist()
  groups = [lengths[np.searchsorted(edges, lengths) == g] for g in range(len(edges) + 1)]
  costs = measure_costs(study, done, dataset, note, interrupt)
  runs: dict[str, dict[int, dict[str, list[float]]]] = {}
  for t in done:
    definition = define(t.model)
    for trial in t.runs:
      if not np.isfinite(trial.loss):
        raise InputError(
          f'{trial.folder}: diverged; the other learning rates of the grid did not, so give other '
          'rates'
        )
      runs.setdefault(t.title, {})[trial.seed] = kept(trial, definition, dataset, edges, quality)
      if interrupt.signal is not None:
        raise Interrupted
  steps = {
    n: study.batch_size * task.positions / c.tokens_per_second
    for n, c in costs.items()
    if c.tokens_per_second
  }
  return Half(
    quality, [(int(g[0]), int(g[-1])) for g in groups], {t.title: t for t in done}, runs, steps
  )


def kept(
  trial: Trial, definition: Definition, dataset: Dataset, edges: list[int], quality: str
) -> dict[str, list[float]]:
  """A run's held-out loss and quality by quarter, written into its folder and read from there."""
  file = pathlib.Path(trial.folder) / 'by_source_length.json'
  if file.exists():
    return json.loads(file.read_text())
  params = load_params(trial.folder, definition).params
  losses = loss_by_source_length(definition, params, dataset.validation_batches(64), edges)
  end, most = dataset.tokenizer.end_of_document, dataset.config.positions  # no reference has more
  pairs = dataset.held_out_pairs(TEXTS)
  outputs = translate(
    definition,
    params,
    [p.source_ids for p in pairs],
    end=end,
    vocab_size=dataset.vocab_size,
    max_new_tokens=most,
  )
  found = evaluate_translation(
    [t.tokens for t in outputs], pairs, dataset.tokenizer, edges=edges, bootstrap=None
  ).by_length.values()
  scores = [s.metrics[quality].value if quality == 'BLEU' else 100 * s.exact_match for s in found]
  value = {'loss': [r.loss for r in losses], 'quality': scores}
  file.write_text(json.dumps(value) + '\n')
  note(
    f'{trial.folder}: loss by source length {" ".join(f"{v:.3f}" for v in value["loss"])}, '
    f'{quality} '
    f'{" ".join(f"{v:.1f}" for v in scores)}'
  )
  return value


def encoding(models: dict[str, Any]) -> dict[str, list[list[float]]]:
  """Return seconds to encode one source, name -> length -> round, timed in turns so that other load
  on the machine affects all."""
  programs = {}
  for name, model in models.items():
    definition = define(model)
    params = definition.init(jax.random.key(0))
    for n in LENGTHS:
      source = np.arange(n, dtype=np.int32)[None] % 256
      run = (
        jax.jit(lambda p, s, d=definition: d.merge(p).encode(s).y_BSC)
        .lower(params, source)
        .compile()
      )
      programs[name, n] = lambda run=run, params=params, source=source: jax.block_until_ready(
        run(params, source)
      )
  seconds: dict[str, list[list[float]]] = {name: [[] for _ in LENGTHS] for name in models}
  for round_ in range(ROUNDS + 1):  # the first warms up
    for (name, n), run in programs.items():
      took = []
      for _ in range(5):
        began = time.perf_counter()
        run()
        took.append(time.perf_counter() - began)
      if round_:
        seconds[name][LENGTHS.index(n)].append(statistics.median(took))
  return seconds


def judged(
  halves: dict[str, Half], seconds: dict[str, list[list[float]]]
) -> tuple[str, list[str], dict[str, list[Difference]]]:
  """Return the verdict, which statements hold, and the paired differences."""
  differences, held, against, said = {}, [], [], []
  for name, half in halves.items():
    rises = half.rises('loss')
    own, found = estimate(list(rises[FIRST].values())), compare(rises, FIRST)
    differences[name] = found
    held += [own.low > 0, *(d.verdict == 'better' for d in found)]
    against += [d.verdict == 'worse' for d in found]
    said.append(
      f'{name.capitalize()}: from the quarter of the shortest sources to that of the longest the '
      f'loss of {FIRST} '
      f'changes by {signed(own)} nats; against it, '
      + '; '.join(
        f'{d.name} {signed(d.estimate)} (p {d.p_adjusted:.2g}, {d.verdict})' for d in found
      )
      + '.'
    )
  growth = {n: dict(enumerate(np.array(of[-1]) / np.array(of[0]))) for n, of in seconds.items()}
  found = compare(growth, LAST)
  differences['encoding'] = found
  held += [d.verdict == 'worse' for d in found]
  against += [d.verdict == 'better' for d in found]
  said.append(
    f'Encoding {LENGTHS[-1]} tokens takes the {LAST} '
    f'{statistics.median(growth[LAST].values()):.1f} times what '
    f'{LENGTHS[0]} take; '
    + ', '.join(f'{d.name} {statistics.median(growth[d.name].values()):.1f}' for d in found)
    + (', on a CPU, which has little parallelism.' if jax.default_backend() == 'cpu' else '.')
  )
  verdict = (
    'supported'
    if all(held)
    else 'partly supported'
    if any(held)
    else 'contradicted'
    if any(against)
    else 'not supported'
  )
  return (
    verdict,
    [*said, f'{sum(held)} of {len(held)} comparisons made by the claim hold.'],
    differences,
  )


def percent(e: Estimate) -> tuple[float, float, float]:
  """The mean and the ends of its interval, which ends at 0 and 100 as the scores do."""
  return e.mean, max(0.0, e.low), min(100.0, e.high)


def grid(study: Study) -> str:
  return '/'.join(f'{r:g}' for r in study.learning_rates)


def rows(
  halves: dict[str, Half], differences: dict[str, list[Difference]]
) -> tuple[tuple[str, ...], ...]:
  out = []
  for half_name, half in halves.items():
    against = {d.name: d for d in differences[half_name]}
    for name, t in half.tuned.items():
      d = against.get(name)
      out.append(
        (
          f'{half_name}: {name}',
          f'{define(t.model).size:,}',
          f'{t.rate:g}' + (' (end of the grid)' if t.at_edge else ''),
          *(
            f'{e.mean:.3f} ± {e.half_width:.3f}'
            for e in (half.over_seeds(name, 'loss', g) for g in (0, -1))
          ),
          signed(estimate(list(half.rises('loss')[name].values()))),
          'baseline' if d is None else f'{signed(d.estimate)}, p {d.p_adjusted:.2g}: {d.verdict}',
          f'{half.quality} '
          + ', '.join(
            '{:.1f} ({:.1f} to {:.1f})'.format(*percent(half.over_seeds(name, 'quality', g)))
            for g in (0, -1)
          ),
          f'{half.step_seconds[name] / half.step_seconds[FIRST]:.2f}',
        )
      )
  return tuple(out)


HEADER = (
  'half: model',
  'parameters',
  'rate',
  'loss, shortest quarter',
  'loss, longest',
  'rise',
  f'rise against {FIRST}',
  'quality, shortest to longest',
  f'time of a training step / {FIRST}',
)


def pictures(halves: dict[str, Half], seconds: dict[str, list[list[float]]]) -> list[Picture]:
  out = []
  for half_name, half in halves.items():
    for of, label in (('loss', 'held-out loss, nats per token'), ('quality', f'{half.quality}, %')):
      series = []
      for style, name in enumerate(half.runs):
        at = [(sum(ends) / 2, half.over_seeds(name, of, g)) for g, ends in enumerate(half.groups)]
        points = tuple(
          Point(x, *(percent(e) if of == 'quality' else (e.mean, e.low, e.high))) for x, e in at
        )
        series.append(Series(name, style, points, line=True))
      caption = (
        f'{half_name.capitalize()}: {label} by length of the source, in quarters; bars are 95% '
        'intervals over seeds'
      )
      out.append(
        Picture.of(f'{half_name}-{of}', caption, series, Axis('tokens of the source'), Axis(label))
      )
  medians = {name: [statistics.median(s) for s in of] for name, of in seconds.items()}
  least = min(of[0] for of in medians.values())
  series = [
    Series(name, i, tuple(Point(n, s / least) for n, s in zip(LENGTHS, of, strict=True)), line=True)
    for i, (name, of) in enumerate(medians.items())
  ]
  out.append(
    Picture.of(
      'encoding',
      f'Time to encode one source, relative to the shortest, timed in turns; medians of {ROUNDS} '
      f'rounds',
      series,
      Axis('tokens of the source', True),
      Axis('time, relative', True),
    )
  )
  return out


def main() -> None:
  parser = arguments(__doc__)
  parser.add_argument(
    '--packages',
    default=None,
    help='a folder with the .deb files of sword-text-kjv and sword-text-sparv',
  )
  args = parser.parse_args()
  jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(args.runs) / 'xla'))
  try:
    import sacrebleu  # noqa: F401
  except ImportError:
    raise InputError(
      "BLEU needs the package 'sacrebleu'; install the extra: pip install 'jaxformer[translation]'"
    ) from None
  plans = studies(args)
  with Interrupt() as interrupt:
    halves = {name: half_of(name, study, interrupt) for name, study in plans.items()}
  seconds = encoding({n: t.model for n, t in halves['translation'].tuned.items()})
  verdict, said, differences = judged(halves, seconds)
  first, second = plans['translation'], plans['copying']
  publish(
    args,
    Result(
      number=1,
      claim=CLAIM,
      verdict=verdict,
      because=' '.join(said),
      scale=f'{first.target:,.0f} parameters; {first.tokens:,} positions of verses of at most '
      f'{first.tasks[0].max_len} tokens '
      f'({first.steps(first.tasks[0])} steps of {first.batch_size}), {second.tokens:,} of copies '
      'of at most '
      f'{second.tasks[0].max_len - 1} letters ({second.steps(second.tasks[0])} steps); '
      f'rates {grid(first)} and {grid(second)}, extended twice at most where the best is at an '
      f'end; {len(first.seeds)} seeds',
      header=HEADER,
      rows=rows(halves, differences),
      data={
        'halves': {
          n: {
            'groups': h.groups,
            'runs': h.runs,
            'step_seconds': h.step_seconds,
            'rates': {m: t.rate for m, t in h.tuned.items()},
          }
          for n, h in halves.items()
        },
        'encoding': {'lengths': LENGTHS, 'seconds': seconds},
        'differences': {n: [dataclasses.asdict(d) for d in of] for n, of in differences.items()},
      },
    ),
    pictures(halves, seconds),
  )


if __name__ == '__main__':
  to_the_end(main)
