"""Splits: complete, stable, and never empty on one side."""

import pytest

from jaxformer.config import InputError
from jaxformer.data import ByDocument, ByPosition, Row
from jaxformer.data.splits import divide

pytestmark = pytest.mark.quick


def pieces(texts, split):
  return list(divide(lambda: (Row((t,)) for t in texts), split, 'here')[1])


def sides(texts, split):
  placed = pieces(texts, split)
  return tuple([p.texts[0] for p in placed if p.side == side] for side in ('train', 'validation'))


def test_documents_stay_on_their_side_when_others_are_added():
  texts = [f'document {i}' for i in range(2000)]
  train, validation = sides(texts, ByDocument(fraction=0.1))
  assert sorted(train + validation) == sorted(texts)
  assert 140 < len(validation) < 260
  more_train, more_validation = sides(
    [f'new {i}' for i in range(500)] + texts[::-1], ByDocument(fraction=0.1)
  )
  assert set(train) < set(more_train)
  assert set(validation) < set(more_validation)


def test_copies_share_a_side():
  train, validation = sides([f'document {i % 50}' for i in range(500)], ByDocument(fraction=0.3))
  assert not set(train) & set(validation)


@pytest.mark.parametrize('fraction', [1e-9, 0.05, 1 - 1e-9])
def test_both_sides_have_documents(fraction):
  for n in range(2, 12):
    train, validation = sides([f'{n} {i}' for i in range(n)], ByDocument(fraction=fraction))
    assert train
    assert validation


def test_what_cannot_be_divided():
  with pytest.raises(InputError, match=r'the corpus is one document.*the split ByPosition'):
    sides(['only one', ''], ByDocument())
  with pytest.raises(InputError, match='all rows are of one document'):
    sides(['same', 'same'], ByDocument())
  with pytest.raises(InputError, match='here: the corpus holds no text'):
    sides(['', ''], ByDocument())
  with pytest.raises(
    InputError, match=r'ByPosition\.fraction = 0\.1: leaves a side of the 1 characters empty'
  ):
    sides(['x'], ByPosition())
  for split in (ByDocument, ByPosition):
    for fraction in (0.0, 1.0, -0.1):
      with pytest.raises(
        InputError, match=rf'{split.__name__}\.fraction = .*: must be between 0 and 1'
      ):
        split(fraction=fraction)


@pytest.mark.parametrize('characters', [10, 11, 997, 1_115_394])
def test_by_position_is_the_published_split(characters):
  text = ('0123456789é' * (characters // 11 + 1))[:characters]
  train, validation = sides([text], ByPosition())
  assert (train, validation) == ([text[: int(characters * 0.9)]], [text[int(characters * 0.9) :]])


def test_the_published_corpus_of_characters_leaves_its_published_validation_side():
  _, validation = sides(['x' * 1_115_394], ByPosition())
  assert len(validation[0]) == 111_540


def test_by_position_cuts_one_document_only():
  placed = pieces(('abcd', '', 'efgh', 'ij'), ByPosition(fraction=0.4))
  assert [(p.side, *p.texts, p.ends) for p in placed] == [
    ('train', 'abcd', True),
    ('train', 'ef', False),
    ('validation', 'gh', True),
    ('validation', 'ij', True),
  ]
