"""A study's results as data: scores with intervals, verdicts, sizes, costs and curves. All four
forms of the report are made of this."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxformer import config
from jaxformer.planning.cost import cost
from jaxformer.study.costs import Costs
from jaxformer.study.runner import Finished, Trial, Tuned
from jaxformer.study.sizing import measure
from jaxformer.study.statistics import Difference, Estimate, compare, compare_all, estimate
from jaxformer.study.study import Study
from jaxformer.training import read_metrics

POINTS = 50  # of a curve
DIVERGED = 'diverged'
# architectures that are all compared to each other: of more, a table is no help, and hardly a pair
# could differ
MOST_PAIRED = 12


@dataclasses.dataclass(frozen=True)
class Outcome:
  """One architecture on one task.

  Attributes:
    title: of the entry.
    params, active_params, train_flops_per_token, state_bytes: of its model for this task, at the
    task's length.
    size_error: what is matched / target - 1.
    tried: (learning rate, score of the tuning seed), None for one that diverged; empty where
      nothing was tuned.
    rate: the best learning rate.
    at_edge: whether that lies at the end of what was tried.
    scores: seed -> score, None for a run whose numbers stopped being finite.
    estimate: over the seeds that came to an end; None where none did.
    difference: from the study's first entry, paired by seed; None for that one, and where a run of
      either diverged.
    verdict: in words; None for the first entry.
    curve: (tokens, training loss), the mean over seeds.
    position_loss: mean held-out loss at each position, nats; None for tasks with one target.
    runs: names of the run folders.
    translation: exact match (a fraction), BLEU and chrF over seeds; None for data that are no
      pairs.
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
  translation: dict[str, Estimate] | None = None


@dataclasses.dataclass(frozen=True)
class TaskResults:
  """All architectures on one task.

  Attributes:
    metric: 'bits per byte' or 'accuracy'.
    length: positions of a sequence.
    pairs: every architecture against every other, each pair once, from the best mean on; of those
      whose every run came to an end. Empty where there are fewer than three, whom the outcomes
      compare, or more than `MOST_PAIRED`.
  """

  title: str
  metric: str
  lower_is_better: bool
  length: int
  scored_on: str
  outcomes: tuple[Outcome, ...]
  pairs: tuple[Difference, ...] = ()

  @property
  def ranked(self) -> list[Outcome]:
    """From the best mean to the worst; those without one come last."""
    sign = 1 if self.lower_is_better else -1
    return sorted(
      self.outcomes, key=lambda o: math.inf if o.estimate is None else sign * o.estimate.mean
    )

  def against_best(self) -> dict[str, str]:
    """The verdict on each other architecture against the best, where all are compared to each other
    and it is among them."""
    return {d.against: d.verdict for d in self.pairs if d.name == self.ranked[0].title}


@dataclasses.dataclass(frozen=True)
class Results:
  """A finished study.

  Attributes:
    study: as data.
    reference: the entry that the others are compared to.
    tasks: what came of each.
    costs: by entry, at the length of the first task.
    environment: of the first run: command, versions, device, commit, and the data of each task.
  """

  study: Study
  reference: str
  tasks: tuple[TaskResults, ...]
  costs: dict[str, Costs]
  environment: dict[str, Any]

  @property
  def answer(self) -> list[str]:
    """A sentence or two a task: what is best, and which differences are real."""
    return [_answer(task, self.reference, self.study) for task in self.tasks]

  def to_json(self) -> dict[str, Any]:
    """JSON data; numbers that are not finite are null."""
    return plain(
      {
        'study': self.study.name,
        'answer': self.answer,
        'reference': self.reference,
        'tasks': [dataclasses.asdict(t) for t in self.tasks],
        'costs': {n: dataclasses.asdict(c) for n, c in self.costs.items()},
        'config': config.to_json(self.study),
        'digest': config.digest(self.study),
        'environment': self.environment,
      }
    )


