"""Configs: JSON and back, overrides by path, types checked, names near a typo."""

from typing import Literal

import pytest

from jaxformer import config
from jaxformer.code_record import code_of
from jaxformer.config import Config, InputError, Registry
from jaxformer.overrides import override

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
  assert data['walls'][0]['trim'] == {
    'type': 'Striped',
    'code': code_of(Striped),
    'width': 1,
    'gap': 2.0,
  }
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
    # types first, in whatever order they are given
    (
      [('walls.0.paint.width', '5'), ('walls.0.paint', 'Striped')],
      House(walls=(Wall(paint=Striped(width=5)), House().walls[1])),
    ),
    # an exact path before a general one
    (
      [('walls.0.height', '3'), ('height', '4')],
      House(walls=(Wall(height=3.0), House().walls[1].replace(height=4.0))),
    ),
    (
      [('walls.0.paint', 'striped'), ('walls.0.paint.width', '5')],
      House(walls=(Wall(paint=Striped(width=5)), House().walls[1])),
    ),
    (
      [('walls.0.trim', '{"type": "Striped", "width": 2}')],
      House(walls=(Wall(trim=Striped(width=2)), House().walls[1])),
    ),
    # JSON and a field of it, also one that it needs
    (
      [('walls.0.paint', '{"type": "striped", "gap": 2}'), ('walls.0.paint.width', '5')],
      House(walls=(Wall(paint=Striped(width=5, gap=2)), House().walls[1])),
    ),
    ([('walls', '[{"type": "Wall"}]'), ('walls.0.height', '4')], House(walls=(Wall(height=4.0),))),
    ([('walls', 'wall'), ('walls.0.height', '4')], House(walls=(Wall(height=4.0),))),
    # a config that was searched for, inside of another one
    ([('trim', 'painted'), ('walls', '[{"type": "Wall"}]')], House(walls=(Wall(trim=Painted()),))),
    # a general path gives way to what JSON or a type says exactly
    (
      [('walls.0', '{"type": "Wall", "height": 3}'), ('height', '4')],
      House(walls=(Wall(height=3.0), House().walls[1].replace(height=4.0))),
    ),
    (
      [('walls.1.trim', 'painted'), ('trim', 'none')],
      House(walls=(Wall(), House().walls[1].replace(trim=Painted()))),
    ),
    (
      [('walls.1.paint', 'painted'), ('paint', '{"type": "Striped", "width": 2}')],
      House(walls=(Wall(paint=Striped(width=2)), Wall())),
    ),
    ([('size', '3,4')], House(size=(3, 4))),
    ([('size', '[3, 4]')], House(size=(3, 4))),
    ([('size', 'none')], House()),
  ],
)
def test_overrides(assignments, expected):
  assert override(House(), assignments) == expected
  assert override(House(), assignments[::-1]) == expected


@pytest.mark.parametrize(
  'assignments',
  [
    [('size', '3,4'), ('size', 'none')],
    [('walls.0.paint', 'striped'), ('walls.0.paint.width', '5'), ('walls.0.paint', 'painted')],
    [('lived-in', 'true'), ('lived_in', 'false')],
    [('walls.0.paint', '{"type": "Striped", "width": 2}'), ('walls.0.paint.width', '5')],
    [('walls.0', '{"type": "Wall", "paint": {"type": "Painted"}}'), ('walls.0.paint', 'painted')],
    # searched for
    [('height', '3'), ('height', '4')],
    [('paint.width', '3'), ('walls.paint.width', '4'), ('paint.width', '5')],
  ],
)
def test_an_override_that_would_be_lost_is_an_error(assignments):
  for given in assignments, assignments[::-1]:
    with pytest.raises(InputError, match='give it once'):
      override(House(), given)


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    ('Stripped', r"^walls\.0\.paint = 'Stripped': no such type; did you mean Striped\?"),
    ('{"type": "Stripped"}', r"^walls\.0\.paint = 'Stripped': no such type"),
    ('{"type": {}}', r'^walls\.0\.paint: expected an object with a "type"'),
    ('{"type": "Striped", "gap": {"type": 1}}', r"^walls\.0\.paint\.gap = \{'type': 1\}: must be"),
    ('{"type": "Striped", "gape": 2}', "Striped has no field 'gape'; did you mean gap"),
    ('{broken', 'not valid JSON'),
  ],
)
def test_a_wrong_config_is_named_before_the_fields_in_it(value, message):
  with pytest.raises(InputError, match=message):
    override(House(), [('walls.0.paint.width', '5'), ('walls.0.paint', value)])


@pytest.mark.parametrize(
  ('path', 'value', 'message'),
  [
    ('hight', '3', 'hight: no such field; did you mean height?'),
    ('walls.0.paint.colr', 'red', 'did you mean colour?'),
    ('walls.7.height', '3', 'no such field'),
    ('walls.0.height', 'tall', "walls.0.height = 'tall': must be a number"),
    ('walls.1.paint.width', '1.5', 'walls.1.paint.width = 1.5: must be a whole number'),
    ('walls.0.paint', 'Dotted', "walls.0.paint = 'Dotted': no such type"),
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


def test_two_types_of_one_base_cannot_share_a_tag():
  with pytest.raises(TypeError, match='share the tag'):
    type('Striped', (Paint,), {'__module__': 'tests.other', '__qualname__': 'Striped'})


def test_a_type_of_another_package_may_have_the_same_name():
  other = type('Striped', (Paint,), {'__module__': 'elsewhere', '__qualname__': 'Striped'})
  try:
    assert {c.__module__ for c in config.types_of(Paint) if c.tag == 'Striped'} == {
      __name__,
      'elsewhere',
    }
    assert type(config.from_json({'type': 'Striped', 'code': {'module': 'elsewhere'}})) is other
    with pytest.raises(InputError, match=r'defined in module nowhere.*--code'):
      config.from_json({'type': 'Striped', 'code': {'module': 'nowhere'}})
  finally:
    config.forget(other)


def test_errors_are_data():
  error = InputError('steps', 0, 'positive').under('training')
  assert (error.field, error.value, error.accepted) == ('training.steps', 0, 'positive')
  assert str(error) == 'training.steps = 0: must be positive'
  assert (
    str(InputError('data.path', 'x', problem='no such file')) == "data.path = 'x': no such file"
  )


def test_registry_names_the_nearest():
  things = Registry('thing')
  things.add('first', 1)
  with pytest.raises(InputError, match="no thing named 'frist'; did you mean first"):
    things['frist']
  with pytest.raises(ValueError, match='already'):
    things.add('first', 2)
