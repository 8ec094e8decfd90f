"""Many small experts beat few large ones at equal active size.

Question: of two Llama-like models with equal parameters and equal active parameters, is the one
better whose feed-forward layers have 32 experts, eight per token, than the one with eight experts
of four times the hidden units, two per token?

    python experiments/claims/many_experts.py

Both have width 64, two layers and four heads, and are trained on bytes of the built-in corpus, in
batches of 16 sequences of 128. A large expert has 88 hidden units, a small one 22, as the
fine-grained experts of DeepSeekMoE (Dai et al. 2024, section 3.1). The only difference in size is
the router, which has a column per expert. One study of `jaxformer.study`: one learning rate for
both, 0.01, which the models of `sparse_experts.py` chose from a grid (from `--scale 2` the best of
a grid, chosen with a separate seed), the same batches for equal seeds, four seeds; the difference
of held-out bits per byte is paired by seed. `model` says how the two begin at the same scale and
with the same weight of balance.

The claim is supported if the interval of the difference lies below 0 and parameters, active
parameters and FLOPs are equal within 3 %; contradicted if many small experts need more bits."""

from __future__ import annotations

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import gallery
import mixers
from gallery import signed
from mixers import INIT, outcomes, told

from jaxformer.data import Text
from jaxformer.layers.attention import Attention
from jaxformer.layers.init import Normal
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Rotary
from jaxformer.layers.router import SoftmaxTopK
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.params import define
from jaxformer.models.zoo.preset import pre_norm_model
from jaxformer.study.results import Results, interval_form
from jaxformer.study.study import FixedModel, Study
from jaxformer.study.tables import amount
from jaxformer.training import AdamW, Cosine, read_metrics

CLAIM = 'Many small experts beat few large ones at equal active size.'
WIDTH, LAYERS, HEADS, LENGTH, VOCABULARY = 64, 2, 4, 128, 264
LARGE, SMALL = 'few large', 'many small'
EXPERTS, PER_TOKEN, HIDDEN, PARTS = 8, 2, 88, 4
"""Of the few large experts; the small ones are `PARTS` times as many, of a `PARTS`-th."""
BALANCE = 0.02
BATCH, UPDATES, SEEDS = 16, 400, (1, 2, 3, 4)
CLOSE = 0.03


