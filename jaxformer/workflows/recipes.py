"""Recipes of published models in words: each value with its status and its source, and the page of
the documentation that has them all."""

import itertools
import re
from typing import Any

from jaxformer.config import to_json
from jaxformer.models.zoo import PRESETS
from jaxformer.training.recipes import FIELDS, RECIPES, Field, Origin, Recipe, Status
from jaxformer.workflows.tables import amount, table

HEADS: dict[Field, str] = {
  'peak': 'peak rate',
  'minimum': 'last rate',
  'warmup': 'warm-up',
  'decay': 'weight decay',
  'init': 'initialization',
}
MARKS: dict[Status, str] = {
  'published': '',
  'derived': ' [d]',
  'secondary': ' [s]',
  'memory': ' [m]',
  'ours': ' [o]',
}
MEANING: dict[Status, str] = {
  'published': 'stated by the source',
  'derived': 'computed from what is published',
  'secondary': "from a summary, a re-implementation or the authors' code for another run",
  'memory': 'believed to be published, and not confirmed in a source',
  'ours': 'not published or not expressible here, and chosen by us',
}


# ---- one recipe --------------------------------------------------------------------------------


def values(recipe: Recipe) -> dict[Field, str]:
  """Return the values of a recipe in words, as its experiment has them."""
  e = recipe.experiment
  t, steps = e.training, e.training.steps
  optimizer, schedule = to_json(e.optimizer), to_json(e.schedule)
  rates = [
    e.optimizer.learning_rate * float(e.schedule.factor(at, steps))
    for at in (max(0, e.schedule.warmup_steps(steps) - 1), steps - 1)
  ]
  length, warmup = e.data.positions, e.schedule.warmup_steps(steps)
  averages = [f'{optimizer[n]:g}' for n in ('beta1', 'beta2', 'rho') if n in optimizer]
  settings = [
    f'{name.replace("_", " ")} {_number(value)}'
    for name, value in schedule.items()
    if name not in ('type', 'warmup', 'final', 'width')
  ]
  batch = f'{t.batch_size:,} {recipe.unit}'
  if recipe.unit == 'tokens':
    batch = f'{t.batch_size:,} x {length:,} = {t.batch_size * length:,} tokens'
  return {
    'tokens': f'{amount(recipe.amount)} {recipe.unit}',
    'batch': batch,
    'length': f'{length:,}',
    'steps': f'{steps:,}',
    'optimizer': e.optimizer.tag,
    'betas': ', '.join(averages) or '-',
    'eps': _number(optimizer['eps']) if 'eps' in optimizer else '-',
    'peak': _number(float(f'{rates[0]:.3g}')),
    'minimum': _number(float(f'{rates[1]:.3g}')),
    'warmup': f'{warmup:,} steps' if warmup else 'none',
    'schedule': ', '.join([e.schedule.tag, *settings]),
    'decay': f'{e.optimizer.weight_decay:g}',
    'clip': 'none' if e.optimizer.clip is None else f'{e.optimizer.clip:.3g}',
    'dropout': f'{recipe.dropout:g}',
    'init': recipe.init,
    'precision': recipe.precision,
    'tokenizer': _tokenizers(to_json(e.data)),
  }


def _tokenizers(data: dict[str, Any]) -> str:
  """Return the tokenizers of data in words: of the sources first, where they have their own."""
  found = [data.get(name) for name in ('source_tokenizer', 'tokenizer')]
  words = [
    f'{t.get("name", t["type"])}, {t["vocab_size"]:,}' + (f', {t["hub"]}' if t.get('hub') else '')
    for t in found
    if t is not None
  ]
  return ' to '.join(dict.fromkeys(words)) or 'none'


def recipe_json(name: str) -> dict[str, Any] | None:
  """Return a recipe as JSON data: of each field value, status, source and note; None for a preset
  that has none."""
  if name not in RECIPES:
    return None
  recipe = RECIPES[name]
  fields = {
    field: {'value': value} | vars(recipe.origins[field]) for field, value in values(recipe).items()
  }
  return {'fields': fields, 'note': recipe.note}


def recipe_lines(recipe: dict[str, Any]) -> list[str]:
  """Return what `recipe_json` gives, for people."""
  rows = [
    (_head(field), f['value'], f['status'], '; '.join(filter(None, _said(f))))
    for field, f in recipe['fields'].items()
  ]
  return table(rows, left=4) + ([recipe['note']] if recipe['note'] else [])


def _said(origin: dict[str, str]) -> tuple[str, str]:
  return origin['source'], origin['note']


