"""Checkpoint formats, one file per family. Importing this package registers all in `FAMILIES`."""

import importlib
import pkgutil

from jaxformer.interop.family import FAMILIES

for _module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
  importlib.import_module(f'{__name__}.{_module}')

__all__ = ['FAMILIES']
