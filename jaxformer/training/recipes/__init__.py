"""Recipes of the published models, one file per family. Importing this package registers them all
in `RECIPES`."""

import importlib
import pkgutil

from jaxformer.models.zoo import PRESETS
from jaxformer.training.experiment import Experiment, default_experiment
from jaxformer.training.recipes.by_size import is_large, model_experiment
from jaxformer.training.recipes.recipe import FIELDS, RECIPES, Field, Origin, Recipe, Status

for _module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
  importlib.import_module(f'{__name__}.{_module}')


def preset_experiment(name: str) -> Experiment:
  """Return what a preset's name stands for in every command: the recipe of a published model, else
  a training of about a minute."""
  if name in RECIPES:
    return RECIPES[name].experiment
  return default_experiment(PRESETS[name].model, name)


__all__ = [
  'FIELDS',
  'RECIPES',
  'Field',
  'Origin',
  'Recipe',
  'Status',
  'is_large',
  'model_experiment',
  'preset_experiment',
]
