"""Every layer says what it computes, and where it was published."""

import pytest

from jaxformer.config import types_of
from jaxformer.layers.layer import Layer, LayerConfig, layer_summary

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
  'kind', [k for k in types_of(LayerConfig) if k.__module__.startswith('jaxformer.layers')]
)
def test_formula_and_source(kind):
  formula, source = layer_summary(kind())
  assert '=' in formula
  assert any(c.isdigit() for c in source)


def test_a_docstring_without_a_source():
  class Custom(Layer):
    """y = 2 x."""

    class Config(LayerConfig):
      pass

  assert layer_summary(Custom.Config()) == ('y = 2 x', '')
