"""Every block of README and docs runs: commands made short, Python sessions as printed."""

import contextlib
import doctest
import io
import re
import shlex
import sys

import pytest

from jaxformer.cli import main
from tests.docs.pages import PAGES, ROOT, SET_UP, blocks, shortened
from tests.tiers import case

pytestmark = pytest.mark.e2e


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A working folder with what the pages speak of: text, pairs, and the files that they show."""
  folder = tmp_path_factory.mktemp('docs')
  texts = folder / 'my-texts'
  texts.mkdir()
  for i in range(40):
    (texts / f'{i}.txt').write_text(f'Line {i} of a text of my own.\n' * 40)
  rows = [f'one two three {i}\tuno dos tres {i}' for i in range(400)]
  (folder / 'verses.tsv').write_text('\n'.join(rows) + '\n')
  layers = [b for b in blocks(ROOT / 'docs' / 'layers.md') if b.language == 'python']
  for name, block in zip(('alternating.py', 'my_layer.py', 'small.py'), layers, strict=True):
    (folder / name).write_text(block.text)
  (folder / 'experiments').symlink_to(ROOT / 'experiments')
  return folder


def shell_blocks():
  return [
    case(b, standing=b.page == 'README.md', id=b.id)
    for page in PAGES
    for b in blocks(page)
    if b.language == '' and b.marker != 'tpu'
  ]


def run(command: str, expected: int) -> None:
  """Run a line of a shell block in this process: `jaxformer ...`, or a pipe of echo into it."""
  before, pipe, after = command.rpartition(' | ')
  text = ' '.join(shlex.split(before)[1:]) + '\n' if pipe else ''
  words = shortened(after)
  assert words[0] == 'jaxformer', command
  out, err = io.StringIO(), io.StringIO()
  stdin, sys.stdin = sys.stdin, io.StringIO(text)
  try:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      code = main(words[1:])
  finally:
    sys.stdin = stdin
  assert code == expected, f'{command}\n{err.getvalue()}'
  assert 'Traceback' not in err.getvalue()


@pytest.mark.parametrize('block', shell_blocks())
def test_commands(block, folder, monkeypatch):
  monkeypatch.chdir(folder)
  expected = int(block.marker.removeprefix('exit ')) if block.marker.startswith('exit') else 0
  for command in block.commands:
    if block.marker == 'elsewhere':  # on a machine that is not here: what it gives still parses
      if command.startswith('jaxformer'):
        run(f'{command} --show', 0)
      continue
    for part in command.split(' && '):
      if part.startswith(SET_UP):
        continue
      if part.startswith('python experiments/'):
        assert (ROOT / part.split()[1]).is_file()
        continue
      needs(part, folder)
      run(part, expected)


def needs(command: str, folder) -> None:
  """Train what a command reads, if the block that trains it has not run in this process."""
  made = {
    'llama3-tiny': 'jaxformer train llama3-tiny',
    'transformer-tiny': 'jaxformer train transformer-tiny',
    'gated': 'jaxformer train my_layer.py:GatedLinear.Config --params 1M --run.name gated',
  }
  words = shlex.split(command.rpartition(' | ')[2])
  reads = words[1] in ('eval', 'generate', 'convert', 'align', 'report') and words[2] in made
  if reads and not (folder / 'runs' / words[2]).exists():
    run(made[words[2]], 0)


SESSIONS = [
  pytest.param(b, id=b.id)
  for page in PAGES
  for b in blocks(page)
  if b.language == 'python' and '>>>' in b.text
]


@pytest.fixture(scope='module')
def spaces():
  """The names of a page's session, which its blocks share."""
  return {}


@pytest.mark.parametrize('block', SESSIONS)
def test_sessions(block, folder, spaces, monkeypatch):
  """As printed, but for the data: a corpus that is small, in sequences that are short."""
  import jaxformer as jf

  monkeypatch.chdir(folder)
  train = jf.train

  def short(target, *, overrides=(), **options):
    made = jf.experiment(target, overrides=overrides)
    data = made.data.replace(sequence_length=32)
    training = made.training.replace(trackers=(), eval_batches=1)
    return train(made.replace(data=data, training=training), **options)

  monkeypatch.setattr(jf, 'train', short, raising=False)
  space = spaces.setdefault(block.page, {})
  test = doctest.DocTestParser().get_doctest(block.text, space, block.id, block.page, 0)
  out = io.StringIO()
  runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
  runner.run(test, out=out.write, clear_globs=False)
  spaces[block.page] = test.globs
  assert runner.failures == 0, out.getvalue()


@pytest.mark.quick
def test_links_lead_somewhere():
  for page in PAGES:
    for link in re.findall(r'\]\(([^)#]+)\)', page.read_text()):
      if '://' not in link:
        assert (page.parent / link).exists(), f'{page.name}: {link}'


@pytest.mark.quick
def test_the_readme_is_short():
  assert len((ROOT / 'README.md').read_text().splitlines()) <= 200
