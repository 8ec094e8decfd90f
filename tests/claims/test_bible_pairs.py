"""Bible corpora: the text of verses, pairs by book, chapter and verse, and where packages come
from. Modules are small and made here; the real ones are read where they are at hand."""

import importlib.util
import json
import os
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from jaxformer import cli
from jaxformer.config import InputError
from jaxformer.data import ByDocument, Pairs, Tsv, open_data

FILE = Path(__file__).parents[2] / 'experiments/claims/bible_pairs.py'
spec = importlib.util.spec_from_file_location('bible_pairs', FILE)
sword = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sword)

pytestmark = pytest.mark.quick
MISSING = (
  'the packages sword-text-kjv and sword-text-sparv are neither installed nor in $JAXFORMER_SWORD'
)


def real() -> Path | None:
  """A folder with both packages: a folder of each that was unpacked, or what is installed."""
  for folder in (os.environ.get('JAXFORMER_SWORD'), '/usr/share/sword'):
    roots = [Path(folder or 'none', inside) for inside in ('.', 'usr/share/sword')]
    roots += [Path(folder or 'none', m.package, 'usr/share/sword') for m in sword.CORPORA['kjv-es']]
    if folder and all(
      any((r / 'mods.d' / f'{m.name}.conf').exists() for r in roots)
      for m in sword.CORPORA['kjv-es']
    ):
      return Path(folder)
  return None


def write_module(root: Path, module, verses: dict[tuple[str, int, int], str]) -> None:
  """A compressed module with a block for each testament."""
  from pysword.books import BibleStructure

  structure = BibleStructure('kjv', ['ot', 'nt'])
  data = root / 'modules' / module.name
  data.mkdir(parents=True)
  (root / 'mods.d').mkdir(exist_ok=True)
  (root / 'mods.d' / f'{module.name}.conf').write_text(
    f'[{module.name}]\nDataPath=./modules/{module.name}/\nModDrv=zText\nSourceType=OSIS\nEncoding=UTF-8\nBlockType=BOOK\n'
    'Versification=KJV\nVersion=1.0\nDistributionLicense=Public Domain\n'
  )
  blocks, records = {'ot': b'', 'nt': b''}, {'ot': {}, 'nt': {}}
  for (book, chapter, verse), text in verses.items():
    ((testament, (index,)),) = structure.ref_to_indicies([book], [chapter], [verse]).items()
    raw = text.encode()
    records[testament][index] = (0, len(blocks[testament]), len(raw))
    blocks[testament] += raw
  for testament, block in blocks.items():
    packed = zlib.compress(block)
    (data / f'{testament}.bzz').write_bytes(packed)
    (data / f'{testament}.bzs').write_bytes(struct.pack('<III', 0, len(packed), len(block)))
    last = max(records[testament], default=-1)
    (data / f'{testament}.bzv').write_bytes(
      b''.join(struct.pack('<IIH', *records[testament].get(i, (0, 0, 0))) for i in range(last + 1))
    )


SOURCE = {
  ('Genesis', 1, 1): '<w lemma="strong:H7225">In the</w> <w>beginning</w>.',
  ('Genesis', 1, 2): 'And <note>or, then</note>more.',
  ('Genesis', 2, 1): 'Alone.',
  ('John', 3, 16): '¶ For <divineName>God</divineName>',
}
TARGET = {
  ('Genesis', 1, 1): 'En el principio.',
  ('Genesis', 1, 2): 'Y más.',
  ('Genesis', 2, 1): '  ',
  ('John', 3, 16): 'Porque Dios',
  ('Revelation of John', 22, 21): 'Amén.',
}


@pytest.fixture
def packages(tmp_path):
  pytest.importorskip('pysword')
  root = tmp_path / 'packages'
  write_module(root, sword.KJV, SOURCE)
  write_module(root, sword.RV, TARGET)
  return root


