"""The lines that a plan prints, from its JSON data."""

from collections.abc import Iterable
from typing import Any

from jaxformer.hardware import GIB
from jaxformer.launch.catalog import CATALOG
from jaxformer.planning.step_profile import SOURCES
from jaxformer.workflows.tables import amount

_STEPS = {'train': 'training step', 'prefill': 'prefill', 'decode': 'decoded token'}  # of a phase
_NOT_PARTS = ('total', 'limit', 'fits', 'short_by', 'would_fit')  # of the memory in a report
Rows = list[tuple[str, str, str]]


def _parts(v: dict[str, Any], names: Iterable[str]) -> str:
  """Return the parts of a memory of at least 5 MiB, in GiB."""
  return ', '.join(f'{n} {v[n] / GIB:.2f}' for n in names if v[n] >= GIB / 200)


def _memory_row(what: str, v: dict[str, Any], parts: str) -> tuple[str, str, str]:
  """Format `total` and `limit` of a memory, and whether it fits."""
  verdict = 'fits' if v['fits'] else f'does not fit, by {v["short_by"] / GIB:,.2f} GiB'
  size = f'{v["total"] / GIB:,.2f} GiB of {v["limit"] / GIB:,.2f}'
  return what, size, f'{verdict}: {parts}' if parts else verdict


def _run_rows(v: dict[str, Any]) -> Rows:
  r, t = v['run'], v['target']
  source = t['chip']['source'].partition('price: ')[2]
  spot = 'no list price' if r['spot_price_usd'] is None else f'${r["spot_price_usd"]:,.0f}'
  rate = (
    f'at {100 * r["utilization"]:g}% of the peak, {r["tokens_per_second"]:,.0f} tokens per second'
  )
  hours = f'{r["chip_hours"]:,.0f} chip-hours; spot: {spot}'
  return [
    ('target', f'{t["name"]}: {t["chips"]:,} chips', f'{_mesh_words(v)}; remat {v["remat"]}'),
    ('time', f'{r["days"]:,.4g} days', rate),
    ('price', f'${r["price_usd"]:,.0f} on demand', hours),
    *([('', '', source)] if source.startswith(CATALOG) else []),
  ]


def _mesh_words(v: dict[str, Any]) -> str:
  return ', '.join(f'{a} {n}' for a, n in v['mesh'].items() if n > 1) or 'one device'


def _serving_rows(v: dict[str, Any]) -> Rows:
  s, t = v['serving'], v['target']
  spot = s['spot_price_per_million_tokens_usd']
  rate = f'at {100 * s["utilization"]:g}% of the peak of the bottleneck'
  return [
    ('target', f'{t["name"]}: {t["chips"]:,} chips', _mesh_words(v)),
    ('time per 1M tokens', f'{s["seconds_per_million_tokens"]:,.4g} s', rate),
    (
      'price per 1M tokens',
      f'${s["price_per_million_tokens_usd"]:,.4g} on demand',
      f'spot: {"no list price" if spot is None else f"${spot:,.4g}"}',
    ),
  ]


def _memory_rows(v: dict[str, Any]) -> Rows:
  m = v['memory']
  rows = [_memory_row('memory per device', m, _parts(m, [n for n in m if n not in _NOT_PARTS]))]
  rows += [('' if i else 'what would fit', text, '') for i, text in enumerate(m['would_fit'])]
  if not m['fits'] and not m['would_fit']:
    advice = 'try a chip with more memory, or --mesh.tensor'
    rows.append(('what would fit', 'no single change', advice))
  return rows


def _step_rows(v: dict[str, Any]) -> Rows:
  s = v['step']
  bounds = ('compute', 'memory', 'interconnect', 'network')
  times = ', '.join(f'{name} {1e3 * s[f"{name}_seconds"]:,.4g} ms' for name in bounds)
  what = _STEPS[v['phase']]
  bound = f'at least {1e3 * s["seconds"]:,.4g} ms, bound by {s["bound"]}'
  rate, at_once = f'at most {s["tokens_per_second"]:,.0f}', f'{s["tokens"]:,} tokens at once'
  traffic = f'{s["arithmetic_intensity"]:,.4g} of memory traffic'
  return [
    (what, bound, times),
    ('  tokens per second', rate, at_once),
    ('  FLOPs per byte', traffic, f'the chip is balanced at {s["ridge_intensity"]:,.4g}'),
  ]


