"""Tasks, one file each: importing this package registers them all. `task.py` says what a task
is."""

import importlib
import pkgutil

for _module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
  importlib.import_module(f'{__name__}.{_module}')
