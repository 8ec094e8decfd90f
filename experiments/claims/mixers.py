"""Shared code of the claims that compare sequence layers: stacks of a fixed shape around any
layers, running studies, and the rule for solving a task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import gallery
import jax

from jaxformer.config import InputError
from jaxformer.layers.init import FanInNormal, Normal
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.model import ModelConfig
from jaxformer.models.stack import Group
from jaxformer.models.zoo.preset import Family, two_thirds
from jaxformer.study.charts import Axis, Point, Series
from jaxformer.study.report import report_study
from jaxformer.study.results import Outcome, Results, TaskResults, interval_form
from jaxformer.study.sizing import solve
from jaxformer.study.statistics import Difference, compare
from jaxformer.study.study import Entry, Study
from jaxformer.study.tables import amount

SOLVED = 0.95  # accuracy
INIT = FanInNormal()
GRID, RATE = (3e-3, 1e-2, 3e-2), 1e-2

Solved = Literal['solved', 'not solved', 'undecided']
"""Whether the 95 % interval of an accuracy over seeds lies above `SOLVED`, below it, or on both
sides."""


class Stacked(Entry):
  """Blocks in Llama's frame (pre-norm RMSNorm, SwiGLU), one for each of `mixers` in their order,
  all of one width. Equal size comes from the hidden units alone, so that neither depth nor width is
  a difference between what is compared. Weights are initialized at the scale
  of their inputs: the 0.02 of larger models is next to nothing at this width, and a thousand steps
    would go by in growing.

  Attributes:
    mixers: the sequence layers, from the first block to the last.
    width: of the model.
  """

  mixers: tuple[LayerConfig, ...]
  width: int = 32

  def validate(self):
    self.require(len(self.mixers) > 0, 'mixers', 'at least one layer')
    self.require(self.width > 0, 'width', 'positive')

  @property
  def title(self) -> str:
    return self.name or '-'.join(m.tag for m in self.mixers)

  def model(
    self, study: Study, vocab_size: int, context_length: int, source_vocab_size: int | None = None
  ) -> ModelConfig:
    family = Family(
      self.title, self.make, self.width, len(self.mixers), two_thirds, grows_deeper=False
    )
    sized = solve(
      family,
      study.match,
      study.target,
      vocab_size=vocab_size,
      context_length=context_length,
      tolerance=study.tolerance,
    )
    if sized.width != self.width:
      raise InputError(
        f'Stacked.width = {self.width}: {self.title} has {study.target:,.0f} {study.match} at '
        f'width {sized.width}; '
        'give another width, or another target'
      )
    return sized.model

  def make(
    self, *, width: int, layers: int, hidden: int, vocab_size: int, context_length: int
  ) -> LanguageModel.Config:
    """The model at a size."""
    norm = RMSNorm()
    mlp = GatedMlp.Config(hidden=hidden, init=INIT, out_init=INIT)
    blocks = tuple(
      Block.Config(branches=tuple(PreNorm(layer=part, norm=norm) for part in (mixer, mlp)))
      for mixer in self.mixers
    )
    # equal blocks are one program, scanned
    pattern = blocks[:1] if len(set(blocks)) == 1 else blocks
    return LanguageModel.Config(
      vocab_size=vocab_size,
      width=width,
      context_length=context_length,
      final_norm=norm,
      embedding_init=Normal(std=1.0),
      head_init=INIT,
      stack=(Group(pattern=pattern, repeats=layers // len(pattern)),),
    )


def rates(scale: float) -> tuple[float, ...]:
  """Learning rates, the same for all that are compared: a grid, which has as many as there are
  seeds, so that both are one program. Below scale 2 the middle one alone, or tuning would be half
  of the time: of 0.003 and 0.01 it was the better one for attention, H3 and S4D when these recalled
  4 pairs after 600 updates of one seed."""
  return GRID if scale >= 2 else (RATE,)


def run(study: Study) -> Results:
  """Train what is not trained yet, write the study's own report, and print where it is. Raises
  `Interrupted` after a signal. Programs are kept beside the runs: at this size compiling costs as
  much as training, and a grid and the seeds after it are one program."""
  jax.config.update('jax_compilation_cache_dir', str(Path(study.dir) / 'compiled'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
  results = report_study(study, lambda line: print(line, flush=True))
  print(*results.answer, f'report: {study.folder / "report" / "report.html"}', sep='\n', flush=True)
  jax.clear_caches()  # the next study compiles other programs
  return results


def numbers(results: Results, **others: Any) -> dict[str, Any]:
  """Return the numbers of a study that go with its result: scores and settings, and others."""
  report = results.json()
  return {**others, 'tasks': report['tasks'], 'config': report['config']}


def outcomes(task: TaskResults) -> dict[str, Outcome]:
  """Return the outcomes of a task, by name."""
  return {o.title: o for o in task.outcomes}


def solved(o: Outcome) -> Solved:
  """Return whether an architecture solves the task; one with a run that diverged does not."""
  if o.estimate is None or None in o.scores.values():
    return 'not solved'
  return (
    'solved'
    if o.estimate.low > SOLVED
    else 'not solved'
    if o.estimate.high < SOLVED
    else 'undecided'
  )


def scores(task: TaskResults) -> dict[str, dict[int, float]]:
  """Return the scores of each seed, of architectures none of whose runs diverged."""
  return {
    o.title: {s: v for s, v in o.scores.items() if v is not None}
    for o in task.outcomes
    if None not in o.scores.values()
  }


def between(task: TaskResults, name: str, other: str) -> Difference | None:
  """Return the paired difference of two, None if a run of theirs diverged. A study's own
  differences are all from its baseline."""
  of = {n: found for n, found in scores(task).items() if n in (name, other)}
  if len(of) < 2:
    return None
  return compare(of, other, lower_is_better=task.metric != 'accuracy')[0]


def told(task: TaskResults, o: Outcome) -> str:
  """Format a score with its interval."""
  return f'{o.title} {interval_form(task.metric, o.estimate)}'


def points(task: TaskResults, at: Mapping[str, float]) -> dict[str, Point]:
  """Return a point with its interval per architecture with a finished run, at the given x;
  accuracies in per cent."""
  found = {}
  for o in task.outcomes:
    if o.estimate is not None:
      e, percent = o.estimate, 100.0 if task.metric == 'accuracy' else 1.0
      low, high = (
        (max(0.0, e.low), min(1.0, e.high)) if task.metric == 'accuracy' else (e.low, e.high)
      )
      found[o.title] = Point(at[o.title], percent * e.mean, percent * low, percent * high)
  return found


def curves(task: TaskResults) -> gallery.Picture:
  """Return the training loss of all architectures."""
  series = [
    Series(
      o.title,
      i,
      tuple(Point(n, loss) for n, loss in o.curve if n > o.curve[-1][0] / 10),
      line=True,
      dots=False,
    )
    for i, o in enumerate(task.outcomes)
  ]
  return gallery.Picture.of(
    'curves',
    'Training loss by tokens, mean over seeds (the first tenth is omitted)',
    series,
    Axis('tokens', form=amount),
    Axis('nats per token'),
  )


def seeds(task: TaskResults) -> gallery.Picture:
  """Return the score of every seed, on text."""
  series = [
    Series(o.title, i, tuple(Point(s, v) for s, v in o.scores.items() if v is not None))
    for i, o in enumerate(task.outcomes)
  ]
  return gallery.Picture.of(
    'seeds', 'Held-out bits per byte of each seed', series, Axis('seed'), Axis('bits per byte')
  )
