"""Prefill is parallel, decode is sequential: their cost per token differs, and keys and values grow
with the context.

Question: what does a token cost when a prompt is read, and what when one is written after a prompt
  of that length, for a
transformer and for two recurrences? And what of a sequence is kept?

    python experiments/claims/prefill_decode.py

Three models with fresh weights (times do not depend on them) of width 128 and four layers (Mamba:
eight of its blocks, which have no feed-forward layer), one sequence at a time, fp32. A round times
every model at every context once, in turn (`inference.time_decode`), so that what else the machine
does falls on all; the ratio of decoding to prefill is taken within a round, and its logarithm has
the interval over rounds. Reading can be parallel where the layer allows it: attention and RWKV-7
(in chunks) read by matrix products, Mamba's scan on a CPU goes token by token. Bytes are those of
real states in decoding, and of the config's own count.

What a small model on a CPU cannot show, how far memory's speed decides at a real size, is computed:
for Llama 2 7B on one TPU v5e, FLOPs and bytes of a prefill and of a token decoded, and what bounds
each (`planning.roofline`).

The claim is shown where decoding costs more a token than reading for the transformer at every
context (Holm over all), and its bytes grow in proportion to the context while those of the
recurrences do not grow.

Cost: a minute and a half of one CPU core.
Result (jax 0.10.2, two busy cores): shown. Decoded after 256, 1,024 and 4,096 tokens a token costs
the transformer 4.26, 4.96 and 19.23 times what it costs to read one (intervals over rounds 3.59 to
5.06, 3.04 to 8.10, 17.54 to 21.08), Mamba 1.25 to 1.55 times, RWKV-7 1.62 to 2.30. Keys and values
grow 16 times, and a token decoded takes the transformer 13.77 (11.83 to 16.03) times as long; the
recurrences' states stay, and so do their times as far as the noise lets see (Mamba 0.97, 0.24 to
3.94; RWKV-7 1.20, 0.66 to 2.17). Llama 2 7B on a v5e, computed: 1,936 FLOPs a byte in prefill
(compute), 1.00 in decoding (memory), 250 times the time. What `time_decode` times of decoding holds
the freeing of what the prompt leaves behind, too, which at 4,096 tokens and 32 new ones adds to the
recurrences' figures (in claim 5 the clock starts some tokens later, and Mamba's time a token
stays)."""

from __future__ import annotations

import math
import os
import statistics
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import constant_memory
import gallery
import jax

from jaxformer.inference import time_decode
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.params import define
from jaxformer.models.zoo import FAMILIES, PRESETS
from jaxformer.planning import estimate as planning
from jaxformer.planning.target import parse_target
from jaxformer.study.charts import Axis, Point, Series
from jaxformer.study.statistics import Difference, compare, estimate
from jaxformer.study.tables import amount, seconds

CLAIM = 'Prefill is parallel, decode is sequential: their cost per token differs, and keys and values grow with the context.'
# family, layers
MODELS = {'transformer': ('llama3', 4), 'Mamba': ('mamba', 8), 'RWKV-7': ('rwkv7', 4)}
WIDTH, VOCABULARY, NEW_TOKENS, ROUNDS = 128, 264, 32, 5
CONTEXTS = (256, 1024, 4096)
REAL, TARGET, REAL_CONTEXT = 'llama2-7b', 'v5e-1', 2048

Times = dict[str, dict[int, list[tuple[float, float]]]]
"""Model -> context -> for each round, seconds a token in prefill and in decoding."""


def model(name: str) -> LanguageModel.Config:
  """One of the three, at its size."""
  family, layers = MODELS[name]
  f = FAMILIES[family]
  made = f.make(
    width=WIDTH,
    layers=layers,
    hidden=f.hidden(WIDTH) if f.hidden else 0,
    vocab_size=VOCABULARY,
    context_length=CONTEXTS[0],
  )
  assert isinstance(made, LanguageModel.Config)
  return made


