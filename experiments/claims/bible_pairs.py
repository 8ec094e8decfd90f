"""Write a parallel corpus of Bible translations in the public domain as a TSV file.

    python experiments/claims/bible_pairs.py kjv-es --out bible

`kjv-es` has 31,084 verses in English and Spanish, `kjv-web` in old and modern English. They are
made from SWORD modules that Debian and Ubuntu package: looked for in `--packages DIR`, in
/usr/share/sword, and by `apt-get download` and `dpkg-deb -x` into a temporary folder, which needs
no root. Reading modules needs the extra `translation`. To train on the file: `--data Pairs
--data.corpus Tsv --data.corpus.path bible/kjv-es.tsv --data.corpus.document_column 3`."""

from __future__ import annotations

import argparse
import functools
import html
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from jaxformer.config import InputError, nearest
from jaxformer.data.cache import Log
from jaxformer.data.cache_folder import file_sha256
from jaxformer.files import write_atomically

INSTALLED = Path('/usr/share/sword')
INSIDE = 'usr/share/sword'  # where a package holds its modules
DOWNLOAD_SECONDS = 600


class Module(NamedTuple):
  """A translation as a SWORD module."""

  package: str
  name: str
  title: str


class BiblePair(NamedTuple):
  """Two translations whose verses correspond."""

  source: Module
  target: Module


KJV = Module('sword-text-kjv', 'engKJV2006eb', 'King James Version (1769), English')
RV = Module('sword-text-sparv', 'spaRV1909eb', 'Reina-Valera (1909), Spanish')
WEB = Module('sword-text-web', 'engWEB2015eb', 'World English Bible, modern English')
CORPORA = {'kjv-es': BiblePair(KJV, RV), 'kjv-web': BiblePair(KJV, WEB)}

Verse = tuple[str, int, int]  # book, chapter, verse


def prepare(
  name: str, out: Path | str, packages: Path | str | None = None, log: Log = print
) -> dict[str, Any]:
  """Write `name`.tsv and `name`.json, the manifest that is returned, into the folder `out`.

  A line is a verse that both translations have, paired by book, chapter and verse: source, target,
  document (book and chapter), verse. The two of `kjv-web` number a few verses differently (WEB
  counts as the NRSV does), which misaligns a handful.

  Args:
    name: of `CORPORA`.
    packages: folder with the .deb files of the packages, or with their contents.

  Raises `InputError` where the modules are not found or cannot be read, or the folder cannot be
  written.
  """
  if name not in CORPORA:
    raise InputError(f'no corpus named {name!r}{nearest(name, CORPORA)}')
  corpus, out = CORPORA[name], Path(out).expanduser()
  with tempfile.TemporaryDirectory(prefix='jaxformer-sword-') as work:
    roots = find(
      name, list(corpus), None if packages is None else Path(packages).expanduser(), Path(work), log
    )
    source, target = (verses(roots[m.package], m) for m in corpus)
    modules = {side: _facts(roots[m.package], m) for side, m in zip(corpus._fields, corpus)}
  shared = [v for v in source if v in target]
  if not shared:
    raise InputError(
      f'{name}: {corpus.source.name} and {corpus.target.name} have no verse in common'
    )
  lines = (f'{source[v]}\t{target[v]}\t{v[0]} {v[1]}\t{v[2]}\n' for v in shared)
  data = ''.join(lines).encode()
  try:
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / f'{name}.tsv', data)
    manifest = {
      'corpus': name,
      **modules,
      'pairs': len(shared),
      'chapters': len({v[:2] for v in shared}),
      'left_out': {'source': len(source) - len(shared), 'target': len(target) - len(shared)},
      'columns': ['source', 'target', 'document', 'verse'],
      'file': {
        'name': f'{name}.tsv',
        'bytes': len(data),
        'sha256': file_sha256(out / f'{name}.tsv'),
      },
    }
    write_atomically(
      out / f'{name}.json', (json.dumps(manifest, indent=2, ensure_ascii=False) + '\n').encode()
    )
  except OSError as e:
    raise InputError(f'{out}: cannot be written ({e.strerror})') from None
  return manifest


