"""Parallel corpora: every format gives the same pairs, and what is wrong is said with its place."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from jaxformer.config import InputError, from_json, to_json
from jaxformer.data import ByDocument, Records, Row, Tsv, TwoFiles, training_texts
from jaxformer.data.splits import divide

pytestmark = pytest.mark.quick
PAIRS = [
  Row(('one two', 'uno dos'), 'a'),
  Row(('thrée', 'tres'), 'a'),
  Row(('four "4"', 'cuatro'), 'b'),
  Row(('five', 'cinco'), 'c'),
]


@pytest.fixture
def corpora(tmp_path):
  (tmp_path / 'a.tsv').write_text(
    ''.join('\t'.join((p.document, *p.texts[::-1])) + '\n' for p in PAIRS)
  )
  rows = [{'en': p.texts[0], 'es': p.texts[1], 'book': p.document, 'n': 1} for p in PAIRS]
  with gzip.open(tmp_path / 'a.jsonl.gz', 'wt') as file:
    file.writelines(json.dumps(r) + '\n' for r in rows)
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'a.parquet')
  (tmp_path / 'a.en').write_bytes(
    '\ufeff'.encode() + '\r\n'.join(p.texts[0] for p in PAIRS).encode()
  )
  (tmp_path / 'a.es').write_text('\n'.join(p.texts[1] for p in PAIRS) + '\n')
  fields = {'source_field': 'en', 'target_field': 'es', 'document_field': 'book'}
  return {
    'tsv': Tsv(path=str(tmp_path / 'a.tsv'), source_column=3, target_column=2, document_column=1),
    'jsonl': Records(path=str(tmp_path / 'a.jsonl.gz'), **fields),
    'parquet': Records(path=str(tmp_path / 'a.parquet'), **fields),
    'files': TwoFiles(source_path=str(tmp_path / 'a.en'), target_path=str(tmp_path / 'a.es')),
  }


@pytest.mark.parametrize('name', ['tsv', 'jsonl', 'parquet', 'files'])
def test_every_format_gives_the_same_pairs(corpora, name):
  corpus = corpora[name]
  want = [p._replace(document='') for p in PAIRS] if name == 'files' else PAIRS
  assert list(corpus.rows()) == list(corpus.rows()) == want
  assert from_json(to_json(corpus)) == corpus
  manifest = corpus.manifest()
  assert manifest['type'] == corpus.tag
  assert manifest['sha256'] == corpus.fingerprint()
  assert all(len(f['sha256']) == 64 and f['bytes'] > 0 for f in manifest['files'])


def test_fingerprints_follow_content_and_columns_but_not_paths(corpora, tmp_path):
  tsv = corpora['tsv']
  (tmp_path / 'copy.tsv').write_bytes((tmp_path / 'a.tsv').read_bytes())
  (tmp_path / 'more.tsv').write_bytes((tmp_path / 'a.tsv').read_bytes() + b'd\td\td\n')
  assert tsv.replace(path=str(tmp_path / 'copy.tsv')).fingerprint() == tsv.fingerprint()
  more, bare, swapped = (
    {'path': str(tmp_path / 'more.tsv')},
    {'document_column': None},
    {'source_column': 2, 'target_column': 3},
  )
  others = [tsv.replace(**changes) for changes in (more, bare, swapped)]
  assert len({c.fingerprint() for c in [tsv, *others]}) == 4


@pytest.mark.parametrize(
  ('kind', 'content', 'fields', 'message'),
  [
    (Tsv, 'a\tb\nc\n', {}, r'x:2: 1 columns; must have 2'),
    (Tsv, 'a\tb\n', {'document_column': 3}, r'x:1: 2 columns; must have 3'),
    (
      Records,
      '{"source": "a", "target": "b"}\n{"source": "a", "es": "b"}\n',
      {},
      r"x:2: no field 'target' \(target_field\); fields there: source, es",
    ),
    (
      Records,
      '{"source": "a", "target": 3}\n',
      {},
      r"x:1: field 'target' holds a int; target_field must name",
    ),
    (
      Records,
      '{"source": "a", "target": "b"}\n',
      {'document_field': 'book'},
      r"no field 'book' \(document_field\)",
    ),
    (Records, '["a", "b"]\n', {}, r'x:1: a JSON list'),
    (Records, 'PAR', {'path': 'x.parquet'}, r'x\.parquet: cannot be read as Parquet'),
  ],
)
def test_faulty_files_are_refused_with_the_place(tmp_path, kind, content, fields, message):
  path = tmp_path / fields.get('path', 'x')
  path.write_text(content)
  with pytest.raises(InputError, match=message):
    list(kind(**fields | {'path': str(path)}).rows())


def test_a_parquet_file_without_the_column(corpora):
  with pytest.raises(
    InputError, match=r"no field 'de' \(target_field\); fields there: en, es, book, n"
  ):
    list(corpora['parquet'].replace(target_field='de').rows())


@pytest.mark.parametrize('longer', ['source', 'target'])
def test_files_that_are_not_aligned(tmp_path, longer):
  for side in ('source', 'target'):
    (tmp_path / side).write_text('a\nb\n' + 'c\nd\ne\n' * (side == longer))
  corpus = TwoFiles(source_path=str(tmp_path / 'source'), target_path=str(tmp_path / 'target'))
  with pytest.raises(InputError, match=rf'ends after 2 lines and .*{longer} has 5: not aligned'):
    list(corpus.rows())


def test_settings_that_make_no_sense():
  for make, message in (
    (lambda: Tsv(path='a', source_column=2), 'target_column = 2'),
    (lambda: Tsv(path='a', document_column=0), 'document_column = 0'),
    (lambda: Records(path='a', target_field='source'), 'a field other than source_field'),
    (
      lambda: list(TwoFiles(source_path='gone', target_path='gone').rows()),
      "source_path = 'gone': must be a file that exists",
    ),
  ):
    with pytest.raises(InputError, match=message):
      make()


# ---- the split ---------------------------------------------------------------------------------


def corpus_of(tmp_path, rows):
  (tmp_path / 'c.tsv').write_text(''.join('\t'.join(r) + '\n' for r in rows))
  return Tsv(path=str(tmp_path / 'c.tsv'), document_column=3)


def test_documents_stay_together_and_blank_pairs_are_on_no_side(tmp_path):
  rows = [(f's{i}', f't{i}' if i % 10 else ' ', f'd{i // 5}') for i in range(300)]
  corpus = corpus_of(tmp_path, rows)
  survey, pieces = divide(corpus.rows, ByDocument(fraction=0.3), 'here')
  placed = list(pieces)
  assert [p.texts for p in placed] == [r[:2] for r in rows if r[1].strip()]
  assert (survey.rows, survey.empty) == (270, 30)
  document, sides = {r[:2]: r[2] for r in rows}, {}
  for p in placed:
    sides.setdefault(document[p.texts], set()).add(p.side)
  assert all(len(s) == 1 for s in sides.values())
  held_out = sum(s == {'validation'} for s in sides.values())
  assert 8 <= held_out <= 28  # 18 of 60 expected, three standard deviations
  texts = list(training_texts(corpus, ByDocument(fraction=0.3), (0, 1)))
  assert texts == [t for p in placed if p.side == 'train' for t in p.texts]


def test_without_documents_the_same_source_is_on_one_side(tmp_path):
  corpus = corpus_of(tmp_path, [(f's{i % 20}', f't{i}', 'd') for i in range(200)]).replace(
    document_column=None
  )
  sides = {}
  for p in divide(corpus.rows, ByDocument(fraction=0.5), 'here')[1]:
    sides.setdefault(p.texts[0], set()).add(p.side)
  assert all(len(s) == 1 for s in sides.values())
  assert set.union(*sides.values()) == {'train', 'validation'}


@pytest.mark.parametrize(
  ('rows', 'message'),
  [
    ([(' ', 'a', 'd')], 'holds no text'),
    ([('a', 'b', 'd'), ('c', 'd', 'd')], 'all rows are of one document'),
  ],
)
def test_corpora_that_cannot_be_divided(tmp_path, rows, message):
  with pytest.raises(InputError, match=message):
    list(divide(corpus_of(tmp_path, rows).rows, ByDocument(), 'here')[1])
