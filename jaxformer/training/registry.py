"""Every type of config of the package, so that a stored experiment may name any of them."""

import importlib
import pkgutil

from jaxformer import data, layers, models


def import_configs() -> None:
  """Import the modules that define configs: a type is found by its name once it is defined."""
  for package in (data, layers, models):
    for module in pkgutil.walk_packages(package.__path__, f'{package.__name__}.'):
      importlib.import_module(module.name)