# ---- finding modules ---------------------------------------------------------------------------


def find(
  name: str, modules: list[Module], folder: Path | None, work: Path, log: Log
) -> dict[str, Path]:
  """Return for the package of each module the folder that holds `mods.d` and `modules`. Packages
  are unpacked into `work`."""
  if folder is not None:
    if not folder.is_dir():
      raise InputError(f'--packages {folder}: no such folder')
    return {m.package: _given(m, folder, work) for m in modules}
  if all(_holds(INSTALLED, m) for m in modules):
    return {m.package: INSTALLED for m in modules}
  _download(name, [m.package for m in modules], work, log)
  return {m.package: _given(m, work, work) for m in modules}


def _holds(root: Path, module: Module) -> bool:
  return (root / 'mods.d' / f'{module.name}.conf').is_file()


def _given(module: Module, folder: Path, work: Path) -> Path:
  """Return the root of a module in a folder that holds it, its unpacked package, or its package."""
  for root in (folder, folder / INSIDE, folder / module.package / INSIDE):
    if _holds(root, module):
      return root
  files = sorted(folder.glob(f'{module.package}_*.deb'))
  if not files:
    raise InputError(
      f'{folder}: holds neither {module.package}_*.deb nor the module {module.name} '
      f'(mods.d/{module.name}.conf)'
    )
  into = work / f'unpacked-{module.package}'
  _command(['dpkg-deb', '-x', str(files[-1]), str(into)], f'{files[-1]} cannot be unpacked')
  if not _holds(into / INSIDE, module):
    raise InputError(f'{files[-1]}: does not hold the module {module.name}')
  return into / INSIDE


def _download(name: str, packages: list[str], work: Path, log: Log) -> None:
  listed = ' and '.join(packages)
  log(f'downloading the packages {listed}')
  _command(
    ['apt-get', 'download', *packages],
    f'{name}: the packages {listed} are not installed and cannot be downloaded. Debian and '
    'Ubuntu have them: get their .deb '
    'files on such a system (`apt-get download`, after `apt-get update`) and give their folder as '
    '--packages DIR',
    work,
  )


def _command(words: list[str], failure: str, folder: Path | None = None) -> None:
  try:
    done = subprocess.run(
      words, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False
    )
  except FileNotFoundError:
    raise InputError(f'{failure} ({words[0]} is not installed)') from None
  except subprocess.TimeoutExpired:
    raise InputError(f'{failure} ({words[0]} took more than {DOWNLOAD_SECONDS} s)') from None
  if done.returncode:
    reason = next(
      (line for line in reversed(done.stderr.splitlines()) if line.strip()),
      f'exit code {done.returncode}',
    )
    raise InputError(f'{failure} ({words[0]}: {reason})')


def _facts(root: Path, module: Module) -> dict[str, Any]:
  conf = root / 'mods.d' / f'{module.name}.conf'
  settings = dict(
    line.split('=', 1) for line in conf.read_text('utf-8', 'replace').splitlines() if '=' in line
  )
  data = root / settings.get('DataPath', '')
  files = [conf, *(p for p in sorted(data.rglob('*')) if p.is_file())]
  return {
    'package': module.package,
    'module': module.name,
    'title': module.title,
    'version': settings.get('Version'),
    'licence': settings.get('DistributionLicense'),
    'files': {
      p.relative_to(root).as_posix(): {'bytes': p.stat().st_size, 'sha256': file_sha256(p)}
      for p in files
    },
  }


# ---- reading modules ---------------------------------------------------------------------------


