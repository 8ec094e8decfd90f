"""Named architectures, one file per family. Importing this package registers them all in
`PRESETS`."""

import importlib
import pkgutil

from jaxformer.models.zoo.preset import FAMILIES, PRESETS, Family, Preset, family, preset

for _module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
  importlib.import_module(f'{__name__}.{_module}')

__all__ = ['FAMILIES', 'PRESETS', 'Family', 'Preset', 'family', 'preset']
