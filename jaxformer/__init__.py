"""jaxformer: train, plan and compare sequence models in JAX, on TPU and GPU meshes.

    import jaxformer as jf

    model = jf.preset('llama3-tiny')                 # an architecture is data
    print(jf.plan(model).params)
    e = jf.experiment('llama3-tiny', overrides={'training.steps': 100, 'run.name': 'first'})
    result = jf.train(e)
    trained = jf.load('first')                       # describes itself in a notebook
    print(trained.generate('def main('))
    print(trained.evaluate().lines())

Everything is imported when it is first used, so `import jaxformer` costs nothing."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jaxformer.api import (
    bench,
    build,
    check,
    compare,
    convert,
    describe,
    evaluate,
    experiment,
    generate,
    get_study,
    inspect_data,
    load,
    plan,
    plan_launch,
    preset,
    recipe_notes,
    report,
    shapes,
    train,
    train_runs,
    train_tokenizer,
    translate,
  )
  from jaxformer.config import InputError
  from jaxformer.inference import Sampling
  from jaxformer.launch import LaunchError
  from jaxformer.study.sharing import Interrupted
  from jaxformer.workflows.model import Model
  from jaxformer.workflows.presets import presets

__all__ = [
  'InputError',
  'Interrupted',
  'LaunchError',
  'Model',
  'Sampling',
  'bench',
  'build',
  'check',
  'compare',
  'convert',
  'describe',
  'evaluate',
  'experiment',
  'generate',
  'get_study',
  'inspect_data',
  'load',
  'plan',
  'plan_launch',
  'preset',
  'presets',
  'recipe_notes',
  'report',
  'shapes',
  'train',
  'train_runs',
  'train_tokenizer',
  'translate',
]

_ELSEWHERE = {
  'InputError': 'jaxformer.config',
  'Interrupted': 'jaxformer.study.sharing',
  'LaunchError': 'jaxformer.launch',
  'Model': 'jaxformer.workflows.model',
  'Sampling': 'jaxformer.inference',
  'presets': 'jaxformer.workflows.presets',
}


def __getattr__(name: str) -> Any:
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  value = getattr(importlib.import_module(_ELSEWHERE.get(name, 'jaxformer.api')), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
