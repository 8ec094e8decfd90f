"""The table of implementations of an operation: what is chosen, forced, refused and recorded."""

import importlib
import pkgutil

import jax
import jax.numpy as jnp
import pytest

from jaxformer import ops
from jaxformer.config import InputError
from jaxformer.ops.attention import ATTENTION, Mask, attention
from jaxformer.ops.implementation import OPERATIONS, Operation, implementation, record_choices
from jaxformer.ops.linear_solve import SOLVE
from jaxformer.ops.wkv4 import WKV4, wkv4
from jaxformer.ops.wkv6 import wkv6
from jaxformer.sharding import assume_platform
from tests.helpers import forced

pytestmark = pytest.mark.quick


def traced(f, *shapes):
  with record_choices() as chosen:
    jax.eval_shape(lambda *a: f(*a)[0], *shapes)
  return chosen


def wkv4_shapes(T):
  token, channel = jax.ShapeDtypeStruct((2, T, 8), jnp.float32), jax.ShapeDtypeStruct((8,), float)
  return token, token, channel, channel, None, jax.ShapeDtypeStruct((2, T), bool)


def wkv6_shapes(T):
  token, heads = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, T, 2, 4), (2, 4)))
  return token, token, token, token, heads, None, jax.ShapeDtypeStruct((2, T), bool)


@pytest.mark.parametrize(('op', 'shapes'), [(wkv4, wkv4_shapes), (wkv6, wkv6_shapes)])
def test_choices_are_recorded_and_forced(op, shapes):
  name = op.__name__
  chosen = traced(op, *shapes(20))
  assert list(chosen) == [name]
  assert list(chosen[name]) == ['chunked']
  assert chosen[name]['chunked']['naive'] == 'chunked comes first on a cpu'
  assert list(traced(forced(op, every='naive'), *shapes(20))[name]) == ['naive']
  assert list(traced(forced(op, every='naive', **{name: 'chunked'}), *shapes(20))[name]) == [
    'chunked'
  ]
  assert list(traced(op, *shapes(1))[name]) == ['naive']


def test_a_platform_can_be_asked_about_from_another():
  with assume_platform('tpu'):
    assert WKV4.explain(100)[0] == 'associative'
    assert SOLVE.explain()[0] == 'naive'
    q = jax.ShapeDtypeStruct((1, 1024, 4, 64), jnp.bfloat16)
    name, others = ATTENTION.explain(q, q, Mask())
  assert name == 'splash'
  assert others['cudnn'] == 'it runs on a GPU, not on a tpu'
  assert others['naive'] == 'splash comes first on a tpu'
  assert WKV4.explain(100)[0] == 'chunked'


def test_unknown_names_are_refused():
  with pytest.raises(InputError, match=r"operation = 'atention': must be one of attention, "):
    implementation(atention='naive').__enter__()
  with pytest.raises(InputError, match=r"implementation = 'nave': must be one of .*naive"):
    implementation(every='nave').__enter__()
  q = jnp.zeros((1, 8, 2, 8))
  with pytest.raises(InputError, match=r"attention = 'flash': must be one of naive, chunked, "):
    forced(attention, attention='flash')(q, q, q, Mask(), scale=1.0)


def test_every_operation_has_a_table():
  modules = [
    importlib.import_module(f'jaxformer.ops.{m.name}') for m in pkgutil.iter_modules(ops.__path__)
  ]
  tables = {v.name for m in modules for v in vars(m).values() if isinstance(v, Operation)}
  assert tables == set(OPERATIONS)