def measure(contexts: tuple[int, ...]) -> Times:
  """Every model at every context once a round."""
  definitions = {name: define(model(name)) for name in MODELS}
  params = {name: d.init(jax.random.key(0)) for name, d in definitions.items()}
  times: Times = {name: {c: [] for c in contexts} for name in MODELS}
  for round_ in range(ROUNDS):
    for context in contexts:
      for name, definition in definitions.items():
        # it warms up by itself
        t = time_decode(definition, params[name], context, NEW_TOKENS, repeats=1)
        times[name][context].append((t.prefill_seconds / context, t.seconds_per_token))
    print(f'round {round_ + 1} of {ROUNDS}', flush=True)
  return times


def ratios(times: Times) -> dict[str, Difference]:
  """log(decoding / prefill) a token against 0, paired by round, for each model and context."""
  logs = {
    f'{name}, {context}': {i: math.log(d / p) for i, (p, d) in enumerate(rounds)}
    for name, by_context in times.items()
    for context, rounds in by_context.items()
  }
  return {
    d.name: d
    for d in compare(
      logs | {'equal': dict.fromkeys(range(ROUNDS), 0.0)}, 'equal', lower_is_better=False
    )
  }


def real() -> dict[str, dict[str, Any]]:
  """What one TPU chip needs at least for a prefill and for a token decoded, at 2 bytes a number."""
  target, found = parse_target(TARGET), {}
  for phase, tokens in (('prefill', REAL_CONTEXT), ('decode', 1)):
    setup = planning.inference_setup(phase, PRESETS[REAL].model, target, 1, REAL_CONTEXT)
    step = planning.estimate(setup).as_json()['step']
    found[phase] = {
      'flops_a_byte': step['arithmetic_intensity'],
      'ridge': step['ridge_intensity'],
      'bound': step['bound'],
      'seconds_a_token': step['seconds'] / tokens,
    }
  return found


def decide(
  times: Times, found: dict[str, Difference], state: dict[str, list[int]], computed: dict[str, Any]
) -> tuple[gallery.Verdict, str]:
  """The verdict, and why."""
  contexts = list(times['transformer'])
  differs = all(found[f'transformer, {c}'].verdict == 'better' for c in contexts)
  opposite = all(found[f'transformer, {c}'].verdict == 'worse' for c in contexts)
  growth = {name: sizes[-1] / sizes[0] for name, sizes in state.items()}
  grows = math.isclose(growth['transformer'], contexts[-1] / contexts[0], rel_tol=0.01)
  constant = all(growth[name] == 1 for name in MODELS if name != 'transformer')
  verdict: gallery.Verdict = (
    'shown'
    if differs and grows and constant
    else ('contradicted' if opposite else 'shown in part' if grows or differs else 'not shown')
  )
  spans = []
  for name in MODELS:
    r = [found[f'{name}, {c}'].estimate for c in (contexts[0], contexts[-1])]
    spans.append(
      f'{name} {_times(r[0])} at {contexts[0]:,} tokens and {_times(r[1])} at {contexts[-1]:,}'
    )
  slower = {}
  for name in MODELS:
    logs = [
      math.log(b[1] / a[1])
      for a, b in zip(times[name][contexts[0]], times[name][contexts[-1]], strict=True)
    ]
    slower[name] = _times(estimate(logs))
  pre, dec = computed['prefill'], computed['decode']
  because = (
    f'A token decoded costs as many times one that is read: {"; ".join(spans)} (95 % over {ROUNDS} '
    'interleaved rounds). '
    f"From {contexts[0]:,} to {contexts[-1]:,} tokens of context the transformer's keys and values "
    'grow '
    f'{growth["transformer"]:.0f} times, the states of Mamba and RWKV-7 '
    f'{"not at all" if constant else "too"}, '
    f'and a token decoded takes {slower["transformer"]}, {slower["Mamba"]} and {slower["RWKV-7"]} '
    'times as long. '
    f'Computed for {REAL} on one TPU v5e at {REAL_CONTEXT:,} tokens: {pre["flops_a_byte"]:,.0f} '
    'FLOPs a byte in prefill, bound by '
    f'{pre["bound"]}; {dec["flops_a_byte"]:.2f} in decoding, bound by {dec["bound"]}, where the '
    'chip balances at '
    f'{dec["ridge"]:.0f}; a token takes at least '
    f'{dec["seconds_a_token"] / pre["seconds_a_token"]:,.0f} times as long. On a CPU the ratio is '
    'smaller: its products '
    'are slow beside its memory. Mamba reads token by token here, which a TPU or GPU does not.'
  )
  return verdict, because


