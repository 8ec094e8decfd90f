"""Configs: JSON and back, overrides by path, types checked, names near a typo."""

from typing import Literal

import pytest

from jaxformer import config
from jaxformer.config import Config, InputError, Registry, override

pytestmark = pytest.mark.quick


class Paint(Config, abstract=True):
  pass


class Painted(Paint):
  colour: Literal['red', 'green'] = 'red'


class Striped(Paint):
  width: int
  gap: float = 1.0


class Wall(Config):
  height: float = 2.5
  paint: Paint = Painted()
  trim: Paint | None = None


class House(Config):
  walls: tuple[Wall, ...] = (Wall(), Wall(paint=Striped(width=3)))
  name: str = 'mine'
  lived_in: bool = False
  size: tuple[int, int] | None = None

  def validate(self):
    self.require(len(self.walls) > 0, 'walls', 'at least one')


def test_json_and_back():
  house = House(size=(3, 4), walls=(Wall(trim=Striped(width=1, gap=2)),))
  data = config.to_json(house)
  assert data['walls'][0]['trim'] == {'type': 'Striped', 'width': 1, 'gap': 2.0}
  assert config.from_json(data) == house
  assert config.from_json({'type': 'House'}) == House()
  assert config.digest(house) == config.digest(config.from_json(data)) != config.digest(House())
  assert hash(house) == hash(config.from_json(data))


@pytest.mark.parametrize(
  ('assignments', 'expected'),
  [
    ([('name', 'yours'), ('lived-in', 'true')], House(name='yours', lived_in=True)),
    ([('walls.0.height', '3')], House(walls=(Wall(height=3.0), House().walls[1]))),
    (
      [('height', '1e1')],
      House(walls=(Wall(height=10.0), Wall(height=10.0, paint=Striped(width=3)))),
    ),
    ([('walls.1.paint.width', '1_000')], House(walls=(Wall(), Wall(paint=Striped(width=1000))))),
    # width does not exist before
    ([('walls.0.paint.width', '5'), ('walls.0.paint', 'Striped')], None),
    (
      [('walls.0.paint', 'striped'), ('walls.0.paint.width', '5')],
      House(walls=(Wall(paint=Striped(width=5)), House().walls[1])),
    ),
    (
      [('walls.0.trim', '{"type": "Striped", "width": 2}')],
      House(walls=(Wall(trim=Striped(width=2)), House().walls[1])),
    ),
    ([('size', '3,4')], House(size=(3, 4))),
    ([('size', '[3, 4]'), ('size', 'none')], House()),
  ],
)
def test_overrides(assignments, expected):
  if expected is None:
    with pytest.raises(InputError):
      override(House(), assignments)
  else:
    assert override(House(), assignments) == expected


@pytest.mark.parametrize(
  ('path', 'value', 'message'),
  [
    ('hight', '3', 'hight: no such field; did you mean height?'),
    ('walls.0.paint.colr', 'red', 'did you mean colour?'),
    ('walls.7.height', '3', 'no such field'),
    ('walls.0.height', 'tall', "walls.0.height = 'tall': must be a number"),
    ('walls.1.paint.width', '1.5', 'walls.1.paint.width = 1.5: must be a whole number'),
    ('walls.0.paint', 'Dotted', "walls.0.paint = 'Dotted'|no config type 'Dotted'"),
    ('walls.0.paint.colour', 'blue', "must be 'red' or 'green'"),
    ('lived_in', 'perhaps', "lived_in = 'perhaps': must be true or false"),
    ('walls', '[]', 'House.walls = .*: must be at least one'),
    ('walls.0.paint', 'striped', 'needs width'),
    ('size', '3', 'must be'),
    ('walls.0.trim', '{broken', 'not valid JSON'),
  ],
)
def test_bad_overrides_name_the_field_and_what_is_accepted(path, value, message):
  with pytest.raises(InputError, match=message):
    override(House(), [(path, value)])


@pytest.mark.parametrize(
  'build',
  [
    lambda: Wall(height='high'),
    lambda: Wall(height=True),
    lambda: House(name=3),
    lambda: Wall(paint=Wall()),
    lambda: House(size=(1, 2, 3)),
    lambda: config.from_json({'type': 'Wall', 'hieght': 2}),
    lambda: config.from_json({'type': 'Wal'}),
    lambda: config.from_json([]),
  ],
)
def test_wrong_values_are_refused_on_construction(build):
  with pytest.raises(InputError):
    build()


def test_differences_name_paths():
  old, new = House(), override(House(), [('walls.0.height', '3'), ('name', 'yours')])
  assert config.differences(config.to_json(old), config.to_json(new)) == [
    'walls.0.height: 2.5 -> 3.0',
    'name: "mine" -> "yours"',
  ]


def test_two_configs_cannot_share_a_tag():
  with pytest.raises(TypeError, match='share the tag'):
    type('Wall', (Config,), {'__module__': 'elsewhere', '__qualname__': 'Wall'})


def test_registry_names_the_nearest():
  things = Registry('thing')
  things.add('first', 1)
  with pytest.raises(InputError, match="no thing named 'frist'; did you mean first"):
    things['frist']
  with pytest.raises(ValueError, match='already'):
    things.add('first', 2)
