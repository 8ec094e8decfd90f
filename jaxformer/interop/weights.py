"""The map between our parameters and another format's tensors: one set of rules, both directions.

A rule names our parameters *unstacked*: `stack.{layer}.branches.0.layer.q.kernel` is that of one
block, counted through all groups and repeats of the stack. This module stacks and unstacks."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.config import InputError
from jaxformer.interop.tensors import DTYPES, Shape, Tensors, cast, shortened
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import ParamInfo, Params, define
from jaxformer.sharding import Parallel

# ---- rules -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rule:
  """Some of our parameters <-> one of their tensors, or one per entry of our first axis (experts).

  Theirs is the concatenation of ours along the last axis (fused projections), with the last two
  axes swapped if `transposed`, in another shape if `reshape` is given.

  `{layer}` in the names stands for every block that has all of our parameters; a rule whose
  parameters do not exist (biases of a model without biases) does not apply. `{item}` in their name
  stands for 0, 1, ... along our first axis.

  Attributes:
    reshape: the shape of the array -> the shape that theirs has.
    groups: the last axis of each of ours has so many equal parts, and theirs has the first part of
      each, then the second of each, ... (projections that are fused per head).
  """

  ours: tuple[str, ...]
  theirs: str
  transposed: bool = False
  reshape: Callable[[Shape], Shape] | None = None
  groups: int = 1


MIXER, FEED_FORWARD = 'stack.{layer}.branches.0', 'stack.{layer}.branches.1'


def as_row(shape: Shape) -> Shape:
  """[D] -> [1, 1, D]: vectors over the channels as RWKV stores them."""
  return (1, 1, *shape)


def depthwise(shape: Shape) -> Shape:
  """[D, d_conv] -> [D, 1, d_conv]: kernels of convolutions of single channels."""
  channels, d_conv = shape
  return channels, 1, d_conv


def arrays(
  names: Mapping[str, str],
  ours: str = '',
  theirs: str = '',
  reshape: Callable[[Shape], Shape] | None = None,
) -> list[Rule]:
  """Rules for the same arrays under other names, our name -> theirs; `ours` and `theirs` are put
  before the names."""
  return [Rule((ours + o,), theirs + t, reshape=reshape) for o, t in names.items()]


def fused(
  ours: Sequence[str],
  theirs: str,
  transposed: bool = True,
  reshape: Callable[[Shape], Shape] | None = None,
) -> list[Rule]:
  """Rules for several of our linear layers that are one of theirs: its weight, which torch stores
  as [out, in], and its bias if there is one."""
  return [
    Rule(tuple(f'{o}.kernel' for o in ours), f'{theirs}.weight', transposed, reshape),
    Rule(tuple(f'{o}.bias' for o in ours), f'{theirs}.bias'),
  ]


def modules(names: Mapping[str, str], ours: str = '', theirs: str = '') -> list[Rule]:
  """Rules for linear layers, norms and embeddings, our name -> theirs; `ours` and `theirs` are put
  before the names."""
  return [
    rule
    for o, t in names.items()
    for rule in (
      *fused([ours + o], theirs + t),
      *arrays({f'{o}.scale': f'{t}.weight', f'{o}.table': f'{t}.weight'}, ours, theirs),
    )
  ]


def in_block(rule: Rule, index: int) -> Rule:
  """The rule for one block alone."""
  ours = tuple(name.replace('{layer}', str(index)) for name in rule.ours)
  return dataclasses.replace(rule, ours=ours, theirs=rule.theirs.replace('{layer}', str(index)))


@dataclasses.dataclass(frozen=True)
class CheckpointFormat:
  """The checkpoint format of one architecture.

  Attributes:
    name: `model_type` in `config.json`, or the published name.
    read: the header of a checkpoint (`Settings` of a `config.json`, `Sizes` of a file without one)
      -> our config. Raises `InputError` for features that our layers lack.
    write: our config -> the header. It reads only the fields that it needs: `family.match` compares
      the config with what `read` makes of the result.
    rules: our config -> the map of weights.
    prefix: missing from every name in a file of the model without its head.
    ignored: patterns (full match) of tensors that the model does not have and does not need:
      buffers of masks and frequencies, layers of another training objective.
    copies: tensor -> the tensor that it may duplicate exactly where it is not one of the rules'
      (tied heads).
    renamed: pattern -> its replacement in names that no rule has, of files with other names.
    model: the type of config that it represents.
    token_ids: ids of special tokens that transformers assumes where `config.json` has none.
    aliases: another name of a field that transformers accepts -> the field.
  """

  name: str
  read: Callable[[Any], ModelConfig]
  write: Callable[[Any], Mapping[str, Any]]
  rules: Callable[[Any], Sequence[Rule]]
  prefix: str = ''
  ignored: tuple[str, ...] = ()
  copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
  renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
  model: type[ModelConfig] = LanguageModel.Config
  token_ids: Mapping[str, int] = dataclasses.field(default_factory=dict)
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)


# ---- the rules applied to one model ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Location:
  """The location of an unstacked parameter: the name of the stored array, the index in it (empty
  for the entire array), and the shape."""

  stored: str
  index: tuple[int, ...]
  shape: Shape


_IN_GROUP = re.compile(r'(?P<stack>(?:.+\.)?)groups\.(?P<group>\d+)\.(?P<place>\d+)\.(?P<rest>.+)')


def locations(info: Mapping[str, ParamInfo]) -> dict[str, Location]:
  """Unstacked name -> location, for every parameter of a model; blocks are counted through all
  groups of a stack."""
  found = {name: _IN_GROUP.fullmatch(name) for name in info}
  sizes: dict[tuple[str, int], tuple[int, int]] = {}  # (stack, group) -> (blocks, periods)
  for name, m in found.items():
    if m is not None:
      key, place = (m['stack'], int(m['group'])), int(m['place'])
      sizes[key] = max(sizes.get(key, (0, 0)), (place + 1, _rows(info[name])))
  result = {}
  for name, m in found.items():
    if m is None:
      result[name] = Location(name, (), info[name].shape)
      continue
    stack, group = m['stack'], int(m['group'])
    first = sum(math.prod(sizes[k]) for k in sizes if k[0] == stack and k[1] < group)
    blocks, periods = sizes[stack, group]
    for row in range(periods):
      index = (row,) if _stacked(info[name]) else ()
      unstacked = f'{stack}{first + row * blocks + int(m["place"])}.{m["rest"]}'
      result[unstacked] = Location(name, index, info[name].shape[len(index) :])
  return result


def _stacked(info: ParamInfo) -> bool:
  return info.axes[:1] == ('layers',)


def _rows(info: ParamInfo) -> int:
  """The number of unstacked parameters in a stored one."""
  return info.shape[0] if _stacked(info) else 1


@dataclasses.dataclass(frozen=True)
class Link:
  """A rule for one block: our locations, their names, and the shape of each of theirs."""

  ours: tuple[Location, ...]
  theirs: tuple[str, ...]
  shape: Shape
  transposed: bool
  groups: int = 1

  def save(self, ours: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    rows = ours[0].shape[:-1]
    parts = [p.reshape(*rows, self.groups, -1) for p in ours]
    value = np.concatenate(parts, axis=-1).reshape(*rows, -1)
    value = value.swapaxes(-1, -2) if self.transposed else value
    return dict(zip(self.theirs, value.reshape(len(self.theirs), *self.shape), strict=True))

  def load(self, theirs: Sequence[np.ndarray]) -> list[np.ndarray]:
    value = np.stack(theirs).reshape(_joined(self.ours, self.transposed))
    value = value.swapaxes(-1, -2) if self.transposed else value
    value = value.reshape(*value.shape[:-1], self.groups, -1)
    ends = np.cumsum([p.shape[-1] // self.groups for p in self.ours])
    parts = np.split(value, ends[:-1], axis=-1)
    return [p.reshape(o.shape) for p, o in zip(parts, self.ours, strict=True)]


def _joined(ours: Sequence[Location], transposed: bool) -> Shape:
  """The shape of our arrays side by side."""
  shape = (*ours[0].shape[:-1], sum(p.shape[-1] for p in ours))
  return (*shape[:-2], shape[-1], shape[-2]) if transposed else shape


def link(rule: Rule, ours: tuple[Location, ...], theirs: str) -> Link:
  """A rule for parameters at these locations."""
  shape, names = _joined(ours, rule.transposed), (theirs,)
  if '{item}' in theirs:
    names, shape = tuple(theirs.replace('{item}', str(i)) for i in range(shape[0])), shape[1:]
  return Link(
    ours, names, rule.reshape(shape) if rule.reshape else shape, rule.transposed, rule.groups
  )


def connect(kind: CheckpointFormat, config: ModelConfig) -> list[Link]:
  """The links of a model, which cover each of its parameters once. Raises `InputError` with the
  parameters that no rule covers."""
  where = locations(define(config).info)
  layers = sorted({int(n) for name in where for n in re.findall(r'\b(\d+)\.branches\.', name)})
  links = []
  for rule in kind.rules(config):
    for layer in layers if '{layer}' in rule.ours[0] else [0]:
      names = [o.replace('{layer}', str(layer)) for o in rule.ours]
      if all(n in where for n in names):
        ours = tuple(where[n] for n in names)
        links.append(link(rule, ours, rule.theirs.replace('{layer}', str(layer))))
  covered = [p for link in links for p in link.ours]
  if missing := [name for name, p in where.items() if p not in set(covered)]:
    raise InputError(f'the {kind.name} format has no tensors for {shortened(missing)}')
  if len(set(covered)) != len(covered):
    raise ValueError(f'the rules of {kind.name} cover a parameter twice')
  return links


def shapes(links: Iterable[Link]) -> dict[str, Shape]:
  """Their tensors in order, with shapes."""
  return {name: link.shape for link in links for name in link.theirs}


def _differences(wanted: Mapping[str, Shape], found: Mapping[str, Shape]) -> dict[str, list[str]]:
  """Kind of difference -> the names with that difference."""
  return {
    'missing': [f'{n} {list(s)}' for n, s in wanted.items() if n not in found],
    'unexpected': [n for n in found if n not in wanted],
    'wrong shape': [
      f'{n} is {list(found[n])}, the config needs {list(s)}'
      for n, s in wanted.items()
      if found.get(n, s) != s
    ],
  }


def _refuse(field: str, problem: str, differences: Mapping[str, list[str]]) -> None:
  """Raise one `InputError` with all differences, if there are any."""
  if any(differences.values()):
    listed = [f'{kind}: {shortened(names)}' for kind, names in differences.items() if names]
    raise InputError(field, problem=f'{problem}: {"; ".join(listed)}')


# ---- load --------------------------------------------------------------------------------------


def check(kind: CheckpointFormat, links: Sequence[Link], file: Tensors) -> dict[str, str]:
  """Compare the headers of a file with the links before any value is read; return full name -> name
  in the file. Raises one `InputError` with all missing and unexpected tensors, wrong shapes and
  unsupported types."""
  wanted = shapes(links)
  full = _full_names(kind, wanted, file.info)
  ignored = {n for n in full if any(re.fullmatch(p, n) for p in kind.ignored)} - wanted.keys()
  found = {n: s for n, s in full.items() if n not in ignored}
  infos = {n: file.info[s] for n, s in found.items() if n in wanted or n not in kind.copies}
  _refuse(
    str(file.source),
    'does not hold this model',
    {
      **_differences(wanted, {n: i.shape for n, i in infos.items()}),
      f'unsupported type (must be one of {", ".join(DTYPES)})': [
        f'{n} ({i.dtype})' for n, i in infos.items() if n in wanted and i.dtype not in DTYPES
      ],
    },
  )
  for copy in (c for c in kind.copies if c in found and c not in wanted):
    original = kind.copies[copy]
    if not np.array_equal(file.read(found[copy]), file.read(found[original])):
      raise InputError(
        str(file.source),
        problem=f'{copy} differs from {original}, but the config ties them; if they are meant to '
        'differ, set tie_word_embeddings to false in config.json',
      )
  return found


def _full_names(
  kind: CheckpointFormat, wanted: Mapping[str, Shape], names: Iterable[str]
) -> dict[str, str]:
  """Name in the rules -> name in the file."""
  names = list(names)
  bare, full = not any(n.startswith(kind.prefix) for n in names), {}
  for name in names:
    whole = name
    for pattern, replacement in kind.renamed.items() if name not in wanted else ():
      whole = re.sub(pattern, replacement, whole)
    known = whole in wanted or whole in kind.copies
    full[kind.prefix + whole if bare and not known else whole] = name
  return full


def load(
  kind: CheckpointFormat, config: ModelConfig, file: Tensors, dtype: Any, parallel: Parallel | None
) -> Params:
  """Load our parameters, stacked. Each is put on its devices as soon as it is complete, so that
  host memory holds only incomplete ones."""
  definition, links = define(config), connect(kind, config)
  arrays = definition.abstract(parallel, dtype_of(dtype))
  found = check(kind, links, file)
  rest = {name: _rows(info) for name, info in definition.info.items()}
  partial: dict[str, np.ndarray] = {}
  done: Params = {}
  for link in links:
    ours = link.load([file.read(found[n]) for n in link.theirs])
    for location, value in zip(link.ours, ours, strict=True):
      name = location.stored
      array = arrays[name]
      if name not in partial:
        partial[name] = np.empty(array.shape, array.dtype)
      partial[name][location.index] = cast(name, value, array.dtype)
      rest[name] -= 1
      if not rest[name]:
        done[name] = jax.device_put(partial.pop(name), array.sharding)
  return {name: done[name] for name in definition.info}


# ---- save --------------------------------------------------------------------------------------


def export(
  kind: CheckpointFormat, config: ModelConfig, params: Params, dtype: Any
) -> tuple[dict[str, Shape], Iterator[tuple[str, np.ndarray]]]:
  """Their tensors: the shapes, and the values in the same order, computed one link at a time.
  Raises one `InputError` with all differences between the parameters and those of the config."""
  dtype = dtype_of(dtype)
  wanted = {n: i.shape for n, i in define(config).info.items()}
  given = {n: tuple(p.shape) for n, p in params.items()}
  _refuse('params', 'not those of the config', _differences(wanted, given))
  links = connect(kind, config)

  def value(location: Location) -> np.ndarray:
    stored = params[location.stored]
    return np.asarray(stored[location.index] if location.index else stored)

  tensors = (pair for link in links for pair in link.save([*map(value, link.ours)]).items())
  return shapes(links), ((name, cast(name, array, dtype)) for name, array in tensors)


def dtype_of(dtype: Any) -> np.dtype:
  """The type of parameters in files and in memory. Raises `InputError` for an unsupported one."""
  try:
    found = np.dtype(jnp.dtype(dtype))
  except TypeError:
    found = None
  if found is None or found not in set(DTYPES.values()) - {np.dtype(np.float64)}:
    raise InputError('dtype', dtype, 'float32, bfloat16 or float16')
  return found
