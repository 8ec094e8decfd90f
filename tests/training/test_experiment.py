import pytest

from jaxformer import config
from jaxformer.config import InputError
from jaxformer.models.zoo import PRESETS
from jaxformer.overrides import override
from jaxformer.sharding import MeshConfig
from jaxformer.training import Experiment, default_experiment
from jaxformer.training.recipes import preset_experiment
from jaxformer.training.setup import Setup

pytestmark = pytest.mark.quick


@pytest.fixture
def tiny() -> Experiment:
  return default_experiment(PRESETS['gpt2-tiny'].model, 'gpt2-tiny')


def test_every_preset_has_an_experiment_that_survives_json():
  for name in PRESETS:
    e = preset_experiment(name)
    assert config.from_json(config.to_json(e)) == e
    assert not name.endswith('-tiny') or e.data.positions <= 256


@pytest.mark.parametrize(
  ('path', 'value', 'message'),
  [
    ('training.remat', 'atention', 'did you mean attention'),
    ('schedule.warmup', '500', 'at most training.steps = 400'),
    ('data.sequence-length', '512', 'at most 256, where the learned positions'),
    ('training.accumulate', '3', 'a multiple of accumulate = 3'),
    ('training.batch-size', '0', 'must be positive'),
    ('training.profile', '5,3', 'a first step and a later one'),
    ('training.profile', '400,500', 'below steps = 400'),
    ('training.keep-every', '250', 'a multiple of checkpoint_every = 100'),
    ('training.keep-every', '500', 'at most steps = 400'),
    ('training.eval-every', '130', 'keep_best = 1: has no effect: .* or one interval a multiple'),
    ('run.name', '../up', 'letters, digits'),
    ('optimizer.beta2', '1.0', 'below 1'),
    ('optimizer.scale', 'adam', 'no such field'),
    ('training.stpes', '3', 'did you mean steps'),
  ],
)
def test_bad_settings_are_named(tiny, path, value, message):
  with pytest.raises(InputError, match=message):
    override(tiny, [(path, value)])


def test_parts_are_replaced_by_name(tiny):
  trackers = ('training.trackers', 'TensorBoard,Wandb')
  e = override(
    tiny, [('optimizer', 'Muon'), ('schedule', 'WSD'), ('schedule.decay', '0.5'), trackers]
  )
  assert (e.optimizer.tag, e.schedule.decay, [t.tag for t in e.training.trackers]) == (
    'Muon',
    0.5,
    ['TensorBoard', 'Wandb'],
  )


def test_batch_must_divide_over_the_mesh(tiny, dataset):
  for overrides, message in (
    ([('training.batch_size', '12')], 'multiple of the 8 parts'),
    ([('training.accumulate', '4')], '2: must be a multiple of the 8 parts'),
    ([('mesh', 'MeshConfig'), ('mesh.data', '3')], 'needs 3 devices'),
  ):
    with pytest.raises(InputError, match=message):
      Setup.of(override(tiny, overrides), dataset)


def test_a_mesh_that_does_not_divide_a_parameter_is_refused(tiny, dataset):
  with pytest.raises(InputError, match='must divide'):
    Setup.of(
      tiny.replace(model=tiny.model.replace(vocab_size=265), mesh=MeshConfig(tensor=8, data=1)),
      dataset,
    )


def test_a_vocabulary_that_is_too_large_is_refused(tiny, dataset):
  small = tiny.replace(model=tiny.model.replace(vocab_size=200))
  with pytest.raises(InputError, match=r'model.vocab_size = 200: must be at least 25\d'):
    Setup.of(small, dataset)