def model(parts: int) -> LanguageModel.Config:
  """The model whose large experts are cut into `parts`.

  The weights of a token's experts add up to sqrt(k), so that the sum of k outputs, which are
  independent in the beginning, has the same scale for every k. The balancing loss, which grows
  with k, is divided by it."""
  k = parts * PER_TOKEN
  moe = Moe.Config(
    experts=parts * EXPERTS,
    expert=GatedMlp.Config(hidden=HIDDEN // parts, init=INIT, out_init=INIT),
    router=SoftmaxTopK(k=k, normalized=True, scale=k**0.5, pooled_balance=BALANCE / k),
  )
  attention = Attention.Config(heads=HEADS, position=Rotary(), init=INIT, out_init=INIT)
  return pre_norm_model(
    WIDTH,
    LAYERS,
    (attention, moe),
    norm=RMSNorm(),
    vocab_size=VOCABULARY,
    context_length=LENGTH,
    embedding_init=Normal(std=1.0),
    head_init=INIT,
  )


MODELS = {LARGE: model(1), SMALL: model(PARTS)}


def study(scale: float, runs: str) -> Study:
  updates = max(1, round(UPDATES * scale))
  return Study(
    name='many-experts',
    dir=runs,
    entries=tuple(FixedModel(name=n, model_config=m) for n, m in MODELS.items()),
    match='active_params',
    target=float(define(MODELS[LARGE]).active_size),
    tasks=(Text(sequence_length=LENGTH),),
    tokens=updates * BATCH * LENGTH,
    batch_size=BATCH,
    learning_rates=mixers.rates(scale),
    max_grid_extensions=0,
    seeds=SEEDS,
    eval_batches=32,
    runs_per_program=1,  # a population's runs would wait for the busiest expert of all
    optimizer=AdamW(),
    schedule=Cosine(warmup=max(1, updates // 10)),
    contexts=(),
    timing_repeats=0,
  )


def ratios(results: Results) -> dict[str, float]:
  """Small experts over large ones: parameters, active ones, and FLOPs."""
  of = outcomes(results.tasks[0])
  few, many = of[LARGE], of[SMALL]
  return {
    name: getattr(many, name) / getattr(few, name)
    for name in ('params', 'active_params', 'train_flops_per_token')
  }


def busiest(results: Results) -> dict[str, list[float]]:
  """For each run of both models the load of the busiest expert of any layer over the mean, at the
  end; 1 is balance."""
  metric = 'train/moe/load_ratio_max'
  return {
    o.title: [
      [row[metric] for row in read_metrics(results.study.folder / name) if metric in row][-1]
      for name in o.runs
    ]
    for o in results.tasks[0].outcomes
  }


def decide(results: Results, loads: dict[str, list[float]]) -> tuple[gallery.Verdict, str]:
  """Return the verdict, and why."""
  task, ratio = results.tasks[0], ratios(results)
  d = outcomes(task)[SMALL].difference
  beats, behind = d is not None and d.verdict == 'better', d is not None and d.verdict == 'worse'
  equal = all(abs(value - 1) < CLOSE for value in ratio.values())
  verdict: gallery.Verdict = (
    'contradicted' if behind else 'supported' if beats and equal else 'not supported'
  )
  difference = (
    'a run diverged'
    if d is None
    else (
      f'{signed(d.estimate, 4)} bits per byte (95 %, paired over {len(SEEDS)} seeds, p {d.p:.2g}): '
      f'{d.verdict}'
    )
  )
  busy = ' and '.join(f'{min(v):.2f} to {max(v):.2f} ({name})' for name, v in loads.items())
  return verdict, (
    f'{", ".join(told(task, o) for o in task.outcomes)} bits per byte (95 %). Many small - few '
    f'large, after equal steps: {difference}. Many small experts have {ratio["params"]:.3f} times '
    f'the parameters of few large ones, {ratio["active_params"]:.3f} times the active ones and '
    f'{ratio["train_flops_per_token"]:.3f} times the FLOPs per token, '
    f'{"" if equal else "not "}equal within {CLOSE:.0%}; the difference is in the router. '
    f'At the end the busiest expert had {busy} times the mean load.'
  )


def rows(results: Results) -> tuple[tuple[str, ...], ...]:
  task = results.tasks[0]
  return tuple(
    (
      o.title,
      f'{o.params:,}',
      f'{o.active_params:,}',
      amount(o.train_flops_per_token),
      f'{o.rate:g}',
      interval_form(task.metric, o.estimate),
    )
    for o in task.outcomes
  )


def main() -> None:
  args = gallery.arguments(__doc__).parse_args()
  results = mixers.run(study(args.scale, args.runs))
  loads = busiest(results)
  verdict, because = decide(results, loads)
  updates = results.study.steps(results.study.tasks[0])
  gallery.publish(
    args,
    gallery.Result(
      14,
      CLAIM,
      verdict,
      because,
      f'width {WIDTH}, {LAYERS} layers; {EXPERTS} experts of {HIDDEN} hidden units, {PER_TOKEN} '
      f'per token, against {PARTS * EXPERTS} of {HIDDEN // PARTS}, {PARTS * PER_TOKEN} per token; '
      f'{updates:,} updates of {BATCH} sequences of {LENGTH} bytes; learning rates '
      f'{mixers.rates(args.scale)}; {len(SEEDS)} seeds',
      (
        'experts',
        'parameters',
        'active',
        'training FLOPs per token',
        'rate',
        'bits per byte (95 %)',
      ),
      rows(results),
      mixers.numbers(results, ratios=ratios(results), busiest=loads),
    ),
    [mixers.curves(results.tasks[0]), mixers.seeds(results.tasks[0])],
  )


if __name__ == '__main__':
  gallery.to_the_end(main)
