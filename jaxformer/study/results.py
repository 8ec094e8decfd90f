"""Results of a study as data: scores with intervals, significance, sizes, costs, curves and laws.
Every format of the report is made from it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxformer import config
from jaxformer.json_data import json_data
from jaxformer.planning.cost import cost
from jaxformer.study import ngrams
from jaxformer.study.costs import Costs
from jaxformer.study.laws import FittedLaw, in_words, law_of
from jaxformer.study.runner import Trained, Trial, Tuned
from jaxformer.study.statistics import Difference, Estimate, compare, compare_all, estimate
from jaxformer.study.study import Study
from jaxformer.training import read_metrics

CURVE_POINTS = 50
DIVERGED = 'diverged'
# Above this number of architectures pairs are not compared: the table is unreadable, and hardly any
# pair could differ significantly.
MAX_PAIRED = 12


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Result of one architecture on one task.

  Attributes:
    title: of the entry.
    params, active_params, train_flops_per_token, state_bytes: of its model, at the task's length.
    size_error: matched quantity / target - 1.
    tried: (learning rate, score of the tuning seed), None for a run that diverged; empty if nothing
      was tuned.
    rate: the best learning rate.
    at_edge: whether it lies at an end of the rates tried.
    scores: seed -> score, None for a run that diverged.
    estimate: over the seeds that finished; None if none did.
    difference: from the baseline, paired by seed, and corrected for all pairs where these are
      compared; None for the baseline, and if a run of either diverged.
    verdict: in words; None for the baseline.
    curve: (tokens, training loss), the mean over seeds.
    position_loss: mean held-out loss at each position, nats; None for tasks with one target.
    runs: names of the run folders.
    better_than_bigram: whether the mean is better than the score of a bigram model of the training
      text; None where either is unknown, as for data other than text.
    translation: exact match (a fraction), BLEU and chrF over seeds; None unless the data are
      source-target pairs.
  """

  title: str
  params: int
  active_params: int
  train_flops_per_token: float
  state_bytes: int | None
  size_error: float
  tried: tuple[tuple[float, float | None], ...]
  rate: float
  at_edge: bool
  scores: dict[int, float | None]
  estimate: Estimate | None
  difference: Difference | None
  verdict: str | None
  curve: tuple[tuple[int, float], ...]
  position_loss: tuple[float | None, ...] | None
  runs: tuple[str, ...]
  better_than_bigram: bool | None = None
  translation: dict[str, Estimate] | None = None


@dataclasses.dataclass(frozen=True)
class TaskResults:
  """Results of all architectures on one task.

  Attributes:
    metric: 'bits per byte' or 'accuracy'; 'nats per target' in a scaling study.
    length: positions per sequence.
    scored_on: the held-out data.
    outcomes: at the study's one size; empty in a scaling study.
    pairs: all pairs of architectures that finished all runs, from the best mean on; empty for fewer
      than three, which the outcomes compare, and for more than `MAX_PAIRED`.
    laws: of a scaling study.
    ngrams: 'unigram' and 'bigram' -> score of that model of the bytes of the training text
      (`data.baselines`), in the unit of `metric`, on all held-out text; empty for other data.
  """

  title: str
  metric: str
  length: int
  scored_on: str
  outcomes: tuple[Outcome, ...] = ()
  pairs: tuple[Difference, ...] = ()
  laws: tuple[FittedLaw, ...] = ()
  ngrams: dict[str, float] = dataclasses.field(default_factory=dict)

  @property
  def lower_is_better(self) -> bool:
    return self.metric != 'accuracy'

  @property
  def ranked(self) -> list[Outcome]:
    """Outcomes from the best mean to the worst; those without a mean come last."""
    sign = 1 if self.lower_is_better else -1
    return sorted(
      self.outcomes, key=lambda o: math.inf if o.estimate is None else sign * o.estimate.mean
    )

  @property
  def better_than_bigram(self) -> dict[str, bool]:
    """Whether each architecture that has a score is better than the bigram model; in a scaling
    study, whether any of its trainings is. Empty where there is no such model."""
    found = {o.title: [o.better_than_bigram] for o in self.outcomes}
    found |= {f.title: [t.better_than_bigram for t in f.trainings] for f in self.laws}
    known = {name: [b for b in of if b is not None] for name, of in found.items()}
    return {name: any(of) for name, of in known.items() if of}

  @property
  def not_better(self) -> list[str]:
    """What is not better than the bigram model, if anything is: the architectures, and of a scaling
    study how many trainings of each."""
    if not any(self.better_than_bigram.values()):
      return []
    if not self.laws:
      return [name for name, better in self.better_than_bigram.items() if not better]
    marks = {f.title: [t.better_than_bigram for t in f.trainings] for f in self.laws}
    return [
      f'{m.count(False)} of {len(m)} trainings of {title}'
      for title, m in marks.items()
      if False in m
    ]

  def against_best(self) -> dict[str, str]:
    """Return the verdict on the best against each other architecture, if all pairs are compared
    and it is among them."""
    return {d.against: d.verdict for d in self.pairs if d.name == self.ranked[0].title}


