"""A sparse MoE costs as much as its active parameters and learns more than a dense model of that
cost.

Question: of two Llama-like models with equal active parameters, trained for equal steps, how much
better is the one whose feed-forward layers have sixteen experts, two per token, and how much longer
does a step take?

    python experiments/claims/sparse_experts.py

Both have width 64, two layers, four heads, and are trained on bytes of the built-in corpus, in
batches of 16 sequences of 128. A dense layer has 176 hidden units, each expert 88. One study of
`jaxformer.study`: rates from one grid that is extended if the best lies at an end, the same batches
for equal seeds, four seeds other than that of tuning; the difference of held-out bits per byte is
paired by seed. Weights are initialized at the scale of their inputs (`begun` says why). FLOPs are
counted (`planning`), for experts those in use; the training step is timed, both models in turns,
and the ratio is that of the medians.

The claim has two parts. It learns more: the interval of the mixture's paired difference lies below
0. It costs as much: active parameters and FLOPs per token are within 5 % of the dense model's; the
ratio of tokens per second on this machine is reported too. Supported if both hold, partly if one
does, contradicted if the mixture learns less.

Cost: about ten minutes on one CPU core.

Result (jax 0.10.2): supported. The mixture needs 0.0877 fewer bits per byte of held-out text
(0.0079 to 0.1674, p 0.04): 2.576 +- 0.059 against 2.664 +- 0.033, with 4.53 times the parameters
and 1.015 times the FLOPs per token. A training step takes 1.42 times as long, on a busy machine.
Both chose a rate of 0.01, in the middle of those tried. The busiest expert ends with 2.4 to 2.8
times the mean load. The balancing loss is one of the tokens of both layers; with one per layer and
the same coefficient, which is twice as strong, the mixture needed 0.0359 bits fewer (0.0246 to
0.0472) and the busiest expert had 1.3 to 1.5 times the mean. An earlier experiment, with eight
experts, 300 steps, three seeds and smaller initial weights, found no significant difference (+0.03
+- 0.07)."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import gallery
import mixers
from mixers import INIT, outcomes

from jaxformer.data import Text
from jaxformer.layers.moe import Moe
from jaxformer.layers.position import Rotary
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.params import define
from jaxformer.models.zoo.llama import llama
from jaxformer.models.zoo.mixtral import mixtral
from jaxformer.study.results import Results, interval_form, score_form
from jaxformer.study.study import FixedModel, Study
from jaxformer.study.tables import amount
from jaxformer.training import AdamW, Cosine, read_metrics

CLAIM = (
  'A sparse MoE costs as much as its active parameters and learns more than a dense model of that '
  'cost.'
)
WIDTH, LAYERS, HEADS, HIDDEN, EXPERTS, LENGTH, VOCABULARY = 64, 2, 4, 88, 16, 128, 264


def begun(model: LanguageModel.Config) -> LanguageModel.Config:
  """The model with weights that begin at the scale of their inputs (`mixers.INIT`). With the 0.02
  of larger models it is chance when a run leaves the plateau of its first hundreds of steps, and
  that decides its score at this budget."""
  (group,) = model.stack
  (block,) = group.pattern
  mixing, feeding = block.branches
  layer = feeding.layer
  feed = (
    layer.replace(expert=_scaled(layer.expert)) if isinstance(layer, Moe.Config) else _scaled(layer)
  )
  branches = mixing.replace(layer=_scaled(mixing.layer)), feeding.replace(layer=feed)
  return model.replace(stack=(group.replace(pattern=(block.replace(branches=branches),)),))


def _scaled(layer: Any) -> Any:
  return layer.replace(init=INIT, out_init=INIT)


DENSE = begun(
  llama(
    WIDTH,
    LAYERS,
    2 * HIDDEN,
    HEADS,
    HEADS,
    vocab_size=VOCABULARY,
    context_length=LENGTH,
    rotary=Rotary(theta=1e4),
  )
)
MIXTURE = begun(
  mixtral(
    WIDTH,
    LAYERS,
    HIDDEN,
    HEADS,
    HEADS,
    experts=EXPERTS,
    vocab_size=VOCABULARY,
    context_length=LENGTH,
    theta=1e4,
    balance=0.01,
  )
)
BATCH, UPDATES, SEEDS, ROUNDS = 16, 400, (1, 2, 3, 4), 15
RATES = 4e-3, 1e-2
CLOSE = 0.05


def study(scale: float, runs: str) -> Study:
  updates = max(1, round(UPDATES * scale))
  return Study(
    name='sparse-experts',
    dir=runs,
    entries=(
      FixedModel(name='dense', model_config=DENSE),
      FixedModel(name='mixture', model_config=MIXTURE),
    ),
    match='active_params',
    target=float(define(DENSE).active_size),
    tasks=(Text(sequence_length=LENGTH),),
    tokens=updates * BATCH * LENGTH,
    batch_size=BATCH,
    learning_rates=RATES,
    max_grid_extensions=1,
    seeds=SEEDS,
    eval_batches=32,
    runs_per_program=1,  # a population's runs would wait for the busiest expert of all
    optimizer=AdamW(),
    schedule=Cosine(warmup=max(1, updates // 10)),
    contexts=(),
    timing_repeats=ROUNDS,
  )


def ratios(results: Results) -> dict[str, float]:
  """Mixture over dense: parameters, active ones, FLOPs, seconds of a training step, and its
  memory."""
  of = outcomes(results.tasks[0])
  dense, mixture = of['dense'], of['mixture']
  found = {
    'params': mixture.params / dense.params,
    'active_params': mixture.active_params / dense.active_params,
    'flops': mixture.train_flops_per_token / dense.train_flops_per_token,
  }
  dense, mixture = results.costs['dense'], results.costs['mixture']
  if dense.tokens_per_second and mixture.tokens_per_second:
    found['seconds'] = dense.tokens_per_second / mixture.tokens_per_second
  return found


def busiest(results: Results) -> list[float]:
  """For each of the mixture's runs the load of the busiest expert of any layer over the mean, at
  the end; 1 is balance."""
  metric = 'train/moe/load_ratio_max'
  folders = (results.study.folder / name for name in outcomes(results.tasks[0])['mixture'].runs)
  return [[row[metric] for row in read_metrics(folder) if metric in row][-1] for folder in folders]


def decide(results: Results, loads: list[float]) -> tuple[gallery.Verdict, str]:
  """Return the verdict, and why."""
  task, ratio = results.tasks[0], ratios(results)
  of = outcomes(task)
  d = of['mixture'].difference
  learns, behind = d is not None and d.verdict == 'better', d is not None and d.verdict == 'worse'
  costs = all(abs(ratio[k] - 1) < CLOSE for k in ('active_params', 'flops'))
  verdict: gallery.Verdict = (
    'contradicted'
    if behind
    else 'supported'
    if learns and costs
    else 'partly supported'
    if learns or costs
    else 'not supported'
  )
  difference = (
    'a run diverged'
    if d is None
    else (
      f'{d.estimate.mean:+.4f} bits per byte ({d.estimate.low:+.4f} to {d.estimate.high:+.4f}, '
      f'paired over {len(SEEDS)} seeds, '
      f'p {d.p:.2g}): the mixture reaches '
      f'{"a lower" if learns else "a higher" if behind else "no significantly different"} loss'
    )
  )
  return verdict, (
    f'Mixture - dense, after equal steps: {difference}. With {ratio["params"]:.2f} times the '
    'parameters the mixture has '
    f'{ratio["active_params"]:.3f} times the active ones and {ratio["flops"]:.3f} times the FLOPs '
    'per token; on this CPU a training '
    f'step takes {ratio["seconds"]:.2f} times as long (medians of {ROUNDS} interleaved rounds), '
    'because of token sorting, uneven loads '
    'and the optimizer, which updates every expert. The cost is equal in FLOPs, not in '
    'seconds. At the end the busiest expert '
    f'had {min(loads):.2f} to {max(loads):.2f} times the mean load.'
  )


def rows(results: Results) -> tuple[tuple[str, ...], ...]:
  task = results.tasks[0]
  return tuple(
    (
      o.title,
      f'{o.params:,}',
      f'{o.active_params:,}',
      amount(o.train_flops_per_token),
      amount(results.costs[o.title].tokens_per_second),
      f'{o.rate:g}',
      ', '.join(f'{rate:g}: {score_form(task.metric, score)}' for rate, score in o.tried),
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
      7,
      CLAIM,
      verdict,
      because,
      f'width {WIDTH}, {LAYERS} layers, {EXPERTS} experts 2 per token; {updates:,} updates '
      f'of {BATCH} sequences of {LENGTH} '
      f'bytes; rates {RATES}, extended; {len(SEEDS)} seeds',
      (
        'model',
        'parameters',
        'active',
        'training FLOPs per token',
        'tokens per second',
        'rate',
        'tried',
        'bits per byte (95 %)',
      ),
      rows(results),
      mixers.numbers(results, ratios=ratios(results), busiest=loads),
    ),
    [mixers.curves(results.tasks[0]), mixers.seeds(results.tasks[0])],
  )


if __name__ == '__main__':
  gallery.to_the_end(main)
