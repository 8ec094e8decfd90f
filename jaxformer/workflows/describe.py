"""A model read from top to bottom: its layers with formulas and papers, shapes, parameters, FLOPs
and state, and the implementations that its operations run."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.config import Config
from jaxformer.layers.layer import Context, LayerConfig, layer_summary
from jaxformer.models.block import widths
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import ParamInfo, Params, define
from jaxformer.models.stack import Group, blocks_with_widths
from jaxformer.models.zoo import PRESETS
from jaxformer.models.zoo.story import STORY
from jaxformer.ops.implementation import record_choices
from jaxformer.planning.cost import cost, matrix_flops
from jaxformer.planning.memory import abstract_batch
from jaxformer.planning.target import parse_target
from jaxformer.sharding import assume_platform, platform
from jaxformer.task_type import LANGUAGE_MODELING
from jaxformer.workflows.recipes import recipe_json, recipe_lines
from jaxformer.workflows.tables import amount, parameters, table

LONGEST = 8192  # tokens of the sequence that is traced to see which implementations run


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelPart:
  """A layer, all its occurrences in equal blocks together, or what stands outside the blocks.

  Attributes:
    name: of the layer's type, or of the parameters outside the blocks.
    block: the block that the layer is in; None outside the blocks.
    count: how many times it occurs.
    formula, source: of a layer, from its documentation; '' if it states none.
    settings: of a layer, the fields that differ from the defaults, 'heads: 4 -> 8'.
    shapes: of the parameters of one occurrence.
    params, active_params: in all occurrences.
    flops: forward FLOPs per token in all occurrences, averaged over a causal sequence.
    state_bytes: decoding state of one sequence in all occurrences, computing in bfloat16.
  """

  name: str
  block: str | None = None
  count: int = 1
  formula: str = ''
  source: str = ''
  settings: tuple[str, ...] = ()
  shapes: dict[str, tuple[int, ...]]
  params: int
  active_params: int
  flops: float
  state_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Description:
  """A model read from top to bottom. The sums over `parts` are the totals of `jaxformer plan`.

  Attributes:
    task: what the model reads and predicts.
    length: the sequence length that FLOPs are averaged over.
    context_length: that state is sized for.
    implementations: platform or target -> phase -> operation -> the implementations that run.
    story: chapter, year, formula, change and source of the step that the family took; None for what
      is in no family.
    recipe: how a published model was trained (see `recipes.recipe_json`); None for others.
  """

  name: str
  type: str
  task: str
  length: int
  context_length: int
  params: int
  active_params: int
  flops: float
  state_bytes: int | None
  parts: tuple[ModelPart, ...]
  implementations: dict[str, dict[str, dict[str, list[str]]]]
  story: dict[str, Any] | None = None
  recipe: dict[str, Any] | None = None

  def json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @property
  def title(self) -> str:
    return f'{self.name}: {self.type}, {parameters(self.params, self.active_params)}'

  def table(self) -> list[str]:
    """Return the table of parts alone."""
    rows = [('', 'times', 'parameters', 'share', 'FLOPs/token', 'share', 'state bytes')]
    block = None
    for p in self.parts:
      if p.block is not None and p.block != block:
        rows.append((p.block, '', '', '', '', '', ''))
      block = p.block
      rows.append(
        (
          p.name if p.block is None else f'  {p.name}',
          str(p.count),
          f'{p.params:,}',
          f'{p.params / max(1, self.params):.1%}',
          amount(p.flops),
          f'{p.flops / max(1.0, self.flops):.1%}',
          f'{p.state_bytes:,}',
        )
      )
    state = '' if self.state_bytes is None else f'{self.state_bytes:,}'
    rows.append(('total', '', f'{self.params:,}', '', amount(self.flops), '', state))
    return table(rows)

  def lines(self) -> list[str]:
    head = [
      self.title,
      f'{self.task}; FLOPs (forward, causal) at {self.length:,} tokens, state at '
      f'{self.context_length:,}',
      *([] if self.story is None else [_step_line(self.story)]),
      '',
    ]
    recipe = [] if self.recipe is None else ['', 'training recipe', *recipe_lines(self.recipe)]
    return [*head, *self.table(), *self._layers(), *self._implementations(), *recipe]

  def _layers(self) -> Iterator[str]:
    seen = set()
    for p in self.parts:
      key = p.name, p.settings, tuple(p.shapes.items())
      if p.block is None or key in seen:
        continue
      seen.add(key)
      yield ''
      yield p.name + (f'  ({p.source})' if p.source else '')
      if p.formula:
        yield f'  {p.formula}'
      if p.settings:
        yield f'  settings: {", ".join(p.settings)}'
      if p.shapes:
        shapes = (f'{n} {"x".join(map(str, s)) or "scalar"}' for n, s in p.shapes.items())
        yield f'  shapes: {", ".join(shapes)}'

  def _implementations(self) -> Iterator[str]:
    yield from ('', 'implementations')
    for where, phases in self.implementations.items():
      for phase, ran in phases.items():
        words = ', '.join(f'{operation}: {" and ".join(names)}' for operation, names in ran.items())
        yield f'  {where}, {phase}: {words or "no operation with alternatives"}'


def describe_model(
  name: str, model: ModelConfig, target: str | None = None, length: int | None = None
) -> Description:
  """Describe a model, with FLOPs at a sequence length (by default its context length); with a
  target, such as 'v5e-64', also the implementations that run there."""
  c = cost(model, length)
  places = {f'this machine ({platform()})': platform()}
  if target is not None:
    found = parse_target(target)
    places[found.name] = found.platform
  return Description(
    name=name,
    type=model.tag,
    task=str(model.task),
    length=c.length,
    context_length=c.context_length,
    params=c.params,
    active_params=c.active_params,
    flops=c.forward_flops_per_token,
    state_bytes=c.decode_state_bytes,
    parts=tuple(parts_of(model, c.length)),
    implementations={where: implementations(model, on) for where, on in places.items()},
    story=_story(name),
    recipe=recipe_json(name),
  )


def _story(name: str) -> dict[str, Any] | None:
  """Return the step of the story that a preset or a family takes."""
  family = PRESETS[name].family if name in set(PRESETS) else name
  if family not in set(STORY):
    return None
  s = STORY[family]
  return {
    'chapter': s.heading,
    'year': s.year,
    'formula': s.formula,
    'change': s.change,
    'source': s.source,
  }


def _step_line(story: dict[str, Any]) -> str:
  return f'chapter {story["chapter"]} ({story["year"]}): {story["change"]}'


# ---- parts -------------------------------------------------------------------------------------


def parts_of(model: ModelConfig, length: int) -> list[ModelPart]:
  """Return the parts of a model: what comes before the blocks, each distinct block's layers, and
  what comes after."""
  info = define(model).info
  prefixes = sorted({n.partition('.groups.')[0] for n in info if '.groups.' in n}, reverse=True)
  before, blocks, after = [], [], []
  for prefix, groups in zip(prefixes, model.stacks, strict=True):  # the encoder comes first
    blocks += _blocks(prefix, groups, model, length, info)
  outside = {n: i for n, i in info.items() if '.groups.' not in n}
  # the modules that layers have in common are parts of their own
  names = (re.match(r'([^.]+\.common\.)?[^.]+', n) for n in outside)
  for name in dict.fromkeys(found[0] for found in names if found):
    part = _part(outside, [f'{name}.'], name=name.replace('stack.common.', 'shared: '))
    (after if name.startswith(('final', 'head')) else before).append(part)
  return [*before, *blocks, *after]


def _part(
  info: dict[str, ParamInfo], prefixes: list[str], mixing_flops: float = 0, **known: Any
) -> ModelPart:
  """Return the part whose occurrences have parameters with these prefixes."""
  mine = {n: i for n, i in info.items() if n.startswith(tuple(prefixes))}
  shapes = {}
  for name, i in mine.items():
    if name.startswith(prefixes[0]):
      inside = name.removeprefix(prefixes[0]).removeprefix('layer.')
      shapes[inside] = i.shape[1:] if 'layers' in i.axes else i.shape
  return ModelPart(
    shapes=shapes,
    params=sum(i.size for i in mine.values()),
    active_params=sum(round(i.size * i.active) for i in mine.values()),
    flops=matrix_flops(mine.values()) + mixing_flops,
    **known,
  )


def _blocks(
  prefix: str,
  groups: tuple[Group, ...],
  model: ModelConfig,
  length: int,
  info: dict[str, ParamInfo],
) -> Iterator[ModelPart]:
  """Yield the layers of the distinct blocks of a stack."""
  distinct: dict[Any, list[tuple[str, int]]] = {}  # block and width -> (prefix, occurrences)
  for name, block, before, repeats in blocks_with_widths(groups, model.width):
    distinct.setdefault((block, before), []).append((f'{prefix}.{name}', repeats))
  decodes = groups is model.stacks[-1] and model.state_size(1) is not None
  where = '' if len(model.stacks) == 1 else f'{prefix} '
  for number, ((block, before), places) in enumerate(distinct.items(), 1):
    count = sum(n for _, n in places)
    for b, (branch, w) in enumerate(
      zip(block.branches, widths(block.branches, before), strict=False)
    ):
      layer = branch.layer
      formula, source = layer_summary(layer)
      yield _part(
        info,
        [f'{place}.branches.{b}.' for place, _ in places],
        count * layer.mixing_flops_per_token(w, length, True),
        name=layer.tag,
        block=f'{where}block {number} (x {count})',
        count=count,
        formula=formula,
        source=source,
        settings=tuple(_settings(layer)),
        state_bytes=count * layer.state_bytes(w, model.context_length) if decodes else 0,
      )


def _settings(layer: LayerConfig) -> Iterator[str]:
  """Return the numbers among the fields of a layer, and what differs from the defaults."""
  for f in dataclasses.fields(layer):
    value = getattr(layer, f.name)
    if type(value) in (int, float) or value != f.default:
      yield f'{f.name} {value.tag if isinstance(value, Config) else value}'


# ---- implementations ---------------------------------------------------------------------------


def implementations(model: ModelConfig, on: str) -> dict[str, dict[str, list[str]]]:
  """Return phase -> operation -> implementations that run on a platform, unsharded, in its usual
  dtype. Found by tracing with shapes; nothing is computed."""
  definition = define(model)
  dtype = jnp.float32 if on == 'cpu' else jnp.bfloat16
  length = min(model.context_length, LONGEST)
  batch = abstract_batch(model, 1, length)
  params = definition.abstract(dtype=dtype)

  def training(params: Params, batch: Any) -> Any:
    return definition.merge(params).loss(batch)

  def decoding(params: Params, token_B: Any) -> Any:
    module = definition.merge(params)
    return module.step(token_B, Context(), module.init_state(1, length)).y

  found = {'training': _traced(on, training, params, batch)}
  if model.task == LANGUAGE_MODELING:
    token = jax.ShapeDtypeStruct((1,), jnp.int32)
    found['decoding'] = _traced(on, decoding, params, token)
  return found


def _traced(on: str, run: Any, *shapes: Any) -> dict[str, list[str]]:
  with assume_platform(on), record_choices() as choices:
    jax.eval_shape(run, *shapes)
  return {operation: list(ran) for operation, ran in sorted(choices.items())}
