"""The map between our parameters and another format's tensors: one set of rules, both directions.

A rule names our parameters *unstacked*: `stack.{layer}.branches.0.layer.q.kernel` is that of one
block, counted through all groups and repeats of the stack. This module stacks and unstacks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxformer.config import InputError
from jaxformer.interop.tensors import DTYPES, Shape, Tensors, cast, shortened
from jaxformer.models.params import ParamInfo

Arrays = list[np.ndarray]


# ---- steps: from our arrays to theirs, and back ------------------------------------------------


class Step:
  """One transformation from our arrays to theirs. `load` inverts `save`; `shapes` maps shapes as
  `save` maps arrays. A family may define further subclasses in its own file."""

  def shapes(self, ours: list[Shape]) -> list[Shape]:
    raise NotImplementedError

  def save(self, ours: Arrays) -> Arrays:
    raise NotImplementedError

  def load(self, theirs: Arrays, ours: list[Shape]) -> Arrays:
    """`ours` are the shapes of the result."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Permute(Step):
  """Dimension i of theirs is dimension `axes[i]` of ours, as in `numpy.transpose`."""

  axes: tuple[int, ...]

  def shapes(self, ours):
    return [tuple(s[a] for a in self.axes) for s in ours]

  def save(self, ours):
    return [a.transpose(self.axes) for a in ours]

  def load(self, theirs, ours):
    back = tuple(self.axes.index(i) for i in range(len(self.axes)))
    return [a.transpose(back) for a in theirs]


@dataclasses.dataclass(frozen=True)
class Concat(Step):
  """Theirs is the concatenation of ours along `axis` (fused projections)."""

  axis: int

  def shapes(self, ours):
    total = sum(s[self.axis] for s in ours)
    return [(*ours[0][: self.axis], total, *ours[0][self.axis + 1 :])]

  def save(self, ours):
    return [np.concatenate(ours, axis=self.axis)]

  def load(self, theirs, ours):
    ends = np.cumsum([s[self.axis] for s in ours])[:-1]
    return np.split(theirs[0], ends, axis=self.axis)


@dataclasses.dataclass(frozen=True)
class Unstack(Step):
  """Theirs is one tensor per entry of our first axis (experts)."""

  def shapes(self, ours):
    return [ours[0][1:]] * ours[0][0]

  def save(self, ours):
    return list(ours[0])

  def load(self, theirs, ours):
    return [np.stack(theirs)]


@dataclasses.dataclass(frozen=True)
class NewAxis(Step):
  """Theirs has an additional axis of size 1 at `axis` (depthwise convolutions, biases stored as
  rows)."""

  axis: int

  def shapes(self, ours):
    return [(*s[: self.axis], 1, *s[self.axis :]) for s in ours]

  def save(self, ours):
    return [np.expand_dims(a, self.axis) for a in ours]

  def load(self, theirs, ours):
    return [np.squeeze(a, self.axis) for a in theirs]


TRANSPOSE = Permute((1, 0))  # torch.nn.Linear stores [out, in], we store [in, out]


@dataclasses.dataclass(frozen=True)
class Rule:
  """Some of our parameters <-> some of their tensors.

  `{layer}` in the names stands for every block that has all of our parameters; a rule whose
  parameters do not exist (biases of a model without biases) does not apply. `{item}` in their name
  stands for 0, 1, ... along our first axis; the first step is then `Unstack`."""

  ours: tuple[str, ...]
  theirs: str
  steps: tuple[Step, ...] = ()


def same(ours: str, theirs: str) -> Rule:
  """The same array under another name."""
  return Rule((ours,), theirs)


def linear(ours: str, theirs: str) -> Rule:
  """A torch Linear's weight."""
  return Rule((ours,), theirs, (TRANSPOSE,))


def dense(ours: str, theirs: str) -> list[Rule]:
  """A torch Linear with its bias, if there is one."""
  return [linear(f'{ours}.kernel', f'{theirs}.weight'), same(f'{ours}.bias', f'{theirs}.bias')]


def norm(ours: str, theirs: str) -> list[Rule]:
  """A torch LayerNorm."""
  return [same(f'{ours}.scale', f'{theirs}.weight'), same(f'{ours}.bias', f'{theirs}.bias')]


# ---- the rules applied to one model ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Location:
  """The location of an unstacked parameter: the name of the stored array, the row in it (None for
  the entire array), and the shape."""

  stored: str
  row: int | None
  shape: Shape