@dataclasses.dataclass(frozen=True)
class Results:
  """Results of a finished study.

  Attributes:
    study: as data.
    tasks: by task.
    costs: by entry, at the length of the first task; empty in a scaling study.
    environment: command, versions, device, commit, and the data of each task.
  """

  study: Study
  tasks: tuple[TaskResults, ...]
  costs: dict[str, Costs]
  environment: dict[str, Any]

  @property
  def baseline(self) -> str:
    """Title of the entry that the others are compared with."""
    return self.study.entries[0].title

  @property
  def answer(self) -> list[str]:
    """First where no architecture predicts better than a bigram model; then a few sentences per
    task, or per law of a scaling study."""
    first, rest = [], []
    for task in self.tasks:
      rest += map(in_words, task.laws) if task.laws else [_answer(task, self)]
      if task.ngrams:
        of = task.ngrams, task.metric, task.title if len(self.tasks) > 1 else None
        better = task.better_than_bigram.values()
        first += [ngrams.none_better(*of)] if better and not any(better) else []
        rest.append(ngrams.in_words(*of, task.not_better))
    return [*first, *rest]

  def lines(self) -> list[str]:
    """Return the answer, and where the report is."""
    return [*self.answer, f'report: {self.study.folder / "report" / "report.html"}']

  def json(self) -> dict[str, Any]:
    """Return JSON data; numbers that are not finite are null."""
    return json_data(
      {
        'study': self.study.name,
        'answer': self.answer,
        'baseline': self.baseline,
        'tasks': self.tasks,
        'costs': self.costs,
        'config': config.to_json(self.study),
        'digest': config.digest(self.study),
        'environment': self.environment,
      }
    )


Measured = dict[tuple[str, str], tuple[Any, Any]]
"""(Task, entry) -> losses of its runs by position, and scores of their translations by metric."""


def gather(
  study: Study,
  trained: Trained,
  costs: Mapping[str, Costs],
  measured: Measured,
  environment: dict[str, Any],
) -> Results:
  """Return the results of finished runs."""
  tasks = []
  for title, data in zip(study.task_titles, study.tasks, strict=True):
    found = trained[title]
    sources = (r.metrics.get('eval/source') for t in found for r in t.runs)
    scored_on = next((str(s) for s in sources if s is not None), data.validation_name)
    metric = 'accuracy'
    if study.scaling is not None:
      metric = 'nats per target'
    elif any('eval/bits_per_byte' in r.metrics for t in found for r in t.runs):
      metric = 'bits per byte'
    facts = environment.get('data', {}).get(title, {})
    known = ngrams.scores_of_ngrams(metric, facts, [r.metrics for t in found for r in t.runs])
    task = TaskResults(title, metric, data.positions, scored_on, ngrams=known)
    if study.scaling is None:
      task = _compared(task, study.target, found, measured)
    else:
      laws = (
        law_of(study.scaling, e.title, [t for t in found if t.title == e.title], known)
        for e in study.entries
      )
      task = dataclasses.replace(task, laws=tuple(laws))
    tasks.append(task)
  return Results(study, tuple(tasks), dict(costs), environment)


def _compared(
  task: TaskResults, target: float, found: Sequence[Tuned], measured: Measured
) -> TaskResults:
  """Compare the architectures of one size."""
  lower_is_better = task.lower_is_better
  scores = {t.title: {r.seed: _score(r, task.metric) for r in t.runs} for t in found}
  # Excluding only the runs that diverged would favour their architecture.
  complete: Any = {title: own for title, own in scores.items() if None not in own.values()}
  sign = 1 if lower_is_better else -1
  best_first = sorted(complete, key=lambda title: sign * np.mean(list(complete[title].values())))
  complete = {title: complete[title] for title in best_first}
  baseline, pairs, compared = found[0].title, (), []
  if 2 < len(complete) <= MAX_PAIRED:
    pairs = tuple(compare_all(complete, lower_is_better=lower_is_better))
    # A report has one verdict on each pair, so one correction: not a second one for the fewer
    # comparisons with the baseline.
    compared = [d if d.against == baseline else d.reversed() for d in pairs]
  elif baseline in complete:
    compared = compare(complete, baseline, lower_is_better=lower_is_better)
  differences = {d.name: d for d in compared if d.against == baseline}
  outcomes = tuple(
    _outcome(t, task, target, scores[t.title], differences.get(t.title), measured) for t in found
  )
  first = dataclasses.replace(outcomes[0], verdict=None)
  return dataclasses.replace(task, outcomes=(first, *outcomes[1:]), pairs=pairs)


