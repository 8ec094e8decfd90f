"""What a preset or an experiment costs, from shapes alone; with --target, time, money, memory a
device and what bounds a step.

FLOPs a token are averaged over the model's context for a preset (with --target, over at most 8,192
tokens), over the experiment's sequence length for a file; give --data.sequence-length for another.
A preset on a target trains with one sequence a device and remat 'full' unless told otherwise.
Overrides as in `train`.

With a size (--params 125M, --active-params, --flops-per-token or --state-bytes) the name is that of
a family, such as mamba or llama3, or a layer of yours as FILE.py:NAME, in a frame like Llama's. The
width, depth and hidden units are found that come closest, for bytes and 256 tokens of context
unless --model.vocab-size and --model.context-length say otherwise. `plan families`, and several sizes as
in --params 1M,10M,125M, give a table of shapes and of how close they come."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from jaxformer.cli import compiling, sizes
from jaxformer.cli.common import Overrides, amount, answer, experiment_of, note, table
from jaxformer.config import InputError
from jaxformer.overrides import override

OVERRIDES = True


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    'preset',
    metavar='PRESET|FILE|FAMILY|FILE:NAME',
    help='a name of `jaxformer list`, a Python file that '
    'defines `experiment`, or what a model of a size is made of: a family, or a layer in a Python '
    'file',
  )
  sizes.arguments(parser, '; several, as 1M,10M, give a table')
  parser.add_argument(
    '--target', help='what would be rented: v5p-2048, v6e-256, 2 x v5e-256, v5e:2x4, h100:8'
  )
  parser.add_argument(
    '--tokens',
    help='of the training, as 2T or 300B; by default 20 for each active parameter (Chinchilla)',
  )
  parser.add_argument(
    '--utilisation', type=float, default=0.4, help='of the peak, in time and money (0.4)'
  )
  parser.add_argument('--price', type=float, help='USD a chip and hour, in place of the list price')
  parser.add_argument(
    '--hardware',
    metavar='FILE',
    help="one's own figures of chips, TOML or JSON (see planning/hardware.py)",
  )
  parser.add_argument(
    '--phase',
    choices=('train', 'prefill', 'decode'),
    default='train',
    help='what is planned (train)',
  )
  parser.add_argument(
    '--compile',
    action='store_true',
    help="run the TPU's compiler on the program, and show what it says",
  )
  parser.add_argument(
    '--search',
    action='store_true',
    help='try meshes, batch sizes (unless given) and remat policies; compile '
    'the best few and recommend one',
  )
  parser.add_argument(
    '--json', action='store_true', help='one object with all figures and the inputs they rest on'
  )


def run(args: argparse.Namespace, overrides: Overrides) -> None:
  from jaxformer.models.zoo import PRESETS
  from jaxformer.planning.cost import cost
  from jaxformer.planning.estimate import TOKENS_PER_PARAMETER, parse_amount

  _check(args)
  asked, given = sizes.sizes_of(args), {path.replace('-', '_') for path, _ in overrides}
  if args.preset == sizes.ALL or len(asked) > 1:
    _table(args, asked, overrides)
    return
  sized = None
  if asked or sizes.is_layer(args.preset):
    sized, overrides = sizes.made(args.preset, sizes.size_of(args), overrides)
  preset = sized is not None or args.preset in PRESETS
  plain = [] if args.target and preset else overrides
  experiment = (
    experiment_of(args.preset, plain) if sized is None else override(sizes.experiment(sized), plain)
  )
  # what the tiny training of a preset assumes does not hold on a target
  if args.target and preset:
    experiment = _at_scale(experiment, args, overrides, given)
  own_length = (
    not preset
    or any('sequence' in path for path in given)
    or (args.target and args.phase == 'train')
  )
  c = cost(
    experiment.model, experiment.data.positions if own_length else experiment.model.context_length
  )
  tokens = (
    TOKENS_PER_PARAMETER * float(c.active_params)
    if args.tokens is None
    else parse_amount(args.tokens)
  )
  value: dict[str, Any] = {
    'name': args.preset,
    'family': PRESETS[args.preset].family if args.preset in PRESETS else None,
  }
  if sized is not None:
    value |= {
      'name': sizes.name_of(sized),
      'family': sized.family,
      'shape': sizes.shape(sized, experiment.model),
    }
  value |= dataclasses.asdict(c) | {
    'tokens': tokens,
    'tokens_per_parameter': tokens / c.active_params,
    'train_flops': tokens * c.train_flops_per_token,
  }
  if args.target:
    value |= _on_target(args, experiment, given, preset, tokens, c.context_length)
  answer(value, args.json, lambda: _lines(value))


def _table(args: argparse.Namespace, asked: list[sizes.Size], overrides: Overrides) -> None:
  """Shapes of all families or at several sizes, and nothing of their cost."""
  if args.target is not None:
    raise InputError('--target: plans one model; give one family and one size')
  rows = sizes.all_shapes(args.preset, asked, overrides)
  answer(rows, args.json, lambda: sizes.shape_lines(rows))


def _check(args: argparse.Namespace) -> None:
  if not 0 < args.utilisation <= 1:
    raise InputError(f'--utilisation {args.utilisation}: must be above 0 and at most 1')
  if args.price is not None and args.price <= 0:
    raise InputError(f'--price {args.price}: must be positive')
  for name in ('price', 'hardware'):
    if getattr(args, name) is not None and args.target is None:
      raise InputError(f'--{name}: has an effect with --target alone')
  if args.phase != 'train' and args.target is None:
    raise InputError(f'--phase {args.phase}: needs --target')
  for name in ('compile', 'search'):
    if getattr(args, name) and args.target is None:
      raise InputError(f'--{name}: needs --target')
  if args.search and (args.compile or args.phase != 'train'):
    raise InputError(
      '--search: compiles by itself, and only for training; leave out --compile and --phase'
    )


def _target(args: argparse.Namespace) -> Any:
  from jaxformer.planning.hardware import CHIPS, hardware_file
  from jaxformer.planning.target import parse_target

  return parse_target(args.target, CHIPS if args.hardware is None else hardware_file(args.hardware))


def _at_scale(
  experiment: Any, args: argparse.Namespace, overrides: Overrides, given: set[str]
) -> Any:
  """A preset's experiment with one sequence a device and full remat, then the overrides."""
  devices = _target(args).devices
  model = experiment.model
  training = experiment.training.replace(
    batch_size=devices if args.phase == 'train' else 1, remat='full'
  )
  data = experiment.data
  if hasattr(data, 'sequence_length'):
    data = data.replace(sequence_length=min(model.context_length, 8192))
  return override(experiment.replace(training=training, data=data), overrides)


