"""The full config of every preset, as text: a change of any default shows up in review as a
readable difference.

After a change that is meant: `JAXFORMER_UPDATE_GOLDEN=1 pytest tests/golden`.
"""

import os
import pathlib

import pytest

from jaxformer import config
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS

FOLDER = pathlib.Path(__file__).parent
UPDATE = os.environ.get('JAXFORMER_UPDATE_GOLDEN') == '1'

pytestmark = pytest.mark.quick


def described(name: str) -> str:
  definition = define(PRESETS[name].model)
  sizes = f'params {definition.size:,}\nactive {definition.active_size:,}\n'
  return config.text(PRESETS[name].model) + sizes


@pytest.mark.parametrize('name', list(PRESETS))
def test_config_is_the_golden_one(name):
  path = FOLDER / f'{name}.txt'
  if UPDATE:
    path.write_text(described(name))
  assert path.exists(), (
    f'no golden file for {name}: run JAXFORMER_UPDATE_GOLDEN=1 pytest tests/golden'
  )
  assert path.read_text() == described(name)


@pytest.mark.parametrize('name', list(PRESETS))
def test_config_survives_json(name):
  model = PRESETS[name].model
  assert config.from_json(config.to_json(model)) == model


def test_every_golden_file_has_its_preset():
  assert {p.stem for p in FOLDER.glob('*.txt')} == set(PRESETS)