def gather(
  done: Finished,
  costs: Mapping[str, Costs],
  positions: Mapping[tuple[str, str], Sequence[float | None] | None],
  environment: dict[str, Any],
  translations: Mapping[tuple[str, str], Mapping[str, Sequence[float]] | None] | None = None,
) -> Results:
  """The results of runs that are done. `positions` are the losses by position of (task, entry),
  `translations` the scores of their runs' translations by measure."""
  study, tasks = done.study, []
  for title, data in zip(study.task_titles, study.tasks, strict=True):
    found = done.results[title]
    in_bits = any('eval/bits_per_byte' in t.metrics for tuned in found for t in tuned.runs)
    scores = {t.title: {r.seed: _score(r, in_bits) for r in t.runs} for t in found}
    whole = _whole(scores, in_bits)
    first = found[0].title
    differences = (
      {d.name: d for d in compare(whole, first, lower_is_better=in_bits)} if first in whole else {}
    )
    pairs = compare_all(whole, lower_is_better=in_bits) if 2 < len(whole) <= MOST_PAIRED else ()
    source = next(
      (str(r.metrics['eval/source']) for t in found for r in t.runs if 'eval/source' in r.metrics),
      data.held_out,
    )
    outcomes = tuple(
      _outcome(
        study,
        t,
        data.positions,
        in_bits,
        scores[t.title],
        differences.get(t.title),
        positions.get((title, t.title)),
        (translations or {}).get((title, t.title)),
        first=t is found[0],
      )
      for t in found
    )
    metric = 'bits per byte' if in_bits else 'accuracy'
    tasks.append(
      TaskResults(title, metric, in_bits, data.positions, source, outcomes, tuple(pairs))
    )
  return Results(study, study.entries[0].title, tuple(tasks), dict(costs), environment)


def _score(trial: Trial, in_bits: bool) -> float | None:
  value = trial.metrics.get('eval/bits_per_byte' if in_bits else 'eval/accuracy')
  return float(value) if value is not None and math.isfinite(trial.loss) else None


def _whole(
  scores: Mapping[str, Mapping[int, float | None]], lower_is_better: bool
) -> dict[str, dict[int, float]]:
  """The scores of the entries whose every run came to an end, from the best mean on; leaving out
  the runs that diverged would flatter theirs."""
  whole = {
    title: {s: v for s, v in runs.items() if v is not None}
    for title, runs in scores.items()
    if None not in runs.values()
  }
  sign = 1 if lower_is_better else -1
  return dict(sorted(whole.items(), key=lambda item: sign * float(np.mean(list(item[1].values())))))


def _outcome(
  study: Study,
  t: Tuned,
  length: int,
  in_bits: bool,
  scores: dict[int, float | None],
  difference: Difference | None,
  positions: Sequence[float | None] | None,
  translation: Mapping[str, Sequence[float]] | None,
  first: bool,
) -> Outcome:
  c, finite = cost(t.model, length), [v for v in scores.values() if v is not None]
  state = t.model.state_size(length)
  without = DIVERGED if None in scores.values() else 'nothing to compare to'
  verdict = None if first else difference.verdict if difference else without
  return Outcome(
    t.title,
    c.params,
    c.active_params,
    c.train_flops_per_token,
    None if state is None else 2 * state,
    measure(t.model, study.match) / study.target - 1,
    tuple((r.rate, _score(r, in_bits)) for r in t.trials),
    t.rate,
    t.at_edge,
    scores,
    estimate(finite) if finite else None,
    difference,
    verdict,
    _curve([r.folder for r in t.runs]),
    None if positions is None else tuple(positions),
    tuple(Path(r.folder).name for r in t.runs),
    None
    if translation is None
    else {name: estimate(values) for name, values in translation.items()},
  )


