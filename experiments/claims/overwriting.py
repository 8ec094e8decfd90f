"""The delta rule overwrites where gated linear attention only decays.

Question: of recurrent layers with equal states, which recall the latest value of a key whose value
has changed: those whose state decays, or those that first remove what the key held?

    python experiments/claims/overwriting.py

Four layers, each as two blocks in Llama's frame (pre-norm, SwiGLU) of width 32, with equal
parameters by their hidden units and 512 numbers of state per block, two heads of 16 x 16 (and the
last inputs of convolutions): GLA (Yang et al. 2024), whose decay is one per channel; Mamba-2 (Dao
and Gu 2024), one per head; DeltaNet (Yang et al. 2024), which does not decay and overwrites; Gated
DeltaNet (Yang et al. 2025), which does both. Gated DeltaNet and Mamba-2 both have a short
convolution, a decay per head, a gate and a norm: they differ by the delta rule. GLA alone has no
convolution.

They learn `RebindingRecall`: a sequence binds 4 keys to values 8 times, and then each key is asked
for its latest value; in one task every repetition changes the value, in the other none does, so
that these sequences are as long, and ask as much, without anything to overwrite. One study of
`jaxformer.study`: one learning rate (from `--scale 2` the best of a grid), the same batches for
equal seeds, five seeds.

The claim is tested on two pairs, Gated DeltaNet against Mamba-2 and DeltaNet against GLA. A pair
supports it if the delta rule is better where values change (paired by seed, Holm over both pairs)
and gains more there than where they do not (the 95 % interval of the difference of the paired
differences lies above 0). Supported if both pairs do, partly if one does, contradicted if in a pair
the delta rule is worse where values change.

Cost: about sixteen minutes of one CPU core.

Result (jax 0.10.2): partly supported. Where values change, Gated DeltaNet recalls 98.6 % and
Mamba-2 85.5 % (13.1 points more, 7.1 to 19.1, p 0.0037), DeltaNet 100.0 % and GLA 34.5 % (65.5
more, 50.3 to 80.6, p 0.00055). But the decaying layers are behind where values stay too: the delta
rule gains 16.3 points more (0.7 to 31.9) from the change of values against GLA, and 5.2 more
against Mamba-2, which is not significant (-5.5 to 15.9). So the delta rule recalls better at this
size and training, but only one pair of the two shows that overwriting is the reason, and in that
pair GLA, which has no convolution, has learned little."""

from __future__ import annotations

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import gallery
import mixers
from mixers import INIT, Stacked, between, scores, told

from jaxformer.data.tasks.rebinding import RebindingRecall
from jaxformer.layers.delta_net import DeltaNet, GatedDeltaNet
from jaxformer.layers.gla import GatedLinearAttention
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mamba2 import Mamba2
from jaxformer.study.charts import Axis, Point, Series
from jaxformer.study.results import Outcome, TaskResults, interval_form
from jaxformer.study.statistics import Difference, Estimate, estimate, holm
from jaxformer.study.study import Study
from jaxformer.training import AdamW, Cosine

CLAIM = 'The delta rule overwrites where gated linear attention only decays.'
WIDTH, TARGET, LAYERS = 32, 34_000, 2
MIXERS: dict[str, LayerConfig] = {
  'GLA': GatedLinearAttention.Config(heads=2, expand_k=1.0, init=INIT, out_init=INIT),
  'Mamba-2': Mamba2.Config(d_state=16, expand=1, head_dim=16, groups=2),
  'DeltaNet': DeltaNet.Config(heads=2, init=INIT, out_init=INIT),
  'Gated DeltaNet': GatedDeltaNet.Config(
    heads=2, head_dim=16, value_head_dim=16, init=INIT, out_init=INIT
  ),
}
PAIRS = ('Gated DeltaNet', 'Mamba-2'), ('DeltaNet', 'GLA')
CHANGING = RebindingRecall(keys=4, length=20, vocab_size=32, test_sequences=500)
TASKS = CHANGING, CHANGING.replace(changes=0.0)
BATCH, UPDATES, SEEDS = 32, 700, (1, 2, 3, 4, 5)


