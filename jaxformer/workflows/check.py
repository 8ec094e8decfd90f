"""Checks of a layer against the contract of layers, as one value."""

import dataclasses
from typing import Any

from jaxformer.config import differences, to_json
from jaxformer.layers.layer import LayerConfig
from jaxformer.testing import Verdict, check_layer, checked_examples
from jaxformer.workflows.progress import Log, log_progress
from jaxformer.workflows.sizes import layer_in_file


@dataclasses.dataclass(frozen=True)
class Verdicts:
  """Result of checking a layer against the contract of layers."""

  found: list[tuple[LayerConfig, Verdict]]

  @property
  def passed(self) -> bool:
    return all(v.passed for _, v in self.found)

  def json(self) -> list[dict[str, Any]]:
    return [{'layer': to_json(e)} | v.json() for e, v in self.found]

  def lines(self) -> list[str]:
    lines: list[str] = []
    for i, (layer, verdict) in enumerate(self.found):
      if i == 0 or layer != self.found[i - 1][0]:
        lines.append(_with_settings(layer))
      lines.append(f'  {verdict.line}')
    failed = sum(not v.passed for _, v in self.found)
    return [*lines, f'{failed} of {len(self.found)} checks fail' if failed else 'all checks pass']


def _with_settings(layer: LayerConfig) -> str:
  """Return the type of a layer with the fields that differ from the defaults."""
  changed = differences(to_json(type(layer)()), to_json(layer))
  return f'{layer.tag} with {", ".join(changed)}' if changed else layer.tag


def check(layer: LayerConfig | str, *, log: Log = log_progress) -> Verdicts:
  """Check a layer, or the layer that FILE.py:NAME names, and the examples of its class against the
  contract of layers."""
  found: list[tuple[LayerConfig, Verdict]] = []
  for example in checked_examples(layer_in_file(layer) if isinstance(layer, str) else layer):
    log(f'checking {_with_settings(example)}')
    found += [(example, verdict) for verdict in check_layer(example)]
  return Verdicts(found)
