"""Writes YAML, as much of it as job files need."""

from __future__ import annotations

import json
import re
from typing import Any

_PLAIN = re.compile(r'[A-Za-z_][\w./-]*')
_OTHER = {'true', 'false', 'yes', 'no', 'on', 'off', 'null', 'y', 'n'}


def to_yaml(value: dict[str, Any]) -> str:
  """Mappings, lists, numbers, truth values and text; text of several lines as a block."""
  return '\n'.join(_lines(value)) + '\n'


def _lines(mapping: dict[str, Any], indent: str = '') -> list[str]:
  lines = []
  for key, value in mapping.items():
    start = f'{indent}{_scalar(key)}:'
    if isinstance(value, dict):
      lines += [start, *_lines(value, f'{indent}  ')]
    elif isinstance(value, str) and '\n' in value:
      # The indentation is said, because the first line may begin with spaces of its own.
      body = value.rstrip('\n').split('\n')
      lines += [
        f'{start} |2' if body[0].startswith(' ') else f'{start} |',
        *(f'{indent}  {line}' if line else '' for line in body),
      ]
    elif isinstance(value, list):
      lines.append(f'{start} [{", ".join(map(_scalar, value))}]')
    else:
      lines.append(f'{start} {_scalar(value)}')
  return lines


def _scalar(value: Any) -> str:
  """Plain where no reader could take it for something else, otherwise as in JSON, which YAML
  includes."""
  if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _OTHER:
    return value
  return json.dumps(value)