def study(scale: float, runs: str) -> Study:
  updates = max(1, round(UPDATES * scale))
  return Study(
    name='overwriting',
    dir=runs,
    entries=tuple(Stacked(name=n, mixers=(m,) * LAYERS, width=WIDTH) for n, m in MIXERS.items()),
    target=TARGET,
    tolerance=0.03,
    tasks=TASKS,
    tokens=updates * BATCH * CHANGING.positions,
    batch_size=BATCH,
    learning_rates=mixers.rates(scale),
    max_grid_extensions=0,
    seeds=SEEDS,
    runs_per_program=len(SEEDS),
    eval_batches=None,
    optimizer=AdamW(weight_decay=0.1),
    schedule=Cosine(warmup=max(1, updates // 10), final=0.0),
    contexts=(),
    timing_repeats=0,
  )


def differences(task: TaskResults) -> dict[str, Difference]:
  """The paired difference of each pair, by its first name, where no run of the two diverged."""
  found = {name: between(task, name, other) for name, other in PAIRS}
  return {name: d for name, d in found.items() if d is not None}


def gain(changing: TaskResults, constant: TaskResults, pair: tuple[str, str]) -> Estimate | None:
  """By how much more the first of a pair is ahead where values change; None if a run diverged."""
  first, second = scores(changing), scores(constant)
  if not all(name in of for name in pair for of in (first, second)):
    return None
  a, b = pair
  return estimate([first[a][s] - first[b][s] - (second[a][s] - second[b][s]) for s in first[a]])


def decide(changing: TaskResults, constant: TaskResults) -> tuple[gallery.Verdict, str]:
  """Return the verdict, and why."""
  found, plain = differences(changing), differences(constant)
  adjusted = dict(zip(found, holm([d.p for d in found.values()]), strict=True))
  supports, worse, told_of = [], [], []
  for pair in PAIRS:
    name, other = pair
    d, more = found.get(name), gain(changing, constant, pair)
    if d is None or more is None:
      told_of.append(f'{name} - {other}: a run diverged')
      continue
    significant = adjusted[name] < 0.05
    ahead = significant and d.estimate.mean > 0 and more.low > 0
    supports += [name] if ahead else []
    worse += [name] if significant and d.estimate.mean < 0 else []
    told_of.append(
      f'{name} - {other}, in points: {_points(d.estimate)} where values change (p '
      f'{adjusted[name]:.2g}), {_points(plain[name].estimate)} where they do not; '
      f'{_points(more)} more where they change'
    )
  verdict: gallery.Verdict = (
    'contradicted'
    if worse
    else 'supported'
    if len(supports) == len(PAIRS)
    else 'partly supported'
    if supports
    else 'not supported'
  )
  accuracies = '; '.join(
    f'{title}: {", ".join(told(task, o) for o in task.outcomes)}'
    for title, task in (('values change', changing), ('values stay', constant))
  )
  return verdict, (
    f'Accuracy over {len(SEEDS)} seeds with 95 % intervals, {accuracies}. '
    f'{". ".join(told_of)}. What is compared is one budget of training.'
  )


def _points(e: Estimate) -> str:
  return f'{100 * e.mean:+.1f} ({100 * e.low:+.1f} to {100 * e.high:+.1f})'


def rows(changing: TaskResults, constant: TaskResults) -> tuple[tuple[str, ...], ...]:
  of = {o.title: o for o in constant.outcomes}

  def row(o: Outcome) -> tuple[str, ...]:
    state = LAYERS * MIXERS[o.title].state_size(WIDTH, CHANGING.length)
    other = of[o.title]
    return (
      o.title,
      f'{o.params:,}',
      f'{state:,}',
      f'{o.rate:g}, {other.rate:g}',
      interval_form(changing.metric, o.estimate),
      interval_form(constant.metric, other.estimate),
    )

  return tuple(map(row, changing.outcomes))


def pictures(changing: TaskResults, constant: TaskResults) -> list[gallery.Picture]:
  series = []
  for i, name in enumerate(MIXERS):
    found = [mixers.points(t, dict.fromkeys(MIXERS, x)) for x, t in ((0, constant), (1, changing))]
    series.append(Series(name, i, tuple(p[name] for p in found if name in p), line=True))
  curves = [
    Series(o.title, i, tuple(Point(n, loss) for n, loss in o.curve), line=True, dots=False)
    for i, o in enumerate(changing.outcomes)
  ]
  return [
    gallery.Picture.of(
      'recall',
      'Accuracy where values stay (0) and where they change (1); bars are 95 % intervals',
      series,
      Axis('probability that a repeated key has a new value'),
      Axis('accuracy, %'),
    ),
    gallery.Picture.of(
      'curves',
      'Training loss by tokens where values change, mean over seeds',
      curves,
      Axis('tokens', form='{:,.0f}'.format),
      Axis('nats per target'),
    ),
  ]


def main() -> None:
  args = gallery.arguments(__doc__).parse_args()
  results = mixers.run(study(args.scale, args.runs))
  changing, constant = results.tasks
  verdict, because = decide(changing, constant)
  gallery.publish(
    args,
    gallery.Result(
      11,
      CLAIM,
      verdict,
      because,
      f'two layers of width {WIDTH}, {TARGET:,} parameters (within 3 %); '
      f'{results.study.steps(CHANGING):,} updates of {BATCH} sequences of {CHANGING.positions} '
      f'tokens; learning rates {mixers.rates(args.scale)}; {len(SEEDS)} seeds',
      (
        'model',
        'parameters',
        'state, numbers',
        'rates',
        'recall where values change (95 %)',
        'where they stay',
      ),
      rows(changing, constant),
      mixers.numbers(results),
    ),
    pictures(changing, constant),
  )


if __name__ == '__main__':
  gallery.to_the_end(main)
