"""Models made to a size, for `plan` and `train`: of a family, or with a layer of one's own, by the
solver of `compare.sizing`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from jaxformer.cli.common import Overrides, amount, note, table
from jaxformer.config import InputError, nearest
from jaxformer.user_code import object_in_file

Size = tuple[Any, float]  # what is matched, and to how much

OPTIONS = {  # option -> (what is matched, in words, ending of a name)
  '--params': ('params', 'parameters', ''),
  '--active-params': ('active_params', 'active parameters', '-active'),
  '--flops-per-token': ('train_flops_per_token', 'training FLOPs a token', '-flops'),
  '--state-bytes': ('state_bytes', 'bytes of state', '-state'),
}
WORDS = {match: words for match, words, _ in OPTIONS.values()}
FIRST: Size = 'params', 1e6
# of a model made to a size, unless told otherwise: those of the tiny presets
BYTES = {'vocab_size': 264, 'context_length': 256}
ALL = 'families'
TOLERANCE = 0.02


def arguments(parser: argparse.ArgumentParser, more: str = '') -> None:
  """The options of a size, of which one may be given; `more` is what the command says of it."""
  group = parser.add_mutually_exclusive_group()
  for option, (_, words, _) in OPTIONS.items():
    group.add_argument(
      option,
      metavar='SIZE',
      help=f'make a model of so many {words} of a family or around a layer, as 125M{more}',
    )


def sizes_of(args: argparse.Namespace) -> list[Size]:
  """What the options ask for."""
  from jaxformer.planning.estimate import parse_amount

  return [
    (match, parse_amount(part, option))
    for option, (match, _, _) in OPTIONS.items()
    if (text := getattr(args, option[2:].replace('-', '_'))) is not None
    for part in text.split(',')
  ]


def size_of(args: argparse.Namespace) -> Size | None:
  """The one size that the options ask for; None where they name none."""
  sizes = sizes_of(args)
  if len(sizes) > 1:
    raise InputError(f'one size makes one model; {len(sizes)} are given')
  return sizes[0] if sizes else None


def is_layer(target: str) -> bool:
  """Whether a target is FILE.py:NAME."""
  return '.py:' in target


def made(
  target: str, size: Size | None, overrides: Overrides, tolerance: float = TOLERANCE
) -> tuple[Any, Overrides]:
  """The model (a `compare.sizing.Sized`) of a family, or around the layer FILE:NAME, at a size (of
  a million parameters for a layer without one), and the overrides that are left: the vocabulary and
  the context are needed to find it."""
  from jaxformer.planning.estimate import parse_amount
  from jaxformer.study.sizing import solve

  family, left = family_of(target), []
  frame = BYTES | ({'source_vocab_size': BYTES['vocab_size']} if family.of_pairs else {})
  for path, text in overrides:
    section, _, field = path.replace('-', '_').partition('.')
    if section == 'model' and field in frame:
      frame[field] = round(parse_amount(text, f'--{path}'))
    else:
      left.append((path, text))
  match, target_size = size or FIRST
  return solve(family, match, target_size, **frame, tolerance=tolerance), left


def family_of(target: str) -> Any:
  """The family of a name, or the one around the layer that FILE:NAME stands for."""
  from jaxformer.layers.layer import LayerConfig
  from jaxformer.models.zoo import FAMILIES, PRESETS
  from jaxformer.models.zoo.around import around

  if is_layer(target):
    layer = object_in_file(target)
    if not isinstance(layer, LayerConfig):
      raise InputError(f'{target}: is not the config of a layer (a subclass of LayerConfig)')
    return around(layer)
  if target not in set(FAMILIES):
    have = (
      f'; {target} has the size of a published model'
      if target in set(PRESETS)
      else nearest(target, FAMILIES)
    )
    raise InputError(
      f'no family named {target!r} to make a model of a size of{have}; there are '
      f'{", ".join(FAMILIES)}'
    )
  return FAMILIES[target]


def experiment(sized: Any) -> Any:
  """What trains a made model, as `default_experiment` trains a preset."""
  from jaxformer.training.experiment import default_experiment

  return default_experiment(sized.model, name_of(sized))


def name_of(sized: Any) -> str:
  """What a made model is called: mamba-125M."""
  ending = next(e for match, _, e in OPTIONS.values() if match == sized.match)
  return f'{sized.family}-{amount(sized.target)}{ending}'


# ---- said of them ------------------------------------------------------------------------------


def shape(sized: Any, model: Any) -> dict[str, Any]:
  """A made model as JSON data: its shape, and how close `model` comes, which may have been changed
  since."""
  from jaxformer.study.sizing import measure

  value = measure(model, sized.match)
  error = value / sized.target - 1
  return {
    name: getattr(sized, name)
    for name in ('family', 'match', 'target', 'width', 'layers', 'hidden')
  } | {'value': value, 'error': error, 'within': abs(error) <= TOLERANCE}


def shape_row(v: dict[str, Any]) -> tuple[str, str, str]:
  """The same as a line of a plan."""
  hidden = '' if v['hidden'] is None else f', {v["hidden"]:,} hidden units'
  off = f'{v["error"]:+.2%} of {amount(v["target"])} {WORDS[v["match"]]}'
  return 'shape', f'width {v["width"]:,}, {v["layers"]} layers{hidden}', off


def all_shapes(target: str, sizes: Sequence[Size], overrides: Overrides) -> list[dict[str, Any]]:
  """Every family, or the one that a target names, at every size."""
  from jaxformer.models.zoo import FAMILIES
  from jaxformer.planning.cost import cost

  found = []
  for name in FAMILIES if target == ALL else [target]:
    note(f'sizing {name}')
    for size in sizes or [FIRST]:
      sized, left = made(name, size, overrides, tolerance=math.inf)
      if left:
        raise InputError(
          f'--{left[0][0]}: a table of sizes takes --model.vocab-size and --model.context-length alone'
        )
      c = cost(sized.model)
      found.append(
        shape(sized, sized.model)
        | {
          'params': c.params,
          'active_params': c.active_params,
          'train_flops_per_token': c.train_flops_per_token,
          'state_bytes': c.decode_state_bytes,
        }
      )
  return found


def shape_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
  """The same as a table, and how many are as close as they should be."""
  words = WORDS[rows[0]['match']]
  header = ('family', words, 'width', 'layers', 'hidden', 'found', 'off by', '')
  rest = [
    (
      v['family'],
      amount(v['target']),
      f'{v["width"]:,}',
      str(v['layers']),
      '' if v['hidden'] is None else f'{v["hidden"]:,}',
      f'{v["value"]:,.0f}',
      f'{v["error"]:+.2%}',
      '' if v['within'] else f'beyond {TOLERANCE:.0%}',
    )
    for v in rows
  ]
  return [
    *table([header, *rest]),
    f'{sum(v["within"] for v in rows)} of {len(rows)} within {TOLERANCE:.0%} of {words}',
  ]
