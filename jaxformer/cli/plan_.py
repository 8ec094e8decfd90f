"""What a preset or an experiment costs: parameters, FLOPs and memory, from shapes alone.

FLOPs a token are averaged over the model's context for a preset, over the experiment's sequence length for a file; give
--data.sequence-length for another. Overrides as in `train`.
"""

from __future__ import annotations

import argparse
import dataclasses

from jaxformer.cli.common import Overrides, answer, experiment_of, table

OVERRIDES = True


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('target', metavar='PRESET|FILE', help='a name of `jaxformer list`, or a Python file that defines '
                      '`experiment`')
  parser.add_argument('--json', action='store_true', help='one object with all figures and the inputs they rest on')


def run(args: argparse.Namespace, overrides: Overrides) -> None:
  from jaxformer.models.zoo import PRESETS
  from jaxformer.planning.cost import cost
  experiment = experiment_of(args.target, overrides)
  given = args.target not in PRESETS or any('sequence' in path for path, _ in overrides)
  c = cost(experiment.model, experiment.data.positions if given else experiment.model.context)
  value = {'name': args.target, 'family': PRESETS[args.target].family if args.target in PRESETS else None} | dataclasses.asdict(c)

  def lines() -> list[str]:
    active = f', {c.active_params:,} active' if c.active_params != c.params else ''
    state = [] if c.decode_state_bytes is None else [
      ('state in decoding', f'{c.decode_state_bytes / 1e9:,.4g} GB', f'a sequence of {c.context:,} tokens, 2 bytes a number')]
    return [f'{args.target}: {c.params:,} parameters{active}', *table([
      ('training FLOPs a token', f'{c.train_flops_per_token:.4g} (causal), {c.train_flops_per_token_full:.4g} (full)',
       f'at {c.length:,} tokens'),
      ('weights', f'{c.weight_bytes / 1e9:,.4g} GB', 'at 2 bytes a parameter'), *state], left=3)]

  answer(value, args.json, lines)
