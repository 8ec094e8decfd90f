"""Mamba's inference scales linearly with the sequence, and it goes on to very long sequences.

Question: how do prefill and decoding time grow with sequence length for Mamba and for attention,
and is Mamba still good on sequences hundreds of times as long as those of its training?

    python experiments/claims/linear_time.py

Time: Mamba (two blocks) and a transformer (one), both of width 64, with freshly initialized
weights, one sequence, fp32. In each round, each model in turn reads a prompt of every length and
decodes 224 tokens after it. The exponent is the slope of log time over log length, fitted within a
round; its interval is over rounds. The last step to the longest length is reported separately,
since attention's quadratic part comes to dominate only slowly, and short sequences fit a cache.
Attention is measured up to a shorter length, to which its exponent refers.

Quality: the runs of Mamba and of the transformer in claim 3 (trained here if missing), on rows of
128 bytes. They read held-out text at once and in pieces of 128, and the loss of the same targets is
compared (see claim 3). Mamba reads 65,536 bytes at once, 512 times its training length, the
transformer 2,048.

Recall: selective copying (Gu and Dao 2023, section 4.1.1): two tokens among noise, to be repeated
in order. Both models are trained at one length, with three seeds and one learning rate, and are
scored at up to 64 times that length.

Time is linear if the interval of Mamba's prefill exponent lies within 0.9 to 1.1, and that of time
per decoded token within -0.1 to 0.1. Text quality is maintained if the last octave, read at once,
loses less than 0.05 nats per byte against pieces (upper end of the interval); recall is maintained
if accuracy at the longest length is not below that at the training length by more than 5 points
(lower end). The bounds were set before the run. The claim is supported if all three hold, partly if
some do.

Cost: four minutes on one CPU core, in addition to the runs of claim 3.

Result (jax 0.10.2, two busy cores): partly supported, by the text only. Mamba's prefill time grows
as length^1.13 ± 0.09 from 4,096 to 65,536 tokens (1.02 ± 0.15 from 16,384 on), attention's as
length^1.41 ± 0.15 up to 16,384 (1.88 ± 0.10 in the last step); the exponents of time per decoded
token are 0.16 ± 0.37 and 0.97 ± 0.07. Mamba's are far from attention's, yet not within the bounds
set for linear: prefill per token is faster at 4,096 than later, and the noise of decoding over
three rounds is wider than its bounds. The last 32,768 of 65,536 bytes read at once differ by +0.003
± 0.006 nats per byte from the same bytes in pieces; the last 1,024 of the transformer's 2,048 by
+0.438 ± 0.504. Mamba learned copying unevenly at this budget (68.8, 94.5 and 100.0 % accuracy by
seed), so its drop to 31.0 ± 33.5 % at 64 times the length says little; the transformer drops from
84.4 to 18.5 %. Induction heads, the paper's own test, were not learned in a trial with one seed:
17.0 % accuracy, which is chance, after 2.5M tokens of length 31."""

from __future__ import annotations

import json
import math
import os
import pathlib
import statistics
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import constant_memory
import gallery
import jax
import numpy as np
from gallery import signed

from jaxformer.data import open_data
from jaxformer.data.tasks.copying import SelectiveCopying
from jaxformer.evaluation import evaluate
from jaxformer.inference.decoding import request
from jaxformer.inference.sampling import GREEDY
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.params import Definition, Params, define
from jaxformer.models.zoo import FAMILIES
from jaxformer.study.charts import Axis, Point, Series
from jaxformer.study.runner import run_study
from jaxformer.study.statistics import Difference, Estimate, estimate
from jaxformer.study.study import FixedModel, Study
from jaxformer.study.tables import seconds
from jaxformer.training import load_params
from jaxformer.training.interrupt import Interrupt

CLAIM = (
  "Mamba's inference scales linearly with the sequence, and it goes on to very long sequences."
)
TRANSFORMER, MAMBA = constant_memory.TRANSFORMER, 'Mamba'
WIDTH, ROUNDS, FREED, NEW_TOKENS = 64, 3, 32, 224
LENGTHS = {MAMBA: (4096, 16384, 65536), TRANSFORMER: (1024, 4096, 16384)}
READS = {MAMBA: 65536, TRANSFORMER: 2048}  # bytes of text in one go
TEXT_ROWS = {MAMBA: 3, TRANSFORMER: constant_memory.ROWS}
TASK = SelectiveCopying(length=32, copied=2, vocab_size=8, test_sequences=64)
FARTHER = (1, 4, 16, 64)
LINEAR, FLAT, MARGIN, POINTS = (0.9, 1.1), (-0.1, 0.1), 0.05, 0.05
NOT_LEARNED = ' Mamba has not learned copying well enough for conclusions about longer sequences.'