def verses(root: Path, module: Module) -> dict[Verse, str]:
  """Return the verses of a module that are not empty, in order, as plain text on one line."""
  try:
    from pysword.modules import SwordModules
  except ImportError:
    raise InputError(
      "reading SWORD modules needs the package 'pysword'; install the extra: pip install "
      "'jaxformer[translation]'"
    ) from None
  try:
    modules = SwordModules(str(root))
    modules.parse_modules()
    bible: Any = modules.get_bible_from_module(module.name)
    # pysword unpacks a book anew for each of its verses; remembering the last one takes a module
    # from a minute to seconds.
    bible._decompressed_text = functools.lru_cache(2)(bible._decompressed_text)
    found = {}
    for books in bible.get_structure().get_books().values():
      for book in books:
        for chapter, count in enumerate(book.chapter_lengths, 1):
          for verse in range(1, count + 1):
            raw = next(iter(bible.get_iter([book.name], [chapter], [verse], clean=False)), '')
            if text := plain(raw):
              found[book.name, chapter, verse] = text
  except (OSError, ValueError, KeyError, AttributeError) as e:
    raise InputError(
      f'{root}: the module {module.name} cannot be read ({type(e).__name__}: {e})'
    ) from None
  return found


NOTE = re.compile(r'<note\b[^>]*(?<!/)>.*?</note>', re.DOTALL)
HEADING = re.compile(r'<title\b(?![^>]*canonical="true")[^>]*(?<!/)>.*?</title>', re.DOTALL)
ADDED = re.compile(r'(?<=[^\W_])((?:<[^>]*>)*<transChange\b[^>]*>)(.*?)(</transChange>)', re.DOTALL)
AFTER_ADDED = re.compile(r'(</transChange>)(?=(?:<[^>]*>)*[^\W_])')
TAG = re.compile(r'<[^>]*>')
ENCLITIC = re.compile(r'l[aeo]s?')
BEFORE_STOP = re.compile(r'\s+(?=[,.;:!?)])')


def plain(osis: str) -> str:
  """Return the words of a verse in OSIS markup, on one line.

  Notes, headings of editors and paragraph signs are dropped; headings of the text itself (of
  Psalms) stay. Where a note or an added word stands between words without a space, one is added;
  Spanish pronouns added to the end of a verb stay joined to it."""
  text = HEADING.sub(' ', NOTE.sub(' ', osis))
  text = ADDED.sub(
    lambda m: m[0] if ENCLITIC.fullmatch(TAG.sub('', m[2])) else f'{m[1]} {m[2]}{m[3]}', text
  )
  text = AFTER_ADDED.sub(r'\1 ', text)
  text = html.unescape(TAG.sub('', text)).replace('¶', ' ')
  return BEFORE_STOP.sub('', ' '.join(text.split()))


def main(words: list[str] | None = None) -> int:
  """Run the script; returns its exit code."""
  parser = argparse.ArgumentParser(description='Write a parallel corpus of Bible translations.')
  parser.add_argument('name', choices=sorted(CORPORA))
  parser.add_argument('--out', required=True, metavar='DIR', help='folder to write into')
  parser.add_argument(
    '--packages',
    metavar='DIR',
    help='folder with the .deb files of the packages, or their contents',
  )
  args = parser.parse_args(words)
  try:
    manifest = prepare(args.name, args.out, args.packages)
  except InputError as e:
    print(e, file=sys.stderr)
    return 2
  path, left = Path(args.out) / manifest['file']['name'], manifest['left_out']
  print(
    f'{path}: {manifest["pairs"]:,} pairs in {manifest["chapters"]:,} chapters, sha256 '
    f'{manifest["file"]["sha256"]}\n'
    f'  verses of one side alone: {left["source"]:,} of {manifest["source"]["title"]}, '
    f'{left["target"]:,} of {manifest["target"]["title"]}\n'
    f'  to use it: --data Pairs --data.corpus Tsv --data.corpus.path {path} '
    '--data.corpus.document_column 3'
  )
  return 0


if __name__ == '__main__':
  sys.exit(main())
