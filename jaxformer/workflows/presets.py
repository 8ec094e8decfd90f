"""Names, families and sizes of all presets, without importing them."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
from typing import Any

from jaxformer.workflows.tables import table


@dataclasses.dataclass(frozen=True)
class PresetList:
  """Rows of name, family, params and active_params."""

  rows: list[dict[str, Any]]

  def json(self) -> list[dict[str, Any]]:
    return self.rows

  def lines(self) -> list[str]:
    cells = [
      (r['name'], r['family'], f'{r["params"]:,}', f'{r["active_params"]:,}') for r in self.rows
    ]
    return table([('name', 'family', 'params', 'active'), *cells], left=2)


def presets() -> PresetList:
  """Return all presets with their families and exact sizes, as recorded in the package."""
  file = importlib.resources.files('jaxformer').joinpath('models/zoo/counts.json')
  counts = json.loads(file.read_text())
  return PresetList([{'name': name, **facts} for name, facts in counts.items()])
