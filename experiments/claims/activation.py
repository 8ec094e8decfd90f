"""The activation function matters little; a nonlinearity is needed.

Question: how much does the loss of a small transformer depend on which nonlinearity its
feed-forward layers have, and how much on having one at all?

    python experiments/claims/activation.py

A Llama frame (pre-norm RMSNorm, rotary positions) of width 48 with two layers is trained with seven
feed-forward layers: five plain ones of 192 units, SwiGLU of the GLU family (Shazeer 2020) of 128
units, which has exactly as many parameters, and a plain one without an activation, two matrices in
a row. Each is trained on the built-in text at the better of two learning rates (chosen with a
separate seed), with four seeds that see the same rows in the same order. Held-out bits per byte are
compared within seeds.

Attention is itself nonlinear (a softmax, and its product with the values), and so are norms. So the
transformer without an activation is not a linear model, and the gap is the contribution of the
feed-forward nonlinearity. A model without any nonlinearity is tested with the feed-forward layer
alone: two numbers from -1 to 1, one residual branch of width 16 without a norm, and a linear
classifier of whether the two signs are equal, which no line in the plane separates. Three of the
layers are tested this way.

The activation matters little if the gap, from the mean of all activations to none, is larger than
the spread among them, best to worst (95 % interval of the difference of the two, paired by seed;
choosing best and worst after the fact overestimates the spread, so the test is strict). A
nonlinearity is needed if none is worse than every activation (Holm) and the linear layer alone
stays near chance where the others solve the task.

Cost: five minutes on one CPU core.

Result (jax 0.10.2): partly supported. A nonlinearity is needed: each of the six activations is
significantly better than none, by 0.0416 (SiLU) to 0.1762 (ReLU) of 3.4791 bits per byte, and the
layer alone reaches an accuracy of 48.7 % without one, 99.3 and 99.5 % with ReLU and SwiGLU. That
the choice matters little is not supported at this budget of 292 updates: the gap from none to the
mean activation is 0.1032 ± 0.0190 bits, the spread from best to worst activation 0.1346 ± 0.0352,
and the gap minus the spread -0.0314 ± 0.0419. The exact GELU and its approximation differ by
0.0006. All seven chose the lower of the two rates, so the best rate may be lower for some, and
models trained this briefly say little about converged ones."""

from __future__ import annotations

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import gallery
import numpy as np
from gallery import signed

from jaxformer.data import Text
from jaxformer.data.dataset import Batch
from jaxformer.data.tasks.task import GeneratedTask, Side, labelled
from jaxformer.layers.attention import Attention
from jaxformer.layers.mlp import ActivationName, GatedMlp, Mlp
from jaxformer.layers.position import Rotary
from jaxformer.models.block import Block, PreNorm, Residual
from jaxformer.models.classifier import Classifier
from jaxformer.models.embedder import LinearInput
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.params import define
from jaxformer.models.stack import Group
from jaxformer.study.charts import Axis, Point, Series
from jaxformer.study.runner import finished, run_study
from jaxformer.study.statistics import Difference, Estimate, compare, estimate
from jaxformer.study.study import FixedModel, Study
from jaxformer.task_type import TaskType
from jaxformer.training import (
  AdamW,
  Cosine,
  Experiment,
  RunConfig,
  TrainingConfig,
  train_population,
)
from jaxformer.training.interrupt import Interrupt

CLAIM = 'The activation function matters little; a nonlinearity is needed.'
NONE = 'none'
PLAIN: dict[str, ActivationName] = {
  'ReLU': 'relu',
  'squared-ReLU': 'squared_relu',
  'GELU': 'gelu',
  'GELU-tanh': 'gelu_tanh',
  'SiLU': 'silu',
}
GATED: dict[str, ActivationName] = {'SwiGLU': 'silu'}
WIDTH, LAYERS, HEADS, LENGTH = 48, 2, 3, 128
ALONE, ALONE_WIDTH, ALONE_STEPS = (NONE, 'ReLU', 'SwiGLU'), 16, 600