def recipe_notes(name: str) -> list[str]:
  """Return one line on how much of a recipe is published, and one on what has to be given; nothing
  for a preset without a recipe."""
  if name not in RECIPES:
    return []
  recipe = RECIPES[name]
  kinds = {
    status: [_head(f) for f in FIELDS if recipe.origins[f].status == status] for status in MARKS
  }
  parts = [f'{len(kinds["published"])} of {len(FIELDS)} values published']
  parts += [
    f'{status}: {", ".join(kinds[status])}'
    for status in MARKS
    if status != 'published' and kinds[status]
  ]
  lines = [f'recipe of {name}: {"; ".join(parts)} (`jaxformer describe {name}` has the sources)']
  missing = recipe.data.missing()
  if missing:
    what = ', '.join(f'data.{field} ({m.what})' for field, m in missing.items())
    lines.append(f'to be given for training: {what}')
  return lines


# ---- the page ----------------------------------------------------------------------------------

INTRODUCTION = """# Recipes of the published models

How each published model was trained, as `jaxformer train NAME --show`, `plan NAME` and
`launch ENGINE NAME` have it. The page is made from the data in `jaxformer/training/recipes`, and a
test holds it to them (`JAXFORMER_UPDATE_GOLDEN=1 pytest tests/docs/test_recipes.py` writes it).

A corpus and a tokenizer that are not part of jaxformer have to be given; `train` says with which
options. Any other setting is an option too:

```
jaxformer train llama2-7b --show
jaxformer describe mamba-2.8b
```

<!-- exit 2 -->
```
jaxformer train llama2-7b
```

Marks of a value: none, {published}; [d], {derived}; [s], {secondary}; [m], {memory}; [o], {ours}.
Names of repositories on Hugging Face are from memory, except EleutherAI/gpt-neox-20b. "Tokens" are
those of the whole run; steps x batch x length makes them up within rounding. Rates and clipping are
for a loss that is a mean over tokens."""


def page() -> str:
  """Return the page of the documentation, in Markdown."""
  parts = [INTRODUCTION.format(**MEANING)]
  families = itertools.groupby(sorted(RECIPES, key=_place), key=lambda n: PRESETS[n].family)
  parts += [_family(name, list(members)) for name, members in families]
  return '\n\n'.join(parts) + '\n'


def _place(name: str) -> int:
  return list(PRESETS).index(name)


def _family(family: str, names: list[str]) -> str:
  """Return the section of a family: what differs between its models, then each value with its
  source."""
  cells = {name: _cells(RECIPES[name]) for name in names}
  differing = [f for f in FIELDS if len({cells[n][f] for n in names}) > 1]
  parts = [f'## {family}']
  if differing:
    rows = [[n, *(cells[n][f] for f in differing)] for n in names]
    parts.append(_markdown([['', *map(_head, differing)], *rows]))
  rows = [
    [_head(f), 'above' if f in differing else cells[names[0]][f], _sources(f, names)]
    for f in FIELDS
  ]
  one = names[0] if len(names) == 1 else 'all'
  parts.append(_markdown([['', one, 'source'], *rows]))
  notes = dict.fromkeys(RECIPES[n].note for n in names)
  for note in filter(None, notes):
    of = [n for n in names if RECIPES[n].note == note]
    parts.append(note if len(of) == len(names) else f'{", ".join(of)}: {note}')
  return '\n\n'.join(parts)


def _head(field: Field) -> str:
  return HEADS.get(field, field)


def _cells(recipe: Recipe) -> dict[Field, str]:
  return {f: v + MARKS[recipe.origins[f].status] for f, v in values(recipe).items()}


def _markdown(rows: list[list[str]]) -> str:
  lines = [f'| {" | ".join(row)} |' for row in rows]
  return '\n'.join([lines[0], '|' + '---|' * len(rows[0]), *lines[1:]])


def _sources(field: Field, names: list[str]) -> str:
  """Return the distinct origins of a field, with the models that have them."""
  found: dict[Origin, list[str]] = {}
  for name in names:
    found.setdefault(RECIPES[name].origins[field], []).append(name)
  return '; '.join(
    _origin(origin) if len(found) == 1 else f'{", ".join(of)}: {_origin(origin)}'
    for origin, of in found.items()
  )


def _origin(origin: Origin) -> str:
  said = '; '.join(filter(None, (origin.source, origin.note)))
  if origin.status == 'published':
    return said
  return origin.status + (f', {said}' if said else '')


def _number(value: float) -> str:
  """Return a number with thousands, or four digits: 1,200,000; 1e-8."""
  if isinstance(value, int):
    return f'{value:,}'
  return re.sub(r'e([-+])0', r'e\1', f'{value:.4g}')
