"""A stack of given blocks as groups of patterns that repeat."""

import pytest

from jaxformer.layers.attention import Attention
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.stack import grouped

pytestmark = pytest.mark.quick

NEMOTRON_H_8B = 'M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-'


@pytest.mark.parametrize(
  ('blocks', 'groups'),
  [
    ('a', [('a', 1)]),
    ('abc', [('abc', 1)]),
    ('aaaa', [('a', 4)]),
    ('ababab', [('ab', 3)]),
    ('ababa', [('ab', 2), ('a', 1)]),
    ('aabaabaa', [('aab', 2), ('a', 2)]),  # as Gemma 3, whose depth is no multiple of its period
    ('aaab', [('a', 3), ('b', 1)]),
    ('aaabbb', [('a', 3), ('b', 3)]),
    ('abcc', [('ab', 1), ('c', 2)]),
    ('ccaccaccacacacac', [('cca', 3), ('ca', 3), ('c', 1)]),
    (NEMOTRON_H_8B, [('M-M-M-M*-M-', 4), ('M-', 4)]),
  ],
)
def test_repetitions_become_groups(blocks, groups):
  kinds = {
    letter: Block.Config(branches=(PreNorm(layer=Attention.Config(window=1 + ord(letter))),))
    for letter in set(blocks)
  }
  found = grouped([kinds[letter] for letter in blocks])
  assert [(g.pattern, g.repeats) for g in found] == [
    (tuple(kinds[letter] for letter in pattern), repeats) for pattern, repeats in groups
  ]