def layers(width: int) -> dict[str, Mlp.Config]:
  """Return the feed-forward layers, all of 8 width^2 parameters, first the one without an
  activation."""
  plain: dict[str, ActivationName] = {NONE: 'identity', **PLAIN}
  return {
    **{n: Mlp.Config(hidden=4 * width, activation=a) for n, a in plain.items()},
    **{n: GatedMlp.Config(hidden=8 * width // 3, activation=a) for n, a in GATED.items()},
  }


def transformer(feed_forward: Mlp.Config) -> LanguageModel.Config:
  """Return two blocks of attention and the given feed-forward layer."""
  block = Block.Config(
    branches=(
      PreNorm(layer=Attention.Config(heads=HEADS, position=Rotary())),
      PreNorm(layer=feed_forward),
    )
  )
  return LanguageModel.Config(
    vocab_size=264,
    width=WIDTH,
    context_length=LENGTH,
    stack=(Group(pattern=(block,), repeats=LAYERS),),
  )


def study(args) -> Study:
  return Study(
    name=f'claim-08-{args.scale:g}',
    entries=tuple(
      FixedModel(name=n, model_config=transformer(f)) for n, f in layers(WIDTH).items()
    ),
    target=define(transformer(layers(WIDTH)[NONE])).size,
    tasks=(Text(sequence_length=LENGTH),),
    tokens=int(150_000 * args.scale),
    batch_size=4,
    learning_rates=(3e-3, 1e-2),
    max_grid_extensions=0,
    seeds=(1, 2, 3, 4),
    runs_per_program=4,
    eval_batches=128,
    contexts=(),
    timing_repeats=0,
    dir=args.runs,
  )


# ---- the layer alone ---------------------------------------------------------------------------


class SameSign(GeneratedTask):
  """Two numbers, uniform in [-1, 1]: class 1 where their signs are the same, else 0."""

  @property
  def positions(self) -> int:
    return 1

  @property
  def task(self) -> TaskType:
    return TaskType(inputs='features', predicts='class', features=2, classes=2)

  def rows(self, side: Side, index_N: np.ndarray) -> Batch:
    bits = self.random_bits(side, index_N, 2)
    x_N2 = 2 * (bits >> np.uint64(40)).astype(np.float32) / 2**24 - 1
    return labelled(x_N2[:, None], (x_N2[:, 0] * x_N2[:, 1] > 0).astype(np.int64))


def alone(feed_forward: Mlp.Config, name: str, args) -> dict[int, float]:
  """Return the accuracy of a classifier with this one layer, by seed."""
  block = Block.Config(branches=(Residual(layer=feed_forward.replace(bias=True)),))
  model = Classifier.Config(
    input=LinearInput.Config(features=2),
    classes=2,
    width=ALONE_WIDTH,
    context_length=1,
    stack=(Group(pattern=(block,)),),
    final_norm=None,
  )
  runs = [
    Experiment(
      model=model,
      data=SameSign(),
      optimizer=AdamW(learning_rate=1e-2, weight_decay=0.0),
      schedule=Cosine(),
      training=TrainingConfig(
        steps=ALONE_STEPS,
        batch_size=64,
        seed=seed,
        eval_every=ALONE_STEPS,
        eval_batches=None,
        checkpoint_every=ALONE_STEPS,
        keep_best=0,
        log_every=ALONE_STEPS,
        trackers=(),
      ),
      run=RunConfig(dir=args.runs, name=f'claim-08-alone/{name}-{seed}'),
    )
    for seed in study(args).seeds
  ]
  if any(finished(e) is None for e in runs):
    train_population(runs, log=lambda line: None)
  done = {e.training.seed: finished(e) for e in runs}
  return {seed: t.metrics['eval/accuracy'] for seed, t in done.items() if t is not None}


# ---- the answer --------------------------------------------------------------------------------


def gap_and_spread(
  bits: dict[str, dict[int, float]],
) -> tuple[Estimate, Estimate, Estimate, str, str]:
  """Paired by seed: none minus the mean activation; worst minus best activation (by their means);
  the first minus the second; which are best and worst."""
  names, seeds = [n for n in bits if n != NONE], sorted(bits[NONE])
  mean = {n: float(np.mean(list(bits[n].values()))) for n in names}
  best, worst = min(names, key=lambda n: mean[n]), max(names, key=lambda n: mean[n])
  gap = np.array([bits[NONE][s] - np.mean([bits[n][s] for n in names]) for s in seeds])
  spread = np.array([bits[worst][s] - bits[best][s] for s in seeds])
  return estimate(gap), estimate(spread), estimate(gap - spread), best, worst


def decide(
  bits: dict[str, dict[int, float]], against: list[Difference], right: dict[str, Estimate]
) -> tuple[gallery.Verdict, str]:
  """Return the verdict, and why. `against` are the activations against none."""
  gap, spread, difference, best, worst = gap_and_spread(bits)
  little = difference.low > 0
  matters = difference.high < 0
  helps = all(d.verdict == 'better' for d in against)
  others = [right[n] for n in right if n != NONE]
  cannot = right[NONE].high < 0.75 < min(e.low for e in others)
  verdict: gallery.Verdict = (
    'supported'
    if little and helps and cannot
    else (
      'contradicted'
      if matters and gap.high < 0
      else 'partly supported'
      if little or helps or cannot
      else 'not supported'
    )
  )
  better = sum(d.verdict == 'better' for d in against)
  because = (
    f'Without an activation the transformer needs {signed(gap, 4)} bits per byte more than the '
    f'mean '
    f'of the {len(against)} '
    f'activations; from the best of these ({best}) to the worst ({worst}) are {signed(spread, 4)} '
    '(95 %, paired by seed), and the '
    f'gap less the spread is {signed(difference, 4)}. {better} of {len(against)} activations are '
    'better than none beyond chance '
    '(Holm). '
    f'The feed-forward layer alone, without attention, gets {right[NONE].mean:.1%} right without '
    'an activation (guessing: 50 %) '
    f'and at least {min(e.mean for e in others):.1%} with each of the {len(others)} tried. The '
    'transformer without one still '
    'learns, since attention is nonlinear itself.'
  )
  return verdict, because


def main() -> None:
  args = gallery.arguments(__doc__).parse_args()
  s = study(args)
  with Interrupt() as interrupt:
    tuned = run_study(s, print, interrupt)[s.task_titles[0]]
  bits = {t.title: {r.seed: float(r.metrics['eval/bits_per_byte']) for r in t.runs} for t in tuned}
  answers = {name: alone(layers(ALONE_WIDTH * 3 // 2)[name], name, args) for name in ALONE}
  right = {name: estimate(list(found.values())) for name, found in answers.items()}
  against = compare(bits, NONE)
  found = {d.name: d for d in against}
  verdict, because = decide(bits, against, right)
  mean = {t.title: estimate(list(bits[t.title].values())) for t in tuned}
  ranked = sorted(tuned, key=lambda t: mean[t.title].mean)
  rows = tuple(
    (
      t.title,
      f'{define(t.model).size:,}',
      f'{t.rate:g}{" (edge)" if t.at_edge else ""}',
      f'{mean[t.title].mean:.4f}',
      signed(found[t.title].estimate, 4) if t.title in found else '',
      found[t.title].verdict if t.title in found else '',
      f'{right[t.title].mean:.1%}' if t.title in right else '',
    )
    for t in ranked
  )
  style = {n: 1 if n in PLAIN else 2 if n in GATED else 0 for n in bits}
  series = [
    Series(
      t.title,
      style[t.title],
      (Point(i + 1, mean[t.title].mean, mean[t.title].low, mean[t.title].high),),
    )
    for i, t in enumerate(ranked)
  ]
  tried = {
    t.title: {f'{trial.rate:g}': trial.metrics.get('eval/bits_per_byte') for trial in t.trials}
    for t in tuned
  }
  gallery.publish(
    args,
    gallery.Result(
      8,
      CLAIM,
      verdict,
      because,
      f'{s.target:,.0f} parameters each, {s.tokens:,} bytes of text in rows of {LENGTH}, '
      f'{len(s.learning_rates)} learning rates, '
      f'{len(s.seeds)} seeds; the layer alone: width {ALONE_WIDTH}, {ALONE_STEPS} steps of 64',
      (
        'feed-forward',
        'parameters',
        'rate',
        'bits per byte',
        'against none',
        'verdict',
        'accuracy alone',
      ),
      rows,
      {'bits_per_byte': bits, 'tried': tried, 'alone': answers},
    ),
    [
      gallery.Picture.of(
        'activations',
        'Held-out bits per byte by feed-forward layer, 95 % intervals over seeds',
        series,
        Axis('rank'),
        Axis('bits per byte'),
      )
    ],
  )


if __name__ == '__main__':
  gallery.to_the_end(main)
