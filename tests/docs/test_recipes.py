"""The page of the recipes is what the data say."""

import os

import pytest

from jaxformer.workflows.recipes import page
from tests.docs.pages import ROOT

pytestmark = pytest.mark.quick
PAGE = ROOT / 'docs' / 'recipes.md'


def test_the_page_is_made_from_the_recipes():
  if os.environ.get('JAXFORMER_UPDATE_GOLDEN') == '1':
    PAGE.write_text(page())
  assert PAGE.read_text() == page(), 'run JAXFORMER_UPDATE_GOLDEN=1 pytest tests/docs'