def _times(log) -> str:
  return f'{math.exp(log.mean):.2f} ({math.exp(log.low):.2f} to {math.exp(log.high):.2f})'


def rows(
  times: Times, state: dict[str, list[int]], found: dict[str, Difference], computed: dict[str, Any]
) -> tuple[tuple[str, ...], ...]:
  measured = tuple(
    (
      name,
      f'{context:,}',
      seconds(statistics.median(p for p, _ in rounds)),
      seconds(statistics.median(d for _, d in rounds)),
      _times(found[f'{name}, {context}'].estimate),
      amount(size, 'B'),
      '',
    )
    for name in MODELS
    for (context, rounds), size in zip(times[name].items(), state[name], strict=True)
  )
  pre, dec = computed['prefill'], computed['decode']
  kept = 2 * (PRESETS[REAL].model.state_size(REAL_CONTEXT) or 0)
  return (
    *measured,
    (
      f'{REAL} on a v5e, computed',
      f'{REAL_CONTEXT:,}',
      seconds(pre['seconds_a_token']),
      seconds(dec['seconds_a_token']),
      f'{dec["seconds_a_token"] / pre["seconds_a_token"]:,.0f}',
      amount(kept, 'B'),
      f'{pre["flops_a_byte"]:,.0f} ({pre["bound"]}), {dec["flops_a_byte"]:.2f} ({dec["bound"]})',
    ),
  )


def pictures(times: Times, state: dict[str, list[int]]) -> list[gallery.Picture]:
  x = Axis('tokens of context', log=True, form='{:,.0f}'.format)

  def timed(what: int) -> list[Series]:
    return [
      Series(
        name,
        i,
        tuple(
          Point(c, 1e3 * statistics.median(t[what] for t in rounds)) for c, rounds in by.items()
        ),
        line=True,
      )
      for i, (name, by) in enumerate(times.items())
    ]

  kept = [
    Series(
      name, i, tuple(Point(c, s) for c, s in zip(times[name], state[name], strict=True)), line=True
    )
    for i, name in enumerate(MODELS)
  ]
  return [
    gallery.Picture.of(
      'prefill',
      'Milliseconds a token of reading a prompt (medians)',
      timed(0),
      x,
      Axis('ms a token', log=True),
    ),
    gallery.Picture.of(
      'decoding',
      'Milliseconds of a token decoded after a prompt (medians)',
      timed(1),
      x,
      Axis('ms', log=True),
    ),
    gallery.Picture.of(
      'state',
      'Bytes kept of a sequence',
      kept,
      x,
      Axis('bytes', log=True, form=lambda v: amount(v, 'B')),
    ),
  ]


def main() -> None:
  args = gallery.arguments(__doc__).parse_args()
  contexts = tuple(max(32, round(c * args.scale)) for c in CONTEXTS)
  times = measure(contexts)
  state = {name: constant_memory.state_bytes(model(name), contexts) for name in MODELS}
  found, computed = ratios(times), real()
  verdict, because = decide(times, found, state, computed)
  sizes = ', '.join(f'{name} {define(model(name)).size:,}' for name in MODELS)
  gallery.publish(
    args,
    gallery.Result(
      2,
      CLAIM,
      verdict,
      because,
      f'width {WIDTH}, parameters: {sizes}; one sequence, fp32, {NEW_TOKENS} new tokens, {ROUNDS} '
      'rounds; the last row is computed',
      (
        'model',
        'context',
        'prefill a token',
        'decoding a token',
        'ratio (95 %)',
        'state',
        'FLOPs a byte: prefill, decoding',
      ),
      rows(times, state, found, computed),
      {'seconds_a_token': times, 'state_bytes': state, 'computed': computed},
    ),
    pictures(times, state),
  )


if __name__ == '__main__':
  gallery.to_the_end(main)
