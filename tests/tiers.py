"""Which of tests that are alike the plain `pytest` runs: a few families stand for all. `pytest -m
thorough` runs the others."""

from collections.abc import Iterable
from typing import Any

import pytest

# A transformer, a Mamba, an RWKV, a hybrid with experts, an encoder-decoder and a classifier.
STANDING = 'llama3', 'mamba', 'rwkv7', 'jamba', 'transformer', 's4d-classifier'
# Of layers attention, a scan, products of chunks, a convolution, experts, an LSTM, a decoder
# that attends to its source, and one that mixes no positions.
LAYERS = 'Attention', 'Mamba', 'TimeMix7', 'S4D', 'Moe', 'Lstm', 'InputFeeding', 'GatedMlp'
# Layers whose code another one has and adds to: KimiDeltaAttention, GatedLinearAttention,
# Retention, MinGru and PreUpMLstm.
PART_OF_OTHERS = 'DeltaNet', 'GatedDeltaNet', 'Hgrn2', 'LightningAttention', 'MinLstm', 'MLstm'
thorough = pytest.mark.thorough
# What `.ci/run` also runs on the newest Python and jax, in tree mode, compiled as users compile:
# each layer and model against its other forms and on meshes, kills, and the command line.
newest = pytest.mark.newest


def families(names: Iterable[str]) -> list[Any]:
  """Parameters of a test: names of families, or of their tiny presets."""
  return [case(name, standing=name.removesuffix('-tiny') in STANDING) for name in names]


def first_stands(cases: Iterable[Any]) -> list[Any]:
  """Parameters of a test: the first stands for the others. A tuple has several arguments."""
  cases = [c if isinstance(c, tuple) else (c,) for c in cases]
  return [case(*c, standing=i == 0) for i, c in enumerate(cases)]


def case(*values: Any, standing: bool, id: str | None = None) -> Any:
  """One set of parameters, thorough where it does not stand for others."""
  return pytest.param(*values, id=id, marks=() if standing else thorough)
