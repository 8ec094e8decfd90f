"""Names, families and sizes of all presets, without importing them."""

import importlib.resources
import json

from jaxformer.workflows.tables import Answer, table


def presets() -> Answer:
  """Return all presets with their families and exact sizes, as recorded in the package: rows of
  name, family, params and active_params."""
  file = importlib.resources.files('jaxformer').joinpath('models/zoo/counts.json')
  rows = [{'name': name, **facts} for name, facts in json.loads(file.read_text()).items()]
  cells = [(r['name'], r['family'], f'{r["params"]:,}', f'{r["active_params"]:,}') for r in rows]
  return Answer(rows, table([('name', 'family', 'params', 'active'), *cells], left=2))