def test_verses_are_paired_by_their_place(packages, tmp_path):
  manifest = sword.prepare('kjv-es', tmp_path / 'out', packages)
  text = (tmp_path / 'out' / 'kjv-es.tsv').read_text()
  assert text.splitlines() == [
    'In the beginning.\tEn el principio.\tGenesis 1\t1',
    'And more.\tY más.\tGenesis 1\t2',
    'For God\tPorque Dios\tJohn 3\t16',
  ]
  assert manifest == json.loads((tmp_path / 'out' / 'kjv-es.json').read_text())
  assert (manifest['pairs'], manifest['chapters'], manifest['left_out']) == (
    3,
    2,
    {'source': 1, 'target': 1},
  )
  assert manifest['source']['module'] == 'engKJV2006eb'
  assert manifest['source']['licence'] == 'Public Domain'
  assert {Path(name).name for name in manifest['source']['files']} == {
    'engKJV2006eb.conf',
    *(f'{t}.bz{x}' for t in ('ot', 'nt') for x in 'svz'),
  }
  assert len(manifest['file']['sha256']) == 64
  assert sword.prepare('kjv-es', tmp_path / 'again', packages) == manifest
  pairs = Tsv(path=str(tmp_path / 'out' / 'kjv-es.tsv'), document_column=3).rows()
  assert [p.document for p in pairs] == ['Genesis 1', 'Genesis 1', 'John 3']


def test_the_script_prepares_a_corpus_that_the_others_read(packages, tmp_path, capsys):
  assert sword.main(['kjv-es', '--out', str(tmp_path / 'out'), '--packages', str(packages)]) == 0
  first, *_, last = capsys.readouterr().out.splitlines()
  assert first.startswith(f'{tmp_path}/out/kjv-es.tsv: 3 pairs in 2 chapters, sha256 ')
  words = last.partition('to use it: ')[2].split()
  assert words[:4] == ['--data', 'Pairs', '--data.corpus', 'Tsv']
  assert (
    cli.main(
      ['data', 'train-tokenizer', str(tmp_path / 'tokenizer.json'), '--vocab-size', '262', *words]
    )
    == 0
  )
  own = [
    '--data.tokenizer',
    'TokenizerFile',
    '--data.tokenizer.path',
    str(tmp_path / 'tokenizer.json'),
  ]
  assert cli.main(['data', 'info', *words, *own, '--json']) == 0
  value = json.loads(capsys.readouterr().out)
  assert value['train']['pairs'] + value['validation']['pairs'] == 3
  assert value['tokenizer'] == value['source_tokenizer']
  assert value['tokenizer']['vocab_size'] == 262
  assert value['corpus']['document_column'] == 3
  assert cli.main(['data', 'info', *words]) == 0
  assert (
    'Tsv, vocabulary 257 to 257; 0 pairs left out with an empty text' in capsys.readouterr().out
  )


@pytest.mark.parametrize(
  ('osis', 'text'),
  [
    (
      'beginning</w>, <w>God</w><note place="foot"><reference type="annotateRef">1:1 '
      '</reference>x</note><w>created</w>',
      'beginning, God created',
    ),
    ('the <w>king</w><note>a<hi>b</hi></note>, <note>c</note>and', 'the king, and'),
    ('<title>ALEPH</title><w>Blessed</w>', 'Blessed'),
    (
      '<title canonical="true" type="psalm">A <w>Psalm</w>.</title> <l level="1"/>LORD',
      'A Psalm. LORD',
    ),
    ('<q marker="">¶ <w>For</w> God</q>', 'For God'),
    (
      '<w>de</w> <w>la</w><transChange type="added">que fué</transChange><w>de</w> Urías',
      'de la que fué de Urías',
    ),
    ('<w>hecho</w><transChange type="added">lo</transChange>, y', 'hecholo, y'),
    ('tha<w>t</w> &amp; &lt;', 'that & <'),
    ('a<note/> b<note n="1"/> c', 'a b c'),
    ('<note>only</note>', ''),
  ],
)
def test_the_text_of_a_verse(osis, text):
  assert sword.plain(osis) == text


