"""jaxformer: train, plan and compare sequence models in JAX, on TPU and GPU meshes.

    import jaxformer as jf

    model = jf.preset('llama3-tiny')                       # an architecture is data
    print(jf.plan(model).params)
    result = jf.train(jf.experiment('llama3-tiny', ('training.steps', '100'), ('run.name', 'first')))
    print(jf.generate('runs/first', 'def main('))

The functions here are the short way; the packages below have the whole of it.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jaxformer import compare

if TYPE_CHECKING:
  from flax import nnx

  from jaxformer.compare.results import Results
  from jaxformer.compare.study import Study
  from jaxformer.models.language_model import ModelConfig
  from jaxformer.planning.cost import Cost
  from jaxformer.training import Experiment, TrainResult

__all__ = ['build', 'compare', 'experiment', 'generate', 'plan', 'preset', 'train']


def preset(name: str) -> ModelConfig:
  """The architecture published under `name` (see `jaxformer list`)."""
  from jaxformer.models.zoo import PRESETS
  return PRESETS[name].model


def build(model: ModelConfig | str, seed: int = 0) -> nnx.Module:
  """The module of a config or preset with initial values, on one device."""
  import jax

  from jaxformer.models.params import define
  definition = define(preset(model) if isinstance(model, str) else model)
  return definition.merge(definition.init(jax.random.key(seed)))


def experiment(target: str, *overrides: tuple[str, str]) -> Experiment:
  """The experiment that the command line makes of a preset's name or a file, and (dotted path, text) overrides."""
  from jaxformer.cli.common import experiment_of
  return experiment_of(target, list(overrides))


def train(experiment: Experiment, **options: Any) -> TrainResult:
  """Trains in the experiment's run folder; see `jaxformer.training.train`."""
  from jaxformer.training import train
  return train(experiment, **options)


def generate(run: str, prompt: str = '', *, max_new_tokens: int = 200, temperature: float = 0.8, seed: int = 0) -> str:
  """The continuation of `prompt` by a trained model: a run folder, or a folder of Hugging Face weights."""
  from jaxformer.cli.common import load_writer
  from jaxformer.inference import Sampling, generate_text
  trained = load_writer(run, 'generate')
  tokenizer = trained.tokenizer
  texts = generate_text(
    trained.definition, trained.params, [tokenizer.encode(prompt).tolist()], tokenizer.decode_bytes, max_new_tokens=max_new_tokens,
    sampling=Sampling(temperature=temperature), seed=seed, end_of_document=tokenizer.end_of_document,
    vocab_size=tokenizer.vocab_size)
  return texts[0].text


def plan(model: ModelConfig | str, length: int | None = None) -> Cost:
  """What a config or preset costs, from shapes alone; `length` is the training sequence length, the model's context by default."""
  from jaxformer.planning.cost import cost
  return cost(preset(model) if isinstance(model, str) else model, length)


class _Compare(types.ModuleType):
  """The package `jaxformer.compare`, which can be called: it has the name of the function that belongs here."""

  def __call__(self, study: Study | str, *overrides: tuple[str, str], log: Callable[[str], None] | None = None) -> Results:
    """Runs a study (a name, a file that defines `study`, or a `jaxformer.compare.study.Study`) with (dotted path, text) overrides
    and writes its report; a study that was stopped goes on. `log` takes a line a run, stderr by default."""
    from jaxformer.cli.common import note, study_of
    from jaxformer.compare.report import report_study
    from jaxformer.config import override
    whole = study_of(study) if isinstance(study, str) else study
    return report_study(override(whole, overrides, 'study'), log or note)


compare.__class__ = _Compare