_IN_GROUP = re.compile(r'(?P<stack>(?:.+\.)?)groups\.(?P<group>\d+)\.(?P<place>\d+)\.(?P<rest>.+)')


def locations(info: Mapping[str, ParamInfo]) -> dict[str, Location]:
  """Unstacked name -> location, for every parameter of a model; blocks are counted through all
  groups of a stack."""
  found = {name: _IN_GROUP.fullmatch(name) for name in info}
  patterns: dict[tuple[str, int], int] = {}  # (stack, group) -> blocks in a period
  repeats: dict[tuple[str, int], int] = {}
  for name, m in found.items():
    if m is not None:
      key = m['stack'], int(m['group'])
      patterns[key] = max(patterns.get(key, 0), int(m['place']) + 1)
      repeats[key] = info[name].shape[0] if _stacked(info[name]) else 1
  result = {}
  for name, m in found.items():
    if m is None:
      result[name] = Location(name, None, info[name].shape)
      continue
    stack, group = m['stack'], int(m['group'])
    first = sum(patterns[k] * repeats[k] for k in patterns if k[0] == stack and k[1] < group)
    for row in range(repeats[stack, group]):
      layer = first + row * patterns[stack, group] + int(m['place'])
      stacked = _stacked(info[name])
      shape = info[name].shape[1:] if stacked else info[name].shape
      result[f'{stack}{layer}.{m["rest"]}'] = Location(name, row if stacked else None, shape)
  return result


def _stacked(info: ParamInfo) -> bool:
  return bool(info.axes) and info.axes[0] == 'layers'


@dataclasses.dataclass(frozen=True)
class Link:
  """A rule for one block: our locations, their names and shapes."""

  ours: tuple[Location, ...]
  theirs: dict[str, Shape]
  steps: tuple[Step, ...]

  def save(self, ours: Arrays) -> dict[str, np.ndarray]:
    for step in self.steps:
      ours = step.save(ours)
    return dict(zip(self.theirs, ours, strict=True))

  def load(self, theirs: Arrays) -> Arrays:
    shapes = [[p.shape for p in self.ours]]
    for step in self.steps:
      shapes.append(step.shapes(shapes[-1]))
    for step, before in zip(reversed(self.steps), reversed(shapes[:-1]), strict=True):
      theirs = step.load(theirs, before)
    return theirs


def connect(info: Mapping[str, ParamInfo], rules: Iterable[Rule], family: str) -> list[Link]:
  """The links of a model, which cover each of its parameters once. Raises `InputError` with the
  parameters that no rule covers."""
  where = locations(info)
  layers = sorted(
    {int(n) for name in where for n in re.findall(r'(?:^|\.)(\d+)\.branches\.', name)}
  )
  links = []
  for rule in rules:
    per_layer = any('{layer}' in o for o in rule.ours)
    for layer in layers if per_layer else [None]:
      names = [o.replace('{layer}', str(layer)) for o in rule.ours]
      if all(n in where for n in names):
        links.append(
          _link(
            tuple(where[n] for n in names), rule.theirs.replace('{layer}', str(layer)), rule.steps
          )
        )
  covered = [p for link in links for p in link.ours]
  if missing := [name for name, p in where.items() if p not in set(covered)]:
    raise InputError(f'the {family} format has no tensors for {shortened(missing)}')
  if len(set(covered)) != len(covered):
    raise ValueError(f'the rules of {family} cover a parameter twice')
  return links


def _link(ours: tuple[Location, ...], theirs: str, steps: tuple[Step, ...]) -> Link:
  shapes = [p.shape for p in ours]
  names = (
    [theirs.replace('{item}', str(i)) for i in range(shapes[0][0])]
    if '{item}' in theirs
    else [theirs]
  )
  for step in steps:
    shapes = step.shapes(shapes)
  return Link(ours, dict(zip(names, shapes, strict=True)), steps)


# ---- load --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Names:
  """How the names in a file may differ from those of the rules.

  Attributes:
    prefix: missing from every name in a file of the model without its head.
    ignored: patterns (full match) of tensors without information: buffers of masks and frequencies.
    copies: tensor -> the tensor that it may duplicate exactly (tied heads).
  """

  prefix: str = ''
  ignored: tuple[str, ...] = ()
  copies: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def resolve(self, reader: Tensors, wanted: Container[str]) -> dict[str, str]:
    """Full name -> name in the file, without ignored tensors."""
    bare = not any(n.startswith(self.prefix) for n in reader.info)
    full = {
      self.prefix + n if bare and n not in wanted and n not in self.copies else n: n
      for n in reader.info
    }
    return {
      n: stored for n, stored in full.items() if not any(re.fullmatch(p, n) for p in self.ignored)
    }


