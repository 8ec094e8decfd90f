"""Names, families and sizes of all presets by chapter of the story, without importing them."""

import importlib.resources
import itertools
import json

from jaxformer.workflows.tables import Answer, table


def presets() -> Answer:
  """Return all presets with their families and exact sizes, as recorded in the package: rows of
  name, family, params and active_params, by chapter of the story."""
  file = importlib.resources.files('jaxformer').joinpath('models/zoo/counts.json')
  rows = [{'name': name, **facts} for name, facts in json.loads(file.read_text()).items()]
  rows.sort(key=lambda r: int(r['chapter'].partition('.')[0]))
  cells = [('name', 'family', 'params', 'active')]
  for chapter, members in itertools.groupby(rows, lambda r: r['chapter']):
    cells.append((chapter, '', '', ''))
    cells += [
      (f'  {r["name"]}', r['family'], f'{r["params"]:,}', f'{r["active_params"]:,}')
      for r in members
    ]
  fields = 'name', 'family', 'params', 'active_params'
  return Answer([{f: r[f] for f in fields} for r in rows], table(cells, left=2))
