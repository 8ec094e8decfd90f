"""Text piece by piece: whole characters only, stop strings across tokens and chunks, the same
tokens however they are cut."""

from __future__ import annotations

import pytest

from jaxformer.config import InputError
from jaxformer.inference import GREEDY, Sampling, generate, generate_text, request, stream
from jaxformer.inference.text import TextRow
from tests.inference.models import model

TABLE = ['a', 'b', 'c', 'd', 'e', ' ', '\n', 'é', '→', '😀', 'ab', 'cd', 'the ', 'ß']
BYTES = [
  *(t.encode() for t in TABLE),
  *(bytes([b]) for b in '→'.encode()),
  *(bytes([97 + i % 26]) for i in range(15)),
]


def decode_bytes(ids):
  return b''.join(BYTES[i] for i in ids)


class Spaced:
  """A tokenizer that is not byte-level: words, joined by spaces, as sentencepiece decodes; token 0
  is half a character."""

  words = ('\ufffd', 'one', 'two', 'three', 'four')

  def decode_bytes(self, ids):
    text = ' '.join(self.words[i] for i in ids)
    return text.replace('\ufffd \ufffd', '→').encode()


@pytest.mark.quick
@pytest.mark.parametrize(
  ('text', 'stops', 'want'),
  [
    ('hello world', (), 'hello world'),
    ('hello world', ('o w',), 'hell'),
    ('hello world', ('xyz', 'world!'), 'hello world'),  # held back, then let go at the end
    ('abcd', ('abc', 'b'), 'a'),  # b is complete before abc is
    ('xabc', ('bc', 'abc'), 'x'),  # they end together: the longer
    ('aaab', ('aab',), 'a'),  # overlaps itself
    ('naïve → 😀!', ('→ 😀',), 'naïve '),
    ('é', ('é',), ''),
    ('line\n\nnext', ('\n\n',), 'line'),
  ],
)
def test_stop_strings_byte_by_byte_and_in_pieces(text, stops, want):
  data = text.encode()
  for size in (1, 2, 3, 5, 100):
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    row = TextRow([], lambda ids, pieces=pieces: b''.join(pieces[i] for i in ids), stops)
    out = [row.push(i) for i in range(len(pieces))]
    assert not any('\ufffd' in piece for piece in out)
    assert ''.join(out) + row.close() == want, size
    assert row.stopped == (want != text)


@pytest.mark.quick
def test_text_comes_as_soon_as_it_is_certain():
  row = TextRow([], lambda ids: bytes(ids), ('</s>',))
  assert [row.push(b) for b in b'a<b</s'] == ['a', '', '<b', '', '', '']
  assert row.close() == '</s'
  row = TextRow([], lambda ids: bytes(ids), ())
  assert [row.push(b) for b in '😀x'.encode()] == ['', '', '', '😀', 'x']
  assert row.push(0xF0) + row.close() == '\ufffd'  # cut off in the middle


@pytest.mark.quick
def test_tokenizers_that_are_not_byte_level():
  spaced = Spaced()
  row = TextRow([1, 2], spaced.decode_bytes, ())
  out = [row.push(t) for t in (3, 0, 0, 4, *[1] * 30)]
  assert out[:4] == [' three', '', ' →', ' four']
  assert ''.join(out) == ' three → four' + ' one' * 30


@pytest.mark.parametrize(
  'sampling', [GREEDY, Sampling(repetition_penalty=1.1)], ids=['greedy', 'sampled']
)
def test_streamed_in_chunks_or_whole(sampling):
  definition, params = model('alibi')
  options = {'max_new_tokens': 21, 'sampling': sampling, 'end_of_document': 30}
  prompts = [[1], [2, 3, 4], [5]]
  tokens = [g.tokens for g in generate(request(definition, params, prompts, **options))]
  want = [decode_bytes(t).decode(errors='replace') for t in tokens]
  for chunk in (1, 4, 16, 64):
    turns = list(stream(request(definition, params, prompts, **options), decode_bytes, chunk=chunk))
    assert [''.join(row) for row in zip(*turns)] == want
    if chunk == 1:  # as many turns as the longest row needs
      assert len(turns) == max(map(len, tokens)) + (0 if max(map(len, tokens)) == 21 else 1)
  whole = generate_text(request(definition, params, prompts, **options), decode_bytes)
  assert [g.text for g in whole] == want
  assert [g.tokens for g in whole] == tokens


def test_stop_string_across_a_chunk_border():
  definition, params = model('alibi')
  options = {'max_new_tokens': 24, 'sampling': Sampling(temperature=1.0), 'seed': 3}
  prompts = [[1], [2]]
  whole = generate_text(request(definition, params, prompts, **options), decode_bytes)
  tokens, text = whole[0].tokens, whole[0].text
  stop = decode_bytes(tokens[6:10]).decode(errors='ignore')  # chunks of 8 end in the middle
  assert len(stop) > 1
  for chunk in (1, 3, 8, 24):
    got = generate_text(
      request(definition, params, prompts, **options), decode_bytes, stop=[stop], chunk=chunk
    )
    assert got[0].text == text[: text.index(stop)]
    assert got[0].finished
    assert got[0].tokens == tokens[: len(got[0].tokens)]
    assert len(got[0].tokens) <= 10
    assert got[1].text == (whole[1].text.split(stop)[0])
  alone = list(
    stream(request(definition, params, prompts[:1], **options), decode_bytes, stop=[stop], chunk=4)
  )
  assert len(alone) <= 3  # and not 6: nothing runs on after the last row has stopped


@pytest.mark.quick
def test_errors_come_at_once():
  definition, params = model('alibi')
  r = request(definition, params, [[1]], max_new_tokens=4)
  for wrong in ({'stop': ['']}, {'stop': 'end'}, {'chunk': 0}):
    with pytest.raises(InputError, match=list(wrong)[-1]):
      stream(r, decode_bytes, **wrong)