def model(
  name: str, width: int, layers: int, vocab_size: int, context: int
) -> LanguageModel.Config:
  """Return one of the two models; Mamba has twice as many blocks, without feed-forward layers."""
  f = FAMILIES[constant_memory.FAMILIES[name]]
  made = f.make(
    width=width,
    layers=2 * layers if name == MAMBA else layers,
    vocab_size=vocab_size,
    context_length=context,
    **({'hidden': f.hidden(width)} if f.hidden else {}),
  )
  assert isinstance(made, LanguageModel.Config)
  return made


# ---- time --------------------------------------------------------------------------------------

Times = dict[str, dict[int, list[tuple[float, float]]]]
"""Model -> length -> (prefill seconds, seconds per decoded token after it) of each round."""


def timed(
  definition: Definition[LanguageModel], params: Params, length: int
) -> tuple[float, float]:
  """Seconds to read a prompt, and of each of `NEW_TOKENS` tokens after it, warm. The clock of
  decoding starts some tokens later
  than decoding does: what the prompt leaves behind is freed meanwhile, which takes the longer the
    longer the prompt was."""
  prompt = np.random.default_rng(0).integers(0, definition.config.vocab_size, length).tolist()
  r = request(definition, params, [prompt], max_new_tokens=FREED + NEW_TOKENS, sampling=GREEDY)
  for _ in range(2):  # the first compiles
    start = time.perf_counter()
    begun = jax.block_until_ready(r.begin())
    read = time.perf_counter() - start
    going = jax.block_until_ready(r.advance(begun, FREED))
    start = time.perf_counter()
    jax.block_until_ready(r.advance(going, FREED + NEW_TOKENS))
    written = (time.perf_counter() - start) / NEW_TOKENS
  return read, written


def measure(args) -> Times:
  """Time every length of every model once per round. Finished rounds are kept with the runs."""
  file = pathlib.Path(args.runs) / f'claim-05-{args.scale:g}' / 'times.json'
  rounds = json.loads(file.read_text()) if file.exists() else []
  definitions = {n: define(model(n, WIDTH, 1, 264, 1024)) for n in LENGTHS}
  params = {n: d.init(jax.random.key(0)) for n, d in definitions.items()}
  lengths = {n: [max(32, round(c * min(args.scale, 1))) for c in of] for n, of in LENGTHS.items()}
  while len(rounds) < ROUNDS:
    found = [
      (name, length, *timed(definitions[name], params[name], length))
      for length in sorted({c for of in lengths.values() for c in of})
      for name in lengths
      if length in lengths[name]
    ]
    rounds.append(found)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rounds))
    print(f'times: round {len(rounds)} of {ROUNDS}', flush=True)
  return {
    n: {c: [(p, d) for found in rounds for m, k, p, d in found if (m, k) == (n, c)] for c in of}
    for n, of in lengths.items()
  }


def exponent(
  by_length: dict[int, list[tuple[float, float]]], what: int, last: int | None = None
) -> Estimate:
  """Return the slope of log seconds over log length, of the `last` lengths; `what` is 0 for
  prefill, 1 for decoding."""
  lengths = sorted(by_length)[-last if last else 0 :]
  x = np.log(lengths)
  return estimate(
    [
      float(np.polyfit(x, np.log([by_length[c][r][what] for c in lengths]), 1)[0])
      for r in range(ROUNDS)
    ]
  )


# ---- text --------------------------------------------------------------------------------------


