"""The page of the story is what the families say, and every family is in it."""

import os

import pytest

from jaxformer.models.zoo import PRESETS
from jaxformer.models.zoo.preset import FAMILIES
from jaxformer.models.zoo.story import CHAPTERS, STORY, told
from jaxformer.workflows.presets import presets
from jaxformer.workflows.story import contents, page
from tests.docs.pages import ROOT

pytestmark = pytest.mark.quick
README, PAGE = ROOT / 'README.md', ROOT / 'docs' / 'story.md'


def test_the_page_is_made_from_the_families():
  if os.environ.get('JAXFORMER_UPDATE_GOLDEN') == '1':
    PAGE.write_text(page())
  assert PAGE.read_text() == page(), 'run JAXFORMER_UPDATE_GOLDEN=1 pytest tests/docs'


def test_the_readme_has_every_family():
  before, _, rest = README.read_text().partition('<!-- story -->\n')
  table, _, after = rest.partition('\n\n')
  if os.environ.get('JAXFORMER_UPDATE_GOLDEN') == '1':
    README.write_text(f'{before}<!-- story -->\n{contents()}\n{after}')
    return
  assert table + '\n' == contents(), 'run JAXFORMER_UPDATE_GOLDEN=1 pytest tests/docs'


def test_every_family_has_its_step():
  told_not = {PRESETS[name].family for name in PRESETS} | set(FAMILIES)
  told_not -= set(STORY)
  assert not told_not, f'no step(...) of models/zoo/story.py in the zoo file of {told_not}'
  assert {s.chapter for s in told()} <= set(CHAPTERS)


def test_presets_are_listed_by_chapter():
  lines = [str(line) for line in presets().lines()]
  headings = [line for line in lines if line[:1].isdigit()]
  assert [int(h.partition('.')[0]) for h in headings] == sorted(
    {1 + CHAPTERS.index(s.chapter) for s in told()}
  )
  where = {name: i for i, name in enumerate(line.split()[0] for line in lines if line.strip())}
  assert where['seq2seq-lstm'] < where['gpt2'] < where['mamba-130m'] < where['mixtral-8x7b']
