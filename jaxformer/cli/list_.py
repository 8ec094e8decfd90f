"""Names, families and exact sizes of all presets."""

from __future__ import annotations

import argparse

from jaxformer.cli.common import Overrides, answer, table

OVERRIDES = False


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--json', action='store_true', help='an array of {name, family, params, active_params}'
  )


def run(args: argparse.Namespace, overrides: Overrides) -> None:
  from jaxformer.models.params import define
  from jaxformer.models.zoo import PRESETS

  rows = []
  for name in PRESETS:
    definition = define(PRESETS[name].model)
    rows.append(
      {
        'name': name,
        'family': PRESETS[name].family,
        'params': definition.size,
        'active_params': definition.active_size,
      }
    )

  def lines() -> list[str]:
    return table(
      [
        ('name', 'family', 'params', 'active'),
        *((r['name'], r['family'], f'{r["params"]:,}', f'{r["active_params"]:,}') for r in rows),
      ],
      left=2,
    )

  answer(rows, args.json, lines)
