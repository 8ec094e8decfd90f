"""Predicted speed of training steps of about 1.3 billion active parameters on TPUs, by family.

Question: which share of the peak does the training step of each family reach on sixteen cores or
chips of a TPU, by the clock of `planning.step_clock`, and what bounds it?

    pip install -e '.[tpu]'
    python experiments/tpu_mfu.py              # the missing rows
    python experiments/tpu_mfu.py mamba v6e    # rows with one of these words in them again

Needs no TPU. Published shapes where there is one of about this size, else one of the family's own
solver. 2,048 tokens per sequence, documents without borders, AdamW, fp32 parameters, bf16 products,
FSDP over all chips, each block computed again in the backward pass. Rows are recorded in
`tpu_mfu.json`, from which `tpu_mfu.md` is written.

Cost: one to ten minutes of two CPU cores per row.
Result: `tpu_mfu.md`. No figure was measured on a TPU."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jaxformer
from jaxformer.config import InputError
from jaxformer.hardware import GIB
from jaxformer.models.zoo import PRESETS
from jaxformer.planning.prediction import PUBLISHED_TO_PREDICTED
from jaxformer.planning.target import parse_target

FOLDER = pathlib.Path(__file__).parent
LENGTH = 2048
ROWS = {'v5e-16': 8, 'v5p-16': 16, 'v6e-16': 16}  # sequences per chip


@dataclasses.dataclass(frozen=True)
class Model:
  """A row of the table.

  Attributes:
    title: of the row.
    name: of a preset, or of a family that is built to 1.3 billion active parameters.
    more: settings of the model.
  """

  title: str
  name: str
  more: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def options(self) -> dict[str, Any]:
    if self.name in PRESETS:
      return {'overrides': self.more}
    vocabulary = {'model.vocab_size': 32000, 'model.context_length': LENGTH}
    return {'active_params': 1.3e9, 'overrides': vocabulary | self.more}


MODELS = (
  Model('Llama 3.2 1B', 'llama3.2-1b'),
  Model('mixture of experts (as Mixtral)', 'mixtral'),
  Model('RWKV-4 1.5B', 'rwkv4-1b5'),
  Model('RWKV-6 1.6B', 'rwkv6-1.6b'),
  Model('RWKV-7 1.5B', 'rwkv7-1.5b'),
  Model('Mamba 1.4B', 'mamba-1.4b'),
  Model('Mamba-2 1.3B', 'mamba2-1.3b'),
  Model('S4D', 's4d', {'model.width': 2304}),  # a multiple of the chips
  Model('H3 1.3B', 'h3-1.3b'),
  Model('Jamba', 'jamba'),
)


def planned(model: Model, target: str) -> dict[str, Any]:
  """The plan of a row, as JSON data, without the lines of its profile beyond the first fifteen."""
  options = model.options
  overrides = options.pop('overrides') | {
    'data.sequence_length': LENGTH,
    'data.packing': 'stream',
    'training.batch_size': ROWS[target] * parse_target(target).total_chips,
    'training.accumulate': 1,
    'training.remat': 'full',
    'mesh.data': 1,
    'mesh.fsdp': -1,
  }
  found = jaxformer.plan(
    model.name, target=target, compile=True, profile=True, overrides=overrides, **options
  ).json()
  del found['profile']['sources'][15:]
  return found


def cells(title: str, target: str, row: dict[str, Any]) -> list[str]:
  if 'error' in row:
    return [title, target, row['error'], *[''] * 6]
  p, c = row['predicted'], row['compiled']
  most, least = (100 * p['mfu'] / ratio for ratio in PUBLISHED_TO_PREDICTED)
  first = row['profile']['by_layer']
  longest = max(first, key=lambda name: sum(first[name].values()))
  return [
    title,
    target,
    f'{row["params"] / 1e9:.2f}'
    + ('' if row['active_params'] == row['params'] else f' ({row["active_params"] / 1e9:.2f})'),
    f'{p["tokens_per_second_per_chip"]:,.0f}',
    f'{100 * p["mfu"]:.1f} ({least:.0f} to {most:.0f})',
    f'{100 * p["hfu"]:.1f}',
    ', '.join(f'{kind} {100 * share:.0f}' for kind, share in p['shares'].items()),
    f'{longest} {100 * sum(first[longest].values()) / p["seconds"]:.0f}',
    f'{c["total"] / GIB:.1f}',
  ]


def save(rows: dict[str, dict[str, Any]]) -> None:
  (FOLDER / 'tpu_mfu.json').write_text(json.dumps(rows, indent=1) + '\n')
  head = (
    'model',
    'slice',
    'parameters in billions (active)',
    'tokens per second per chip',
    'MFU, % (interval)',
    'HFU, %',
    'where the time goes, %',
    'most in, %',
    'GiB per chip',
  )
  lines = ['# Predicted speed at about 1.3 billion active parameters', '']
  lines += [
    'Made by `python experiments/tpu_mfu.py`; see there. Nothing was measured on a TPU.',
    '',
  ]
  lines += [f'| {" | ".join(head)} |', '|' + ' --- |' * len(head)]
  for model in MODELS:
    for target in ROWS:
      if (row := rows.get(f'{model.name} {target}')) is not None:
        lines.append(f'| {" | ".join(cells(model.title, target, row))} |')
  versions = {
    (r['compiled']['jax'], r['compiled']['libtpu']) for r in rows.values() if 'compiled' in r
  }
  lines += ['', *(f'jax {jax}, libtpu {libtpu}.' for jax, libtpu in sorted(versions))]
  (FOLDER / 'tpu_mfu.md').write_text('\n'.join(lines) + '\n')


def main(words: list[str]) -> None:
  path = FOLDER / 'tpu_mfu.json'
  rows = json.loads(path.read_text()) if path.exists() else {}
  for target in ROWS:
    for model in MODELS:
      key = f'{model.name} {target}'
      if any(word in key for word in words) if words else key not in rows:
        try:
          rows[key] = planned(model, target)
        except InputError as e:
          rows[key] = {'error': str(e)}
        save(rows)
        print(' | '.join(cells(model.title, target, rows[key])), flush=True)


if __name__ == '__main__':
  main(sys.argv[1:])
