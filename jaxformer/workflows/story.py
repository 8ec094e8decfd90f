"""The story of the field: the page with one line per family, and the table of the README."""

import itertools

from jaxformer.models.zoo.story import told

HEAD = """# The story, one line per step

From an encoder and a decoder of 2014 to the hybrids of today: what each family computes, and
what it changed. Every line is a family of jaxformer: `jaxformer describe FAMILY-tiny` reads its
layers with all formulas, `jaxformer train FAMILY-tiny` trains it on a CPU in a minute,
`jaxformer plan FAMILY --params 125M` builds it to a size, and `jaxformer compare quickstart
--add FAMILY` puts it beside the others. `jaxformer list` has the published models, by the same
chapters.

The page is made from the entries of the families in `jaxformer/models/zoo`, and a test holds it
to them. Notation: x input, y output, h or S state, q, k, v queries, keys and values (row
vectors), \' a transpose, * an elementwise product; subscripts are positions in time.
"""


def contents() -> str:
  """Return the table of the README: the families of each chapter."""
  lines = ['| chapter | families |', '|---|---|']
  for heading, steps in itertools.groupby(told(), lambda s: s.heading):
    lines.append(f'| {heading} | {", ".join(s.family for s in steps)} |')
  return '\n'.join(lines) + '\n'


def page() -> str:
  """Return the text of `docs/story.md`."""
  lines = [HEAD]
  for heading, steps in itertools.groupby(told(), lambda s: s.heading):
    steps = list(steps)
    lines += [f'## {heading}', '', steps[0].chapter.about, '']
    lines += ['| family | computes | changed | source |', '|---|---|---|---|']
    for s in steps:
      formula = s.formula.replace('|', '\\|')
      lines.append(f'| {s.family} ({s.year}) | `{formula}` | {s.change} | {s.source} |')
    lines.append('')
  return '\n'.join(lines)