def _on_target(
  args: argparse.Namespace,
  experiment: Any,
  given: set[str],
  preset: bool,
  tokens: float,
  context_length: int,
) -> dict[str, Any]:
  from jaxformer.launch.check import setup_of
  from jaxformer.planning.estimate import estimate, inference_setup, training_run
  from jaxformer.planning.setup import default_mesh

  target, t = _target(args), experiment.training
  if args.compile or args.search:
    compiling.check_compiles(target)
  precision = 'fp32' if t.dtype == 'float32' else 'bf16'
  if args.phase != 'train':
    length = (
      experiment.data.positions
      if not preset or any('sequence' in path for path in given)
      else context_length
    )
    setup = inference_setup(args.phase, experiment.model, target, t.batch_size, length, precision)
    value = estimate(setup).as_json()
    if args.compile:
      value['compiled'] = compiling.inference_report(experiment, setup, value['memory']['total'])
    return value
  mesh = experiment.mesh
  if preset and not any(path.startswith('mesh') for path in given):
    mesh = default_mesh(experiment.model, target, t.batch_size, t.accumulate)
  setup = dataclasses.replace(setup_of(experiment, target, mesh), platform=None)
  found: dict[str, Any] = {}
  if args.search:
    if chosen := [path for path in given if path.startswith('mesh') or path == 'training.remat']:
      raise InputError(f'--{chosen[0]}: --search chooses it; give --compile to compile one choice')
    batch_given = not preset or 'training.batch_size' in given
    found['search'], setup = compiling.search_report(experiment, setup, batch_given, args.preset)
  note(f'tracing a step of {setup.batch_size} x {setup.length} tokens on {target.name}')
  run = training_run(
    setup.model,
    setup.length,
    target,
    tokens,
    args.utilisation,
    precision=precision,
    price=args.price,
  )
  found |= {'run': run.as_json()} | estimate(setup).as_json()
  if args.compile:
    found['compiled'] = compiling.train_report(experiment, setup)
  return found


# ---- for a reader ------------------------------------------------------------------------------