def _curve(folders: Sequence[str]) -> tuple[tuple[int, float], ...]:
  """The mean training loss of runs where all have one, at most `POINTS` of them: each the mean of
  its neighbours' too, since the losses of single batches jump."""
  runs = [
    {r['tokens']: r['train/loss'] for r in read_metrics(f) if r.get('train/loss') is not None}
    for f in folders
  ]
  tokens = sorted(set.intersection(*(set(r) for r in runs))) if runs else []
  if not tokens:
    return ()
  mean = np.mean([[r[t] for t in tokens] for r in runs], axis=0)
  smooth = [float(np.mean(mean[max(0, i - 2) : i + 3])) for i in range(len(mean))]
  kept = sorted({round(i) for i in np.linspace(0, len(tokens) - 1, min(POINTS, len(tokens)))})
  return tuple((int(tokens[i]), smooth[i]) for i in kept)


# ---- in words ----------------------------------------------------------------------------------


def score_form(metric: str, value: float | None) -> str:
  """A score for a reader."""
  if value is None or math.isnan(value):
    return 'none'
  return (
    f'{100 * value:.1f}%'
    if metric == 'accuracy'
    else f'{value:.2f}'
    if metric in ('BLEU', 'chrF')
    else f'{value:.3f}'
  )


def interval_form(metric: str, e: Estimate | None) -> str:
  """A mean with its interval for a reader. Accuracies end at 0 and 1, and so do their intervals."""
  if e is None:
    return DIVERGED
  if not math.isfinite(e.low):
    return f'{score_form(metric, e.mean)} (one seed)'
  if metric == 'accuracy':
    return (
      f'{score_form(metric, e.mean)} ({100 * max(0.0, e.low):.1f} to {100 * min(1.0, e.high):.1f})'
    )
  return f'{score_form(metric, e.mean)} ± {score_form(metric, e.half_width)}'


def _answer(task: TaskResults, reference: str, study: Study) -> str:
  best = task.ranked[0]
  if best.estimate is None:
    return f'{task.title}: every run diverged.'
  seeds = f'{len(study.seeds)} seeds' if len(study.seeds) > 1 else 'one seed'
  said = [
    f'{task.title}: {best.title} has the best mean, {interval_form(task.metric, best.estimate)}'
    f'{" " + task.metric} over {seeds}.'
  ]
  words = {w: [o.title for o in task.ranked if o.verdict == w] for w in ('better', 'worse')}
  rest = [o.title for o in task.ranked if o.verdict is not None and o.verdict not in words]
  parts = [
    f'{_list(names)} {"is" if len(names) == 1 else "are"} {word}'
    for word, names in words.items()
    if names
  ]
  if len(study.seeds) < 2:
    said.append('One seed tells no difference from chance.')
    return ' '.join(said)
  if task.against_best():
    said.append(_near_best(task))
  if parts:
    said.append(
      f'Against {reference}, {"; ".join(parts)}'
      + (f'; no difference is shown for {_list(rest)}.' if rest else '.')
    )
  elif rest:
    said.append(f'No difference from {reference} is seen at this budget.')
  return ' '.join(said)


def _near_best(task: TaskResults) -> str:
  """Which are not told apart from the best, when all pairs are accounted for."""
  verdicts = task.against_best()
  near = [name for name, verdict in verdicts.items() if verdict != 'better']
  ended = '' if len(verdicts) == len(task.outcomes) - 1 else ' whose runs all came to an end'
  if not near:
    return f'It is better than every other{ended}.'
  return (
    f'No other{ended} is told apart from it.'
    if len(near) == len(verdicts)
    else f'Not told apart from it: {_list(near)}.'
  )


def _list(names: Sequence[str]) -> str:
  return names[0] if len(names) == 1 else f'{", ".join(names[:-1])} and {names[-1]}'


def plain(value: Any) -> Any:
  """JSON data without infinities."""
  if isinstance(value, dict):
    return {str(k): plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [plain(v) for v in value]
  if isinstance(value, float | np.floating):
    return float(value) if math.isfinite(value) else None
  return int(value) if isinstance(value, np.integer) else value