def test_packages_that_cannot_be_had_are_said_to_be_missing(tmp_path, monkeypatch):
  monkeypatch.setattr(sword, 'INSTALLED', tmp_path / 'none')
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(
    InputError,
    match=r'sword-text-sparv are not installed and cannot be downloaded.*apt-get is not installed',
  ):
    sword.prepare('kjv-es', tmp_path / 'out')
  (tmp_path / 'apt-get').write_text(
    '#!/bin/sh\necho "E: Unable to locate package $2" >&2\nexit 100\n'
  )
  (tmp_path / 'apt-get').chmod(0o755)
  with pytest.raises(InputError, match=r'apt-get: E: Unable to locate package sword-text-kjv'):
    sword.prepare('kjv-es', tmp_path / 'out')
  with pytest.raises(
    InputError, match=r'holds neither sword-text-kjv_\*\.deb nor the module engKJV2006eb'
  ):
    sword.prepare('kjv-es', tmp_path / 'out', tmp_path)
  (tmp_path / 'sword-text-kjv_1_all.deb').write_text('not a package')
  with pytest.raises(
    InputError, match=r'sword-text-kjv_1_all\.deb cannot be unpacked \(dpkg-deb is not installed\)'
  ):
    sword.prepare('kjv-es', tmp_path / 'out', tmp_path)
  with pytest.raises(InputError, match='no corpus named'):
    sword.prepare('kjv-de', tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_packages_are_unpacked(packages, tmp_path):
  build = tmp_path / 'build'
  for module in (sword.KJV, sword.RV):
    inside = build / module.package
    (inside / 'DEBIAN').mkdir(parents=True)
    (inside / 'DEBIAN' / 'control').write_text(
      f'Package: {module.package}\nVersion: 1\nArchitecture: all\nMaintainer: a '
      '<a@b.c>\nDescription: x\n'
    )
    root = inside / 'usr/share/sword'
    write_module(root, module, SOURCE if module is sword.KJV else TARGET)
    try:
      subprocess.run(
        ['dpkg-deb', '-b', str(inside), str(build / f'{module.package}_1_all.deb')],
        check=True,
        capture_output=True,
      )
    except FileNotFoundError:
      pytest.skip('dpkg-deb is not installed')
    for found in (inside / 'usr').rglob('*.conf'):
      found.unlink()  # only the packages hold the modules now
  manifest = sword.prepare('kjv-es', tmp_path / 'out', build)
  assert manifest['file'] == sword.prepare('kjv-es', tmp_path / 'plain', packages)['file']


def test_a_damaged_module_is_refused(packages, tmp_path):
  (packages / 'mods.d' / 'spaRV1909eb.conf').write_text(
    '[spaRV1909eb]\nModDrv=zText\nDataPath=./gone/\n'
  )
  with pytest.raises(InputError, match='the module spaRV1909eb cannot be read'):
    sword.prepare('kjv-es', tmp_path / 'out', packages)


@pytest.mark.skipif(real() is None, reason=MISSING)
def test_the_real_corpus(tmp_path):
  pytest.importorskip('pysword')
  manifest = sword.prepare('kjv-es', tmp_path, real())
  assert (manifest['pairs'], manifest['chapters']) == (31_084, 1189)
  data = open_data(
    Pairs(
      corpus=Tsv(path=str(tmp_path / 'kjv-es.tsv'), document_column=3),
      split=ByDocument(fraction=0.05),
    )
  )
  assert data.manifest['empty'] == 0
  assert data.manifest['train']['pairs'] + data.manifest['validation']['pairs'] == 31_084
  assert 0.03 < data.manifest['validation']['pairs'] / 31_084 < 0.07
  first = next(Tsv(path=str(tmp_path / 'kjv-es.tsv')).rows()).texts
  assert first[0] == 'In the beginning God created the heaven and the earth.'
  assert first[1] == 'EN el principio crió Dios los cielos y la tierra.'
