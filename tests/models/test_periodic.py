"""A stack of given blocks as groups of patterns that repeat."""

import pytest

from jaxformer.layers.attention import Attention
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.stack import periodic

pytestmark = pytest.mark.quick

BLOCKS = {
  name: Block.Config(branches=(PreNorm(layer=Attention.Config(window=window)),))
  for name, window in (('a', None), ('b', 2), ('c', 3))
}


@pytest.mark.parametrize(
  ('blocks', 'groups'),
  [
    ('a', [('a', 1)]),
    ('aaaa', [('a', 4)]),
    ('abab', [('ab', 2)]),
    ('ababa', [('ab', 2), ('a', 1)]),
    ('aabaabaa', [('aab', 2), ('a', 2)]),  # as Gemma 3, whose depth is no multiple of its period
    ('aaab', [('a', 3), ('b', 1)]),
    ('aaabbb', [('a', 3), ('b', 3)]),
    ('abc', [('a', 1), ('b', 1), ('c', 1)]),
  ],
)
def test_periodic(blocks, groups):
  found = periodic([BLOCKS[name] for name in blocks])
  assert [(g.pattern, g.repeats) for g in found] == [
    (tuple(BLOCKS[name] for name in pattern), repeats) for pattern, repeats in groups
  ]