def _outcome(
  t: Tuned,
  task: TaskResults,
  target: float,
  scores: dict[int, float | None],
  difference: Difference | None,
  measured: Measured,
) -> Outcome:
  c, finite = cost(t.model, task.length), [v for v in scores.values() if v is not None]
  positions, translation = measured.get((task.title, t.title), (None, None))
  mean = estimate(finite) if finite else None
  verdict = DIVERGED if None in scores.values() else 'no baseline'
  return Outcome(
    title=t.title,
    params=c.params,
    active_params=c.active_params,
    train_flops_per_token=c.train_flops_per_token,
    state_bytes=t.model.state_bytes(task.length),
    size_error=t.planned.size / target - 1,
    tried=tuple((r.rate, _score(r, task.metric)) for r in t.trials),
    rate=t.rate,
    at_edge=t.at_edge,
    scores=scores,
    estimate=mean,
    difference=difference,
    verdict=difference.verdict if difference else verdict,
    curve=_curve([r.folder for r in t.runs]),
    position_loss=positions and tuple(positions),
    runs=t.folder_names,
    better_than_bigram=ngrams.better(None if mean is None else mean.mean, task.ngrams),
    translation=translation and {name: estimate(v) for name, v in translation.items()},
  )


def _score(trial: Trial, metric: str) -> float | None:
  value = trial.metrics.get('eval/accuracy' if metric == 'accuracy' else 'eval/bits_per_byte')
  return None if value is None or trial.finite_loss is None else float(value)


def _curve(folders: Sequence[str]) -> tuple[tuple[int, float], ...]:
  """Return the mean training loss of runs at steps that all have logged, at most `CURVE_POINTS`,
  smoothed over neighbouring steps since the losses of single batches are noisy."""
  runs = [
    {
      r['tokens']: r['train/loss']
      for r in read_metrics(f)
      if None not in (r.get('tokens'), r.get('train/loss'))
    }
    for f in folders
  ]
  tokens = sorted(set.intersection(*(set(r) for r in runs))) if runs else []
  if not tokens:
    return ()
  mean = np.mean([[r[t] for t in tokens] for r in runs], axis=0)
  smooth = [float(np.mean(mean[max(0, i - 2) : i + 3])) for i in range(len(mean))]
  kept = sorted({round(i) for i in np.linspace(0, len(tokens) - 1, min(CURVE_POINTS, len(tokens)))})
  return tuple((int(tokens[i]), smooth[i]) for i in kept)


# ---- in words ----------------------------------------------------------------------------------


def score_form(metric: str, value: float | None, missing: str = 'none') -> str:
  """Format a score."""
  if value is None or math.isnan(value):
    return missing
  if metric == 'accuracy':
    return f'{100 * value:.1f}%'
  return f'{value:.2f}' if metric in ('BLEU', 'chrF') else f'{value:.3f}'


def cut_off(metric: str, e: Estimate, least: float = 0.0) -> tuple[float, float]:
  """Return the ends of an interval; of an accuracy they are cut off at `least` and 1."""
  if metric == 'accuracy' and math.isfinite(e.low):
    return max(least, e.low), min(1.0, e.high)
  return e.low, e.high


def interval_form(metric: str, e: Estimate | None) -> str:
  """Format a mean with its interval."""
  if e is None:
    return DIVERGED
  mean = score_form(metric, e.mean)
  if not math.isfinite(e.low):
    return f'{mean} (one seed)'
  if metric == 'accuracy':
    low, high = cut_off(metric, e)
    return f'{mean} ({100 * low:.1f} to {100 * high:.1f})'
  return f'{mean} ± {score_form(metric, e.half_width)}'


def _answer(task: TaskResults, results: Results) -> str:
  best, seeds = task.ranked[0], len(results.study.seeds)
  if best.estimate is None:
    return f'{task.title}: every run diverged.'
  parts = [
    f'{task.title}: {best.title} has the best mean, {interval_form(task.metric, best.estimate)} '
    f'{task.metric} over {seeds} seed{"s" if seeds > 1 else ""}.'
  ]
  if seeds < 2:
    return f'{parts[0]} With one seed no difference can be tested.'
  if task.against_best():
    parts.append(_near_best(task))
  words = {w: [o.title for o in task.ranked if o.verdict == w] for w in ('better', 'worse')}
  rest = [o.title for o in task.ranked if o.verdict is not None and o.verdict not in words]
  differ = [
    f'{_list(names)} {"is" if len(names) == 1 else "are"} significantly {word}'
    for word, names in words.items()
    if names
  ]
  if differ:
    others = f'; no significant difference for {_list(rest)}' if rest else ''
    parts.append(f'Compared with {results.baseline}, {"; ".join(differ)}{others}.')
  elif rest:
    parts.append(f'No architecture differs significantly from {results.baseline}.')
  return ' '.join(parts)


def _near_best(task: TaskResults) -> str:
  """Say which architectures do not differ significantly from the best, corrected for all pairs."""
  verdicts = task.against_best()
  near = [name for name, verdict in verdicts.items() if verdict != 'better']
  finished = '' if len(verdicts) == len(task.outcomes) - 1 else ' that finished all runs'
  if not near:
    return f'It is significantly better than every other architecture{finished}.'
  if len(near) == len(verdicts):
    return f'No other architecture{finished} differs significantly from it.'
  return f'Not significantly different from it: {_list(near)}.'


def _list(names: Sequence[str]) -> str:
  return names[0] if len(names) == 1 else f'{", ".join(names[:-1])} and {names[-1]}'
