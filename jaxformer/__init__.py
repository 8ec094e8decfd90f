"""jaxformer: train, plan and compare sequence models in JAX, on TPU and GPU meshes.

    import jaxformer as jf

    model = jf.preset('llama3-tiny')                       # an architecture is data
    print(jf.plan(model).params) result = jf.train(jf.experiment('llama3-tiny', ('training.steps',
    '100'), ('run.name', 'first'))) print(jf.generate('runs/first', 'def main('))
    print(jf.translate('runs/transformer-tiny', 'March 5th, 1996'))

The functions here are the short way; the packages below have the whole of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
  from collections.abc import Sequence

  from flax import nnx

  from jaxformer.models.model import ModelConfig
  from jaxformer.planning.cost import Cost
  from jaxformer.study.results import Results
  from jaxformer.study.study import Study
  from jaxformer.training import Experiment, TrainResult

__all__ = ['build', 'compare', 'experiment', 'generate', 'plan', 'preset', 'train', 'translate']


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
  """The experiment that the command line makes of a preset's name or a file, and (dotted path,
  text) overrides."""
  from jaxformer.cli.common import experiment_of

  return experiment_of(target, list(overrides))


def train(experiment: Experiment, **options: Any) -> TrainResult:
  """Trains in the experiment's run folder; see `jaxformer.training.train`."""
  from jaxformer.training import train

  return train(experiment, **options)


def generate(
  run: str, prompt: str = '', *, max_new_tokens: int = 200, temperature: float = 0.8, seed: int = 0
) -> str:
  """The continuation of `prompt` by a trained model: a run folder, or a folder of Hugging Face
  weights."""
  from jaxformer.cli.common import load_writer, translates
  from jaxformer.config import InputError
  from jaxformer.inference import Sampling, generate_text

  trained = load_writer(run, 'generate')
  if translates(trained):
    raise InputError(
      f'{run}: is an encoder-decoder, which continues no prompt; `translate` takes it'
    )
  tokenizer = trained.tokenizer
  texts = generate_text(
    trained.definition,
    trained.params,
    [tokenizer.encode(prompt).tolist()],
    tokenizer.decode_bytes,
    max_new_tokens=max_new_tokens,
    sampling=Sampling(temperature=temperature),
    seed=seed,
    end_of_document=tokenizer.end_of_document,
    vocab_size=tokenizer.vocab_size,
  )
  return texts[0].text


@overload
def translate(
  run: str,
  source: str,
  *,
  beam: int = ...,
  length_penalty: float = ...,
  max_new_tokens: int | None = ...,
) -> str: ...


@overload
def translate(
  run: str,
  source: Sequence[str],
  *,
  beam: int = ...,
  length_penalty: float = ...,
  max_new_tokens: int | None = ...,
) -> list[str]: ...


def translate(
  run: str,
  source: str | Sequence[str],
  *,
  beam: int = 1,
  length_penalty: float = 0.6,
  max_new_tokens: int | None = None,
) -> str | list[str]:
  """The translation of a text by a trained encoder-decoder, a run folder or a folder of Hugging
  Face weights; of several texts, a list of theirs. `beam` hypotheses are kept; 1 takes the
  likeliest token at each step. `max_new_tokens`: None for twice the source and ten."""
  from jaxformer.cli.common import load_writer, translated, translates
  from jaxformer.config import InputError
  from jaxformer.inference import Beam

  trained = load_writer(run, 'translate')
  if not translates(trained):
    raise InputError(f'{run}: is a language model, which translates nothing; `generate` takes it')
  texts = [source] if isinstance(source, str) else list(source)
  found = translated(
    trained,
    texts,
    beam=Beam(width=beam, length_penalty=length_penalty),
    max_new_tokens=max_new_tokens,
  )
  written = [text for text, _ in found]
  return written[0] if isinstance(source, str) else written


def plan(model: ModelConfig | str, length: int | None = None) -> Cost:
  """What a config or preset costs, from shapes alone; `length` is the training sequence length, the
  model's context by default."""
  from jaxformer.planning.cost import cost

  return cost(preset(model) if isinstance(model, str) else model, length)


def compare(
  study: Study | str,
  *overrides: tuple[str, str],
  log: Callable[[str], None] | None = None,
) -> Results:
  """Runs a study (a name, a file that defines `study`, or a `Study`) with
  (dotted path, text) overrides and writes its report. `log` takes a line per run, stderr by
  default."""
  from jaxformer.cli.common import note, study_of
  from jaxformer.overrides import override
  from jaxformer.study.report import report_study

  whole = override(study_of(study) if isinstance(study, str) else study, overrides, 'study')
  return report_study(whole, log or note)