def _lines(v: dict[str, Any]) -> list[str]:
  active = f', {v["active_params"]:,} active' if v['active_params'] != v['params'] else ''
  state = (
    []
    if v['decode_state_bytes'] is None
    else [
      (
        'state in decoding',
        f'{v["decode_state_bytes"] / 1e9:,.4g} GB',
        f'a sequence of {v["context_length"]:,} tokens, 2 bytes a number',
      )
    ]
  )
  rows = [sizes.shape_row(v['shape'])] if 'shape' in v else []
  rows += [
    (
      'training FLOPs a token',
      f'{v["train_flops_per_token"]:.4g} (causal), {v["train_flops_per_token_full"]:.4g} (full)',
      f'at {v["length"]:,} tokens',
    ),
    ('weights', f'{v["weight_bytes"] / 1e9:,.4g} GB', 'at 2 bytes a parameter'),
    *state,
  ]
  if 'run' not in v:
    rows.append(
      (
        'training',
        f'{v["train_flops"]:.4g} FLOPs',
        f'{amount(v["tokens"])} tokens, {v["tokens_per_parameter"]:.3g} an active parameter',
      )
    )
  compiled = compiling.compiled_lines(v['compiled']) if 'compiled' in v else []
  found = compiling.search_lines(v['search']) if 'search' in v else []
  rows += _run_rows(v) + _memory_rows(v) + _step_rows(v) + compiled
  return [f'{v["name"]}: {v["params"]:,} parameters{active}', *table(rows, left=3), *found]


def _run_rows(v: dict[str, Any]) -> list[tuple[str, str, str]]:
  if 'run' not in v:
    return []
  r, t = v['run'], v['target']
  share = f'{v["tokens_per_parameter"]:.3g} an active parameter'
  spot = 'no list price' if r['spot_price_usd'] is None else f'${r["spot_price_usd"]:,.0f}'
  mesh = ', '.join(f'{a} {n}' for a, n in v['mesh'].items() if n > 1) or 'one device'
  return [
    ('target', f'{t["name"]}: {t["chips"]:,} chips', f'{mesh}; remat {v["remat"]}'),
    ('training', f'{r["train_flops"]:.4g} FLOPs', f'{amount(r["tokens"])} tokens, {share}'),
    (
      'time',
      f'{r["days"]:,.4g} days',
      f'at {100 * r["utilisation"]:g}% of the peak, {r["tokens_per_second"]:,.0f} tokens a second',
    ),
    (
      'price',
      f'${r["price_usd"]:,.0f} on demand',
      f'{r["chip_hours"]:,.0f} chip-hours; spot: {spot}',
    ),
  ]


def _memory_rows(v: dict[str, Any]) -> list[tuple[str, str, str]]:
  from jaxformer.planning.hardware import GIB

  if 'memory' not in v:
    return []
  m = v['memory']
  parts = ', '.join(
    f'{name} {size / GIB:.2f}'
    for name, size in m.items()
    if name not in ('total', 'limit', 'fits', 'short_by', 'would_fit') and size >= GIB / 200
  )
  verdict = 'fits' if m['fits'] else f'does not fit, by {m["short_by"] / GIB:,.2f} GiB'
  rows = [
    (
      'memory a device',
      f'{m["total"] / GIB:,.2f} GiB of {m["limit"] / GIB:,.2f}',
      f'{verdict}: {parts}',
    )
  ]
  for i, words in enumerate(m['would_fit']):
    rows.append(('' if i else 'what would fit', words, ''))
  if not m['fits'] and not m['would_fit']:
    rows.append(
      ('what would fit', 'no change of one thing', 'try a chip with more memory, or --mesh.tensor')
    )
  return rows


def _step_rows(v: dict[str, Any]) -> list[tuple[str, str, str]]:
  if 'step' not in v:
    return []
  s = v['step']
  times = ', '.join(
    f'{name} {1e3 * s[f"{name}_seconds"]:,.4g} ms'
    for name in ('compute', 'memory', 'interconnect', 'network')
  )
  what = {'prefill': 'prefill', 'decode': 'a decoded token'}.get(v.get('phase', ''), 'a step')
  return [
    (what, f'at least {1e3 * s["seconds"]:,.4g} ms, bound by {s["bound"]}', times),
    (
      '  tokens a second',
      f'at most {s["tokens_per_second"]:,.0f}',
      f'{s["tokens"]:,} tokens at once',
    ),
    (
      '  FLOPs a byte',
      f'{s["arithmetic_intensity"]:,.4g} of memory traffic',
      f'the chip balances at {s["ridge_intensity"]:,.4g}',
    ),
  ]
