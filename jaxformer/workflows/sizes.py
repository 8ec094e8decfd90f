"""Models built to a size: of a family, or around a layer of the user's, by the solver of
`study.sizing`."""

import math
from typing import Any, TypedDict, Unpack

from jaxformer.config import InputError
from jaxformer.layers.layer import LayerConfig
from jaxformer.models.model import ModelConfig
from jaxformer.models.zoo import FAMILIES, PRESETS, Family
from jaxformer.models.zoo.around import around
from jaxformer.planning.cost import cost
from jaxformer.planning.estimate import parse_amount
from jaxformer.study.sizing import MATCHED, Match, Sized, measure, solve
from jaxformer.user_code import is_a, object_in_file
from jaxformer.workflows.overrides import Overrides, Pairs, pairs_of
from jaxformer.workflows.progress import Log, log_progress
from jaxformer.workflows.tables import Answer, amount, table

Amount = float | str
"""A number, or text such as '125M'."""

# what is matched -> the end of the name of a model of that size
ENDINGS: dict[Match, str] = {
  'params': '',
  'active_params': '-active',
  'train_flops_per_token': '-flops',
  'state_bytes': '-state',
}
OPTIONS: dict[str, Match] = {match.removeprefix('train_'): match for match in ENDINGS}
DEFAULT_SIZE: tuple[Match, float] = ('params', 1e6)
# of a model built to a size, unless overridden: those of the tiny presets
BYTES = {'vocab_size': 264, 'context_length': 256}
ALL = 'families'
TOLERANCE = 0.02


class Size(TypedDict, total=False):
  """What a model is built to; one field at most is given, as a number or as text such as '125M'.

  Attributes:
    params: parameters.
    active_params: parameters that one token uses.
    flops_per_token: training FLOPs per token at the context length, attention counted causally.
    state_bytes: bytes of decoding state at the context length, as in `Cost.decode_state_bytes`.
  """

  params: Amount | None
  active_params: Amount | None
  flops_per_token: Amount | None
  state_bytes: Amount | None


def sizes_of(size: Size) -> list[tuple[Match, float]]:
  """Return every (quantity, value) given; text may list several values: '1M,10M'. Raises
  `TypeError` for an option that is none."""
  given: dict[str, Any] = {**size}
  if unknown := given.keys() - OPTIONS.keys():
    raise TypeError(f'unexpected keyword argument {min(unknown)!r}')
  return [
    (OPTIONS[name], parse_amount(part, name))
    for name, value in given.items()
    if value is not None
    for part in (value.split(',') if isinstance(value, str) else [value])
  ]


def size_of(size: Size) -> tuple[Match, float] | None:
  """Return the only (quantity, value) given, or None. Raises `InputError` for several."""
  sizes = sizes_of(size)
  if len(sizes) > 1:
    raise InputError(f'one model has one size; {len(sizes)} were given')
  return sizes[0] if sizes else None


def is_layer(target: str) -> bool:
  """Return whether a target is FILE.py:NAME."""
  return '.py:' in target


def layer_in_file(target: str) -> LayerConfig:
  """Return the layer config that FILE.py:NAME names."""
  layer = object_in_file(target)
  if not is_a(layer, LayerConfig):
    raise InputError(f'{target}: not a layer config (a subclass of LayerConfig)')
  return layer


def family_of(target: str) -> Family:
  """Return the family of a name, or the one around the layer that FILE.py:NAME names."""
  if is_layer(target):
    return around(layer_in_file(target))
  if target not in FAMILIES and target in PRESETS:
    fixed = f'a preset, whose size is fixed; families: {", ".join(FAMILIES)}'
    raise InputError('family', target, problem=fixed)
  return FAMILIES[target]


def sized_model(
  target: str, size: tuple[Match, float] | None, overrides: Pairs, tolerance: float = TOLERANCE
) -> tuple[Sized, Pairs]:
  """Build a model of a family, or around the layer FILE.py:NAME, to a size (default: a million
  parameters). Return it with the overrides left to apply: vocabulary and context length are
  needed here."""
  family = family_of(target)
  frame = BYTES | ({'source_vocab_size': BYTES['vocab_size']} if family.of_pairs else {})
  left = []
  for path, value in overrides:
    section, _, field = path.replace('-', '_').partition('.')
    if section == 'model' and field in frame:
      frame[field] = round(parse_amount(str(value), path))
    else:
      left.append((path, value))
  match, amount_wanted = size or DEFAULT_SIZE
  return solve(family, match, amount_wanted, **frame, tolerance=tolerance), left


def name_of(sized: Sized) -> str:
  """Return the name of a model built to a size: mamba-125M."""
  return f'{sized.family}-{amount(sized.target)}{ENDINGS[sized.match]}'


def shape(sized: Sized, model: ModelConfig) -> dict[str, Any]:
  """Return the shape of a model built to a size, and the size of `model`, its possibly changed
  version, as JSON data."""
  value = measure(model, sized.match)
  error = value / sized.target - 1
  fields = ('family', 'match', 'target', 'width', 'layers', 'hidden')
  return {name: getattr(sized, name) for name in fields} | {
    'value': value,
    'error': error,
    'within': abs(error) <= TOLERANCE,
  }


def shape_row(v: dict[str, Any]) -> tuple[str, str, str]:
  """Format `shape` as a row of a plan."""
  hidden = '' if v['hidden'] is None else f', {v["hidden"]:,} hidden units'
  error = f'{v["error"]:+.2%} of {amount(v["target"])} {MATCHED[v["match"]]}'
  return 'shape', f'width {v["width"]:,}, {v["layers"]} layers{hidden}', error


def shapes(
  family: str = ALL, *, overrides: Overrides = (), log: Log = log_progress, **size: Unpack[Size]
) -> Answer:
  """Return the shapes of a family, or of all families, at one or several sizes (`params='1M,10M'`);
  the vocabulary and context length may be overridden."""
  found, pairs = [], pairs_of(overrides)
  for name in FAMILIES if family == ALL else [family]:
    log(f'sizing {name}')
    for wanted in sizes_of(size) or [DEFAULT_SIZE]:
      sized, left = sized_model(name, wanted, pairs, tolerance=math.inf)
      if left:
        raise InputError(
          f'--{left[0][0]}: a table of sizes accepts model.vocab_size and model.context_length only'
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
  return Answer(found, _table(found))


def _table(found: list[dict[str, Any]]) -> list[str]:
  words = MATCHED[found[0]['match']]
  rows = [('family', words, 'width', 'layers', 'hidden', 'actual', 'error', '')]
  rows += [
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
    for v in found
  ]
  within = sum(v['within'] for v in found)
  return [*table(rows), f'{within} of {len(found)} within {TOLERANCE:.0%} of {words}']
