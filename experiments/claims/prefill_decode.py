"""Prefill is parallel, decode is sequential: their cost per token differs, and keys and values grow
with the context.

Question: what does a token cost in prefill, and what in decoding after a prompt of that length, for
a transformer and for two recurrences? And how large is their state?

    python experiments/claims/prefill_decode.py

Three models with freshly initialized weights (times do not depend on them) of width 128 and four
layers (eight blocks of Mamba, which have no feed-forward layer), one sequence at a time, fp32. A
round times every model at every context length once, in turns (`inference.time_decode`), so that
other load on the machine affects all; the ratio of decoding to prefill is taken within a round, and
the interval of its logarithm is over rounds. Prefill is parallel where the layer allows it:
attention and RWKV-7 (in chunks) use matrix products; Mamba's scan on a CPU is sequential. State
sizes are those of real decoding states, and of the config's own count.

What a small model on a CPU cannot show, how far memory bandwidth decides at a real size, is
computed: for Llama 2 7B on one TPU v5e, FLOPs and bytes per token of prefill and of decoding, and
the bottleneck of each (`planning.roofline`).

The claim is supported if a token costs more in decoding than in prefill for the transformer at
every context length (Holm over all), and its state grows in proportion to the context while that of
the recurrences does not grow.

Cost: a minute and a half on one CPU core.

Result (jax 0.10.2, two busy cores): supported. After 256, 1,024 and 4,096 tokens a decoded token
costs the transformer 4.26, 4.96 and 19.23 times a token of prefill (intervals over rounds 3.59 to
5.06, 3.04 to 8.10, 17.54 to 21.08), Mamba 1.25 to 1.55 times, RWKV-7 1.62 to 2.30. Keys and values
grow 16 times, and the transformer's time per decoded token 13.77 times (11.83 to 16.03); the states
of the recurrences are constant, and so are their times within the noise (Mamba 0.97, 0.24 to 3.94;
RWKV-7 1.20, 0.66 to 2.17). Llama 2 7B on a v5e, computed: 1,936 FLOPs per byte in prefill
(compute-bound), 1.00 in decoding (memory-bound), 250 times the time. The decoding time of
`time_decode` includes freeing the memory of the prefill, which at 4,096 tokens and 32 new ones
inflates the figures of the recurrences (in claim 5 timing starts some tokens later, and Mamba's
time per token is constant)."""

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

CLAIM = (
  'Prefill is parallel, decode is sequential: their cost per token differs, and keys and values '
  'grow with the context.'
)
# family, layers
MODELS = {'transformer': ('llama3', 4), 'Mamba': ('mamba', 8), 'RWKV-7': ('rwkv7', 4)}
WIDTH, VOCABULARY, NEW_TOKENS, ROUNDS = 128, 264, 32, 5
CONTEXTS = (256, 1024, 4096)
REAL, TARGET, REAL_CONTEXT = 'llama2-7b', 'v5e-1', 2048

Times = dict[str, dict[int, list[tuple[float, float]]]]
"""Model -> context -> for each round, seconds per token in prefill and in decoding."""


def model(name: str) -> LanguageModel.Config:
  """Return one of the three models, at its size."""
  family, layers = MODELS[name]
  f = FAMILIES[family]
  made = f.make(
    width=WIDTH,
    layers=layers,
    vocab_size=VOCABULARY,
    context_length=CONTEXTS[0],
    **({'hidden': f.hidden(WIDTH)} if f.hidden else {}),
  )
  assert isinstance(made, LanguageModel.Config)
  return made


def measure(contexts: tuple[int, ...]) -> Times:
  """Time every model at every context length once per round."""
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
  """log(decoding / prefill) per token against 0, paired by round, for each model and context."""
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
  """Return the least time of one TPU chip per token of prefill and per decoded token, at 2 bytes
  per number."""
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
  """Return the verdict, and why."""
  contexts = list(times['transformer'])
  differs = all(found[f'transformer, {c}'].verdict == 'better' for c in contexts)
  opposite = all(found[f'transformer, {c}'].verdict == 'worse' for c in contexts)
  growth = {name: sizes[-1] / sizes[0] for name, sizes in state.items()}
  grows = math.isclose(growth['transformer'], contexts[-1] / contexts[0], rel_tol=0.01)
  constant = all(growth[name] == 1 for name in MODELS if name != 'transformer')
  verdict: gallery.Verdict = (
    'supported'
    if differs and grows and constant
    else (
      'contradicted' if opposite else 'partly supported' if grows or differs else 'not supported'
    )
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
    f'Cost of a decoded token relative to a token of prefill: {"; ".join(spans)} (95 % over '
    f'{ROUNDS} '
    'interleaved rounds). '
    f"From {contexts[0]:,} to {contexts[-1]:,} tokens of context the transformer's keys and values "
    'grow '
    f'{growth["transformer"]:.0f} times, the states of Mamba and RWKV-7 '
    f'{"not at all" if constant else "too"}, '
    f'and per decoded token takes {slower["transformer"]}, {slower["Mamba"]} and '
    f'{slower["RWKV-7"]} '
    'times as long. '
    f'Computed for {REAL} on one TPU v5e at {REAL_CONTEXT:,} tokens: {pre["flops_a_byte"]:,.0f} '
    'FLOPs per byte in prefill, bound by '
    f'{pre["bound"]}; {dec["flops_a_byte"]:.2f} in decoding, bound by {dec["bound"]}, where the '
    'chip balances at '
    f'{dec["ridge"]:.0f}; a token takes at least '
    f'{dec["seconds_a_token"] / pre["seconds_a_token"]:,.0f} times as long. On a CPU the ratio is '
    'smaller: its products '
    'are slow beside its memory. The prefill of Mamba runs token by token here, unlike on a TPU '
    'or GPU.'
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
      'Prefill time in milliseconds per token (medians)',
      timed(0),
      x,
      Axis('ms per token', log=True),
    ),
    gallery.Picture.of(
      'decoding',
      'Decoding time in milliseconds per token, after a prompt (medians)',
      timed(1),
      x,
      Axis('ms', log=True),
    ),
    gallery.Picture.of(
      'state',
      'State size of one sequence, in bytes',
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
        'prefill per token',
        'decoding per token',
        'ratio (95 %)',
        'state',
        'FLOPs per byte: prefill, decoding',
      ),
      rows(times, state, found, computed),
      {'seconds_a_token': times, 'state_bytes': state, 'computed': computed},
    ),
    pictures(times, state),
  )


if __name__ == '__main__':
  gallery.to_the_end(main)