def _compiled_rows(v: dict[str, Any]) -> Rows:
  v = v['compiled']
  known = v['arguments'] is not None
  parts = _parts(v, ('arguments', 'temporaries', 'outputs')) if known else ''
  rows = [_memory_row('compiler', v, parts)]
  if (counted := v['flops']) is not None:
    left = ', '.join(f'{n} x {name}' for name, n in counted['not_counted'].items())
    note = f'not counted: {left}' if left else ''
    rows.append(('compiled FLOPs', f'{counted["total"]:.4g} per device', note))
  for i, (axis, kinds) in enumerate(v['collectives'].items()):
    sizes = {kind: t['bytes'] for kind, t in sorted(kinds.items())}
    sent = _parts(sizes, sizes) or 'little'
    rows.append(('' if i else 'sent, GiB per device', f'over {axis}', sent))
  rows += [('left out', *line.split(': ', 1)) for line in v['left_out']]
  versions = f'jax {v["jax"]}, libtpu {v["libtpu"]}'
  rows.append(('compiled in', f'{v["compile_seconds"]:.0f} s', versions))
  return rows + [('disagreement', *line.split(': ', 1)) for line in v['disagreements']]


def _predicted_rows(v: dict[str, Any]) -> Rows:
  p = v['predicted']
  what = _STEPS[v['phase']]
  shares = ', '.join(f'{kind} {100 * s:.0f}%' for kind, s in p['shares'].items())
  full = '' if p['mfu_full'] is None else f', {100 * p["mfu_full"]:.1f}% (full)'
  rows = [
    (f'predicted {what}', f'{1e3 * p["seconds"]:,.4g} ms', f'bound by {p["bound"]}: {shares}'),
    *_interval_row(p['interval']),
    (
      '  tokens per second',
      f'{p["tokens_per_second"]:,.0f}',
      f'{p["tokens_per_second_per_chip"]:,.0f} per chip',
    ),
    ('  MFU', f'{100 * p["mfu"]:.1f}% (causal){full}', f'HFU {100 * p["hfu"]:.1f}%'),
  ]
  if p['train_seconds'] is not None:
    price = f'${p["train_price_usd"]:,.0f} on demand'
    rows.append(('  training', f'{p["train_seconds"] / 86400:,.4g} days', price))
  return rows


def _interval_row(interval: tuple[float, float] | None) -> Rows:
  if interval is None:
    return []
  low, high = (1e3 * seconds for seconds in interval)
  return [('  interval', f'{low:,.4g} to {high:,.4g} ms', 'as published steps lie around theirs')]


def _profile_rows(v: dict[str, Any]) -> Rows:
  p = v['profile']
  total = p['seconds']

  def parts(seconds: dict[str, float]) -> str:
    return ', '.join(f'{name} {1e3 * s:,.4g}' for name, s in seconds.items() if s > total / 1e4)

  hidden = f'{1e3 * p["hidden_communication"]:,.4g} ms of communication hidden'
  rows = [('time by phase, ms', parts(p['by_phase']), hidden)]
  for i, (layer, phases) in enumerate(p['by_layer'].items()):
    if (seconds := sum(phases.values())) > total / 1e3:
      words = f'{layer} {1e3 * seconds:,.4g}'
      rows.append(('' if i else 'time by layer, ms', words, parts(phases)))
  for i, s in enumerate(p['sources'][:SOURCES]):
    share = f'{1e3 * s["seconds"]:,.4g} ms, {100 * s["seconds"] / total:.1f}%'
    what = f'{s["phase"]} {s["kind"]}, {s["times"]} x {s["operation"][-60:]}'
    rows.append(('' if i else 'longest sources', f'{share}: {s["place"] or "-"}', what))
  return rows


ROWS = {
  'run': _run_rows,
  'serving': _serving_rows,
  'memory': _memory_rows,
  'step': _step_rows,
  'compiled': _compiled_rows,
  'predicted': _predicted_rows,
  'profile': _profile_rows,
}


def search_lines(v: dict[str, Any]) -> list[str]:
  rejected = [f'  {entry["name"]}: {entry["reason"]}' for entry in v['rejected']]
  if v['best'] is None:
    return [f'none of {v["candidates"]} candidates fits', *rejected]
  best = next(c for c in v['compiled'] if c['name'] == v['best'])
  return [
    f'best of {v["candidates"]} candidates: {v["best"]}',
    f'  {best["total"] / GIB:.2f} GiB of {best["limit"] / GIB:.2f} per device by the compiler, '
    f'{best["predicted_bytes"] / GIB:.2f} by the formulas',
    f'  a step takes about {v["step_seconds"]:.3g} s, {amount(v["tokens_per_second"])} tokens per '
    'second (predicted from the compiled program)',
    'rejected:',
    *rejected,
    f'to train it: {v["command"]}',
  ]
