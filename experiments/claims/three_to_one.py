"""Three recurrent layers to one of attention keep recall at a quarter of the cache.

Question: of four layers of Gated DeltaNet, four of attention, and three of Gated DeltaNet with one
of attention, all of equal size: which recall, and how large is their decoding state?

    python experiments/claims/three_to_one.py

Qwen3-Next has one layer of attention in four, the last of its period, and rotary positions in it;
so have the models here. All are in Llama's frame (pre-norm, SwiGLU), of width 32 and with equal
numbers of parameters, by their hidden units. A layer of attention has two heads of 16; one of Gated
DeltaNet (Yang et al. 2025) two heads with states of 4 x 16, which hold four keys each, and a short
convolution.

They learn multi-query associative recall (Arora et al. 2023) of 6 pairs: a sequence names 6 keys
and their values, then each key once more, and the model predicts its value. One study of
`jaxformer.study`: one learning rate for all (from `--scale 2` the best of a grid, chosen with a
separate seed), the same batches for equal seeds, five seeds.

Recall is kept if the hybrid is not worse than attention by more than 2 points: the 95 % interval of
the paired difference lies above -2 points. This is informative only if Gated DeltaNet alone is
worse than attention (Holm). The cache is the decoding state of one sequence (`planning.cost`): keys
and values at 2 bytes per number, recurrent states in fp32. The claim is supported if recall is
kept, Gated DeltaNet is worse, and the hybrid's state at 65,536 tokens is less than 26 % of
attention's; contradicted if recall is lost, or the state is larger.

The number of updates is chosen by attention alone: after half of it, 700, attention itself had
learned the task with four of five seeds only (26.4 % with the other), and the intervals said
nothing about the hybrid."""

from __future__ import annotations

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import gallery
import interleaving
import mixers
from interleaving import CONTEXTS, Caches
from mixers import INIT, Stacked

from jaxformer.data.tasks.mqar import MultiQueryRecall
from jaxformer.layers.attention import Attention
from jaxformer.layers.delta_net import GatedDeltaNet
from jaxformer.layers.position import Rotary
from jaxformer.ops.implementation import implementation
from jaxformer.planning.cost import cost
from jaxformer.study.results import TaskResults
from jaxformer.study.study import Study
from jaxformer.study.tables import amount
from jaxformer.training import AdamW, Cosine

CLAIM = 'Three recurrent layers to one of attention keep recall at a quarter of the cache.'
WIDTH, TARGET = 32, 60_000
DELTA = GatedDeltaNet.Config(heads=2, head_dim=4, value_head_dim=16, init=INIT, out_init=INIT)
ATTENTION = Attention.Config(heads=2, position=Rotary(), init=INIT, out_init=INIT)
ENTRIES = (
  Stacked(name='attention', mixers=(ATTENTION,) * 4, width=WIDTH),
  Stacked(name='Gated DeltaNet', mixers=(DELTA,) * 4, width=WIDTH),
  Stacked(name='hybrid', mixers=(DELTA, DELTA, DELTA, ATTENTION), width=WIDTH),
)
TASK = MultiQueryRecall(pairs=6, length=24, vocab_size=32, test_sequences=500)
BATCH, UPDATES, SEEDS = 32, 1400, (1, 2, 3, 4, 5)
FRACTION = 0.26  # of attention's state: a quarter, and the recurrent layers' states
# Qwen3-Next 80B-A3B, from its published config
PUBLISHED_LAYERS, PUBLISHED_WIDTH, PUBLISHED_CONTEXT = 48, 2048, 262_144
PUBLISHED_ATTENTION = Attention.Config(heads=16, kv_heads=2, head_dim=256, output_gate=True)
PUBLISHED_DELTA = GatedDeltaNet.Config(heads=16, value_heads=32, head_dim=128, value_head_dim=128)


def study(scale: float, runs: str) -> Study:
  updates = max(1, round(UPDATES * scale))
  return Study(
    name='three-to-one',
    dir=runs,
    entries=ENTRIES,
    target=TARGET,
    tolerance=0.03,
    tasks=(TASK,),
    tokens=updates * BATCH * TASK.positions,
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


def caches(done: Study) -> Caches:
  """Bytes of one sequence's state, by context."""
  models = {e.title: e.model(done, TASK.task.vocab_size, TASK.positions) for e in done.entries}
  return {
    name: [cost(model.replace(context_length=n)).decode_state_bytes or 0 for n in CONTEXTS]
    for name, model in models.items()
  }


def published() -> tuple[int, int]:
  """Return the bytes of state of Qwen3-Next at its context, and those of the same with attention in
  every layer."""
  attention, delta = (
    layer.state_bytes(PUBLISHED_WIDTH, PUBLISHED_CONTEXT)
    for layer in (PUBLISHED_ATTENTION, PUBLISHED_DELTA)
  )
  every = PUBLISHED_LAYERS // 4
  return every * attention + 3 * every * delta, PUBLISHED_LAYERS * attention


def decide(task: TaskResults, cache: Caches) -> tuple[gallery.Verdict, str]:
  """Return the verdict, and why."""
  verdict, because = interleaving.decide(task, cache, 'Gated DeltaNet', FRACTION)
  bytes_, full = published()
  return verdict, (
    f'{because} Computed for Qwen3-Next at {PUBLISHED_CONTEXT:,} tokens: {amount(bytes_, "B")}, '
    f'with attention in every layer {amount(full, "B")}.'
  )


def main() -> None:
  args = gallery.arguments(__doc__).parse_args()
  # at so few positions chunks take twice the time of the recurrence itself on a CPU
  with implementation(delta_rule='naive'):
    results = mixers.run(study(args.scale, args.runs))
  cache = caches(results.study)
  verdict, because = decide(results.tasks[0], cache)
  scale = (
    f'four layers of width {WIDTH}, {TARGET:,} parameters (within 3 %); '
    f'{results.study.steps(TASK):,} updates of {BATCH} sequences of {TASK.positions} tokens with '
    f'{TASK.pairs} pairs; learning rates {mixers.rates(args.scale)}; {len(SEEDS)} seeds'
  )
  interleaving.publish(args, 12, CLAIM, verdict, because, scale, results, cache)


if __name__ == '__main__':
  gallery.to_the_end(main)
