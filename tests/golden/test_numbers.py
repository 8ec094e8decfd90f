"""The recorded numbers come out again. After a change that is meant to change them:
`python -m tests.golden.numbers [losses|logits|counts|plans|study]... [PRESET]...`."""

import functools
import math
from typing import Any

import pytest

from tests.golden import numbers
from tests.golden.numbers import TINY
from tests.tiers import case, thorough

# Twenty steps of the larger ones take long.
FEW = [case(n, standing=n in ('llama3-tiny', 'mamba-tiny', 'transformer-tiny')) for n in TINY]


def close(found: Any, expected: Any, relative: float, at: str = '') -> list[str]:
  """What differs, in words. Integers and words are equal, floats close; 0 is 0."""
  if isinstance(expected, dict) and isinstance(found, dict) and found.keys() == expected.keys():
    return [d for k in expected for d in close(found[k], expected[k], relative, f'{at}.{k}')]
  if isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
    return [
      d
      for i, (a, b) in enumerate(zip(found, expected, strict=True))
      for d in close(a, b, relative, f'{at}[{i}]')
    ]
  if isinstance(expected, float) and isinstance(found, float):
    same = math.isclose(found, expected, rel_tol=relative)
  else:
    same = type(found) is type(expected) and found == expected
  return [] if same else [f'{at.strip(".")}: {found!r}, recorded {expected!r}']


@functools.cache
def recorded(what: str) -> dict[str, Any]:
  return numbers.recorded(what)


def tolerance(what: str, name: str | None, elsewhere: float) -> float:
  """1e-6 where the numbers of a preset, or of a file without presets, were recorded; `elsewhere` on
  other processors and with other compilers, which round otherwise."""
  file = recorded(what)
  one = {} if name is None else file['presets'][name]
  return 1e-6 if one.get('recorded_on', file['recorded_on']) == numbers.here() else elsewhere


@pytest.mark.parametrize('name', FEW)
def test_losses(name):
  expected = dict(recorded('losses')['presets'][name])
  rounding = max(expected.pop('rounding'), expected.pop('rounding_of_norm'))
  expected.pop('recorded_on', None)
  found = numbers.losses(name)
  # The norm adds up all parameters in the order of their names, which may change.
  norms = [{'grad_norm': values.pop('grad_norm')} for values in (found, expected)]
  elsewhere = max(1e-5, 30 * rounding)
  differ = close(found, expected, tolerance('losses', name, elsewhere))
  differ += close(*norms, max(1e-5, tolerance('losses', name, elsewhere)))
  assert not differ, '\n'.join(
    [
      f'{name}: nudging initial values by one float changes this by {rounding:.0e}; much more is '
      'no rounding',
      *differ,
    ]
  )


# The losses above are of logits too.
OTHERS = 'rwkv7-tiny', 's4d-classifier-tiny'


@pytest.mark.parametrize('name', [case(n, standing=n in OTHERS) for n in TINY])
def test_logits(name):
  expected, found = recorded('logits')['presets'][name], numbers.logits(name)
  assert found['size'] == expected['size']
  near = tolerance('logits', name, 1e-4) * expected['std']
  for a, b in zip(found['sampled'], expected['sampled'], strict=True):
    assert abs(a - b) <= near, (found['sampled'], expected['sampled'])
  for of_all in ('mean', 'std'):
    assert abs(found[of_all] - expected[of_all]) <= near, of_all
  assert abs(found['sum_of_abs'] - expected['sum_of_abs']) <= near * expected['size']


def test_sizes_and_costs():
  differ, sizes = [], {}
  for name in numbers.presets():
    sizes[name] = numbers.size(name)
    differ += close(numbers.cost_of(name), recorded('plans')[name]['cost'], 1e-9, name)
  assert sizes == recorded('counts')
  assert numbers.by_chapter() == list(recorded('counts')), 'in the order of the story'
  assert not differ, '\n'.join(differ)


# Of each kind one that trains on 64 chips, and those that take 1,024.
PLAIN = (
  'gpt2',
  'llama3.1-405b',
  'mixtral-8x22b',
  'mamba-1.4b',
  'rwkv7-1.5b',
  'rwkv6-14b',
  'mamba2-1.3b',
  'moe-lstm-256',
  's4-tiny',
  'transformer-big',
  'gnmt',
  's4d-digits',
)


@pytest.mark.parametrize('name', [case(name, standing=name in PLAIN) for name in numbers.presets()])
def test_plans(name):
  differ = close(numbers.plan(name), recorded('plans')[name], 1e-9)
  assert not differ, '\n'.join([name, *differ])


def test_every_preset_is_recorded():
  assert set(recorded('losses')['presets']) == set(recorded('logits')['presets']) == set(TINY)
  assert set(recorded('plans')) == set(numbers.presets())


@thorough
def test_study(tmp_path):
  expected = dict(recorded('study'))
  expected.pop('recorded_on')
  differ = close(numbers.study(str(tmp_path)), expected, tolerance('study', None, 0.1))
  assert not differ, '\n'.join(differ)