def read_text(args) -> dict[str, dict[int, Difference]]:
  """Return, per model, upper end of the octave of position in training lengths -> difference of
  the loss of text read at once and in pieces."""
  s, length = constant_memory.study(args), constant_memory.LENGTH
  s = s.replace(entries=tuple(e for e in s.entries if e.title in READS))
  with Interrupt() as interrupt:
    trained = run_study(s, print, interrupt)[s.task_titles[0]]
  octaves = {}
  for t in trained:
    data = open_data(s.tasks[0].replace(sequence_length=READS[t.title]))
    found = {
      t.title: {
        r.seed: constant_memory.losses(define(t.model), r.folder, data, TEXT_ROWS[t.title])
        for r in t.runs
      }
    }
    ends = [2**i for i in range(1, round(math.log2(READS[t.title] / length)) + 1)]
    octaves[t.title] = {
      end: constant_memory.differences(found, end, end // 2)[t.title] for end in ends
    }
    print(f'text: {t.title} has read {READS[t.title]:,} bytes in one go', flush=True)
  return octaves


# ---- recall ------------------------------------------------------------------------------------


def copier(name: str) -> LanguageModel.Config:
  """Return two blocks of either; the transformer then has twice as many parameters."""
  return model(name, 32, 2 if name == TRANSFORMER else 1, TASK.vocab_size, TASK.positions)


def recall_study(args) -> Study:
  entries = tuple(FixedModel(name=n, model_config=copier(n)) for n in READS)
  return Study(
    name=f'claim-05-{args.scale:g}',
    entries=entries,
    target=define(copier(MAMBA)).size,
    tasks=(TASK,),
    tokens=int(250_000 * args.scale),
    batch_size=32,
    learning_rates=(1e-2,),
    max_grid_extensions=0,
    seeds=(1, 2, 3),
    runs_per_program=3,
    eval_batches=None,
    contexts=(),
    timing_repeats=0,
    dir=args.runs,
  )


def recall(args) -> dict[str, dict[int, list[float]]]:
  """Return model -> multiple of the training length -> accuracy by seed."""
  s = recall_study(args)
  with Interrupt() as interrupt:
    trained = run_study(s, print, interrupt)[s.task_titles[0]]
  right = {}
  for t in trained:
    definition, right[t.title] = define(t.model), {}
    params = [load_params(r.folder, definition).params for r in t.runs]
    for times in FARTHER:
      data = open_data(TASK.replace(length=times * TASK.length))
      batch = min(64, max(4, 2**15 // data.config.positions))
      right[t.title][times] = [
        evaluate(definition, p, data.validation_batches(batch)).accuracy for p in params
      ]
    print(f'recall: {t.title} has been scored', flush=True)
  return right


# ---- the answer --------------------------------------------------------------------------------


def decide(
  reading: dict[str, Estimate],
  writing: dict[str, Estimate],
  last_step: dict[str, Estimate],
  octaves: dict[str, dict[int, Difference]],
  right: dict[str, dict[int, list[float]]],
) -> tuple[gallery.Verdict, str]:
  """Return the verdict, and why."""
  linear = within(reading[MAMBA], LINEAR) and within(writing[MAMBA], FLAT)
  end = octaves[MAMBA][max(octaves[MAMBA])]
  text = end.estimate.high < MARGIN
  drop = {
    n: estimate([b - a for a, b in zip(by[FARTHER[0]], by[FARTHER[-1]], strict=True)])
    for n, by in right.items()
  }
  start = {n: estimate(by[FARTHER[0]]) for n, by in right.items()}
  learned = start[MAMBA].low > 0.9
  recalls = learned and drop[MAMBA].low > -POINTS
  verdict: gallery.Verdict = (
    'supported'
    if linear and text and recalls
    else ('partly supported' if linear or text or recalls else 'not supported')
  )
  other = octaves[TRANSFORMER][max(octaves[TRANSFORMER])]
  copied = '; '.join(
    f'{n}: {start[n].mean:.1%} of the tokens to copy right at the training length, '
    f'{start[n].mean + drop[n].mean:.1%} at '
    f'{FARTHER[-1]} times ({100 * drop[n].mean:+.1f} ± {100 * drop[n].half_width:.1f} points)'
    for n in right
  )
  because = (
    f'Prefill time grows with the length to the power {_shown(reading[MAMBA])} for Mamba, up to '
    f'{max(LENGTHS[MAMBA]):,} '
    f'tokens ({_shown(last_step[MAMBA])} in the last step), and {_shown(reading[TRANSFORMER])} for '
    'attention up to '
    f'{max(LENGTHS[TRANSFORMER]):,} ({_shown(last_step[TRANSFORMER])}); that per decoded token to '
    'the power '
    f'{_shown(writing[MAMBA])} and {_shown(writing[TRANSFORMER])} '
    f'(95 % over {ROUNDS} rounds): '
    f'{"linear" if linear else "not within the bounds set for linear"}. Of text, the last octave '
    'of '
    f'{READS[MAMBA]:,} bytes, read in one go by Mamba trained at {constant_memory.LENGTH}, differs '
    f'by {signed(end.estimate)} '
    f'nats per byte from the same bytes in pieces ({"within" if text else "not within"} the '
    f'bound of '
    f'{MARGIN}), the last of '
    f'{READS[TRANSFORMER]:,} by {signed(other.estimate)} for the transformer. {copied}.'
    f'{"" if learned else NOT_LEARNED}'
  )
  return verdict, because


def within(e: Estimate, bounds: tuple[float, float]) -> bool:
  return bounds[0] <= e.low and e.high <= bounds[1]


def _shown(e: Estimate) -> str:
  return f'{e.mean:.2f} ± {e.half_width:.2f}'


def rows(
  times: Times, right: dict[str, dict[int, list[float]]], octaves: dict[str, dict[int, Difference]]
):
  """Return a row per length and model."""
  found = []
  for name, by in times.items():
    for length, rounds in by.items():
      found.append(
        (
          name,
          'time',
          f'{length:,} tokens',
          seconds(statistics.median(p for p, _ in rounds)) + ' to read',
          seconds(statistics.median(d for _, d in rounds)) + ' per decoded token',
        )
      )
  for name, by in octaves.items():
    found += [
      (name, 'text', f'{end // 2}x to {end}x', f'{signed(d.estimate)} nats per byte', d.verdict)
      for end, d in by.items()
    ]
  for name, by in right.items():
    found += [
      (name, 'recall', f'{times}x', f'{e.mean:.1%} ± {e.half_width:.1%}', 'right')
      for times, e in ((times, estimate(scores)) for times, scores in by.items())
    ]
  return tuple(found)


def pictures(
  times: Times, right: dict[str, dict[int, list[float]]], octaves: dict[str, dict[int, Difference]]
):
  style = {name: 3 * i for i, name in enumerate(LENGTHS)}
  tokens = Axis('tokens', log=True, form='{:,.0f}'.format)
  farther = Axis('times the training length', log=True)

  def timed(what: int) -> list[Series]:
    return [
      Series(
        n,
        style[n],
        tuple(Point(c, statistics.median(r[what] for r in rounds)) for c, rounds in by.items()),
        line=True,
      )
      for n, by in times.items()
    ]

  text = [
    Series(
      n,
      style[n],
      tuple(
        Point(end / math.sqrt(2), d.estimate.mean, d.estimate.low, d.estimate.high)
        for end, d in by.items()
      ),
      line=True,
    )
    for n, by in octaves.items()
  ]
  recalled = [
    Series(
      n,
      style[n],
      tuple(Point(k, e.mean, e.low, e.high) for k, e in ((k, estimate(v)) for k, v in by.items())),
      line=True,
    )
    for n, by in right.items()
  ]
  return [
    gallery.Picture.of(
      'reading', 'Prefill time in seconds (medians)', timed(0), tokens, Axis('s', log=True)
    ),
    gallery.Picture.of(
      'decoding',
      'Decoding time in seconds per token, after a sequence (medians)',
      timed(1),
      tokens,
      Axis('s', log=True),
    ),
    gallery.Picture.of(
      'text',
      'Loss of text read at once minus loss in pieces of the training length',
      text,
      farther,
      Axis('nats per byte'),
    ),
    gallery.Picture.of(
      'recall',
      'Selective copying on sequences longer than those of training',
      recalled,
      farther,
      Axis('right', form='{:.0%}'.format),
    ),
  ]


def main() -> None:
  args = gallery.arguments(__doc__).parse_args()
  times = measure(args)
  reading = {n: exponent(by, 0) for n, by in times.items()}
  writing = {n: exponent(by, 1) for n, by in times.items()}
  last_step = {n: exponent(by, 0, last=2) for n, by in times.items()}
  octaves, right = read_text(args), recall(args)
  verdict, because = decide(reading, writing, last_step, octaves, right)
  s, text = recall_study(args), constant_memory.study(args)
  gallery.publish(
    args,
    gallery.Result(
      5,
      CLAIM,
      verdict,
      because,
      f'times: width {WIDTH}, {ROUNDS} rounds; text: {text.target:,.0f} parameters, '
      f'{text.tokens:,} bytes in rows of '
      f'{constant_memory.LENGTH}, {len(text.seeds)} seeds; recall: {TASK.copied} tokens of '
      f'{TASK.length}, {s.tokens:,} tokens, '
      f'one rate ({s.learning_rates[0]:g}), {len(s.seeds)} seeds',
      ('model', 'measured', 'at', 'value', ''),
      rows(times, right, octaves),
      {
        'seconds': times,
        'exponents': {
          'reading': {n: [e.mean, e.low, e.high] for n, e in reading.items()},
          'decoding': {n: [e.mean, e.low, e.high] for n, e in writing.items()},
          'reading, last step': {n: [e.mean, e.low, e.high] for n, e in last_step.items()},
        },
        'text': {
          n: {k: [d.estimate.mean, d.estimate.low, d.estimate.high] for k, d in by.items()}
          for n, by in octaves.items()
        },
        'recall': right,
      },
    ),
    pictures(times, right, octaves),
  )


if __name__ == '__main__':
  gallery.to_the_end(main)