def check(links: Sequence[Link], reader: Tensors, names: Names) -> dict[str, str]:
  """Compare the headers of a file with the links before any value is read; return full name -> name
  in the file. Raises one `InputError` with all missing and unexpected tensors, wrong shapes and
  unsupported types."""
  wanted = {name: shape for link in links for name, shape in link.theirs.items()}
  found = names.resolve(reader, wanted)
  problems = []
  if missing := [f'{n} {list(shape)}' for n, shape in wanted.items() if n not in found]:
    problems.append(f'missing: {shortened(missing)}')
  if unexpected := [n for n in found if n not in wanted and n not in names.copies]:
    problems.append(f'unexpected: {shortened(unexpected)}')
  both = [(n, reader.info[found[n]]) for n in wanted if n in found]
  if shapes := [
    f'{n} is {list(i.shape)}, the config needs {list(wanted[n])}'
    for n, i in both
    if i.shape != wanted[n]
  ]:
    problems.append(f'wrong shape: {shortened(shapes)}')
  if types := [f'{n} ({i.dtype})' for n, i in both if i.dtype not in DTYPES]:
    problems.append(f'unsupported type (must be one of {", ".join(DTYPES)}): {shortened(types)}')
  if problems:
    raise InputError(f'{reader.source} does not hold this model: ' + '; '.join(problems))
  for copy, original in names.copies.items():
    if copy in found and not np.array_equal(reader.read(found[copy]), reader.read(found[original])):
      raise InputError(
        f'{reader.source}: {copy} differs from {original}, but the config ties them; '
        'if they are meant to differ, set tie_word_embeddings to false in config.json'
      )
  return found


def load(
  links: Sequence[Link],
  info: Mapping[str, ParamInfo],
  reader: Tensors,
  names: Names,
  dtype: np.dtype,
  put: Callable[[str, np.ndarray], Any],
) -> dict[str, Any]:
  """Load our parameters, stacked. Each is passed to `put` (to a device) as soon as it is complete,
  so that host memory holds only incomplete ones. Parameters marked `full_precision` are fp32."""
  found = check(links, reader, names)
  rest = {name: info[name].shape[0] if _stacked(info[name]) else 1 for name in info}
  partial: dict[str, np.ndarray] = {}
  done: dict[str, Any] = {}
  for link in links:
    arrays = link.load([reader.read(found[n]) for n in link.theirs])
    for location, array in zip(link.ours, arrays, strict=True):
      name = location.stored
      if name not in partial:
        partial[name] = np.empty(
          info[name].shape, np.float32 if info[name].full_precision else dtype
        )
      partial[name][... if location.row is None else location.row] = cast(
        name, array, partial[name].dtype
      )
      rest[name] -= 1
      if not rest[name]:
        done[name] = put(name, partial.pop(name))
  return {name: done[name] for name in info}


# ---- save --------------------------------------------------------------------------------------


def check_params(info: Mapping[str, ParamInfo], params: Mapping[str, Any]) -> None:
  """Raise one `InputError` with all differences between the parameters and those of the config."""
  problems = []
  if missing := [n for n in info if n not in params]:
    problems.append(f'missing: {shortened(missing)}')
  if unexpected := [n for n in params if n not in info]:
    problems.append(f'unexpected: {shortened(unexpected)}')
  if shapes := [
    f'{n} is {list(params[n].shape)}, the config needs {list(i.shape)}'
    for n, i in info.items()
    if n in params and tuple(params[n].shape) != i.shape
  ]:
    problems.append(f'wrong shape: {shortened(shapes)}')
  if problems:
    raise InputError('the parameters are not those of the config: ' + '; '.join(problems))


class Export:
  """Their tensors, computed from our parameters one link at a time, in the order of `shapes`."""

  def __init__(self, links: Sequence[Link], params: Mapping[str, Any]):
    self.shapes = {name: shape for link in links for name, shape in link.theirs.items()}
    self._links = {name: link for link in links for name in link.theirs}
    self._params = params
    self._made: tuple[Link, dict[str, np.ndarray]] | None = None

  def __call__(self, name: str) -> np.ndarray:
    link = self._links[name]
    if self._made is None or self._made[0] is not link:
      self._made = link, link.save([self._value(p) for p in link.ours])
    return self._made[1][name]

  def _value(self, location: Location) -> np.ndarray:
    value = self._params[location.stored]
    return np.asarray(value if location.row is None else value[location.row])
