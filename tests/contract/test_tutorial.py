"""The layer of CONTRIBUTING.md runs as printed and satisfies the contract; layers that violate it
are caught."""

import pathlib
import re

import jax.numpy as jnp
import pytest

from jaxformer.config import forget
from jaxformer.testing.contract import PREFILLS
from tests.contract import cases
from tests.contract import test_layers as contract

TEXT = (pathlib.Path(__file__).parents[2] / 'CONTRIBUTING.md').read_text()


def tutorial(tag: str, *changes: tuple[str, str]):
  """Return the layer of the tutorial under another tag, with changes to its text."""
  (code,) = re.findall(r'## Add a layer\n.*?```python\n(.*?)```', TEXT, re.S)
  for old, new in (
    ('class Leaky(', f'class {tag}('),
    ('return Leaky(', f'return {tag}('),
    *changes,
  ):
    assert code.count(old) == 1, old
    code = code.replace(old, new)
  space = {'__name__': __name__}
  exec(compile(code, 'CONTRIBUTING.md', 'exec', dont_inherit=True), space)
  return space[tag]


LAYERS = {
  'right': ('TutorialLeaky',),
  'looks ahead': (
    'TutorialAhead',
    ('jnp.swapaxes(x_BTD, 0, 1).astype', 'jnp.swapaxes(jnp.roll(x_BTD, -1, 1), 0, 1).astype'),
  ),
  'forgets documents': ('TutorialForgetful', ('jnp.where(begins_B[:, None], 0.0, h_BD)', 'h_BD')),
  'another state': ('TutorialState', ('return width', 'return 2 * width')),
}


@pytest.fixture
def layer(request, monkeypatch):
  """Make a layer, and remove it from the registry of config types afterwards."""
  made = tutorial(*LAYERS[request.param])
  for name in ('LAYERS', 'DECODING'):
    monkeypatch.setitem(getattr(cases, name), request.param, made.Config())
  yield made
  cases.layer.cache_clear()
  forget(made.Config)


def hold(made):
  """Run every test of the contract on a layer."""
  name = next(n for n, c in cases.LAYERS.items() if type(c) is made.Config)
  contract.test_fast_form_equals_naive(name)
  for prefill in PREFILLS:
    contract.test_sequence_equals_prefill_and_steps(name, prefill)
  contract.test_sequence_equals_two_parts(name)
  contract.test_long_sequence_equals_its_tokens(name)
  contract.test_no_row_depends_on_others(name)
  contract.test_no_output_depends_on_a_later_input(name)
  contract.test_packed_documents_equal_separate_ones(name)
  contract.test_sharded_equals_unsharded(name)
  contract.test_gradients_equal_differences(name)
  contract.test_bfloat16_is_near(name)
  contract.test_state_is_as_declared(name)
  contract.test_config_survives_json(name)
  contract.test_padding_before_a_document_leaves_no_trace(name, True)


@pytest.mark.newest
@pytest.mark.parametrize('layer', ['right'], indirect=True)
def test_the_layer_of_the_tutorial_keeps_the_contract(layer):
  hold(layer)


@pytest.mark.parametrize(
  ('layer', 'test'),
  [
    ('looks ahead', contract.test_no_output_depends_on_a_later_input),
    ('forgets documents', contract.test_packed_documents_equal_separate_ones),
    ('another state', contract.test_state_is_as_declared),
  ],
  indirect=['layer'],
)
def test_a_wrong_layer_breaks_it(layer, test, request):
  with pytest.raises(AssertionError):
    test(next(n for n, c in cases.LAYERS.items() if type(c) is layer.Config))


@pytest.mark.parametrize('layer', ['right'], indirect=True)
def test_a_step_unlike_the_sequence_breaks_it(layer, monkeypatch):
  sequence = layer.step

  def step(self, x_BD, ctx, state):
    out = sequence(self, x_BD, ctx, state)
    return type(out)(out.y + 0.01 * jnp.ones(()).reshape(1, 1), out.state)

  monkeypatch.setattr(layer, 'step', step)
  with pytest.raises(AssertionError, match='differs by'):
    contract.test_sequence_equals_prefill_and_steps('right', 17)
