"""Unigram and bigram models of the training text beside the scores of a study: an architecture that
predicts no better than a bigram model has learned too little to be compared."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

ORDERS = ('unigram', 'bigram')
BIGRAM = 'bigram model of the training text'


def scores_of_ngrams(
  metric: str, data: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
  """Return the scores of the models of bytes (`data.baselines`) on the held-out text, by order, in
  the unit of a metric; {} where there are none, as for data other than text.

  Args:
    data: what is recorded about the data (`Dataset.manifest`).
    runs: latest metrics of runs on these data, from which nats per target follow: all have the same
      targets, and so the same number of bytes per target.
  """
  bits = {n: float(data[key]) for n in ORDERS if (key := f'{n}_bits_per_byte') in data}
  if metric == 'bits per byte':
    return bits
  scores = ((m.get('eval/loss'), m.get('eval/bits_per_byte')) for m in runs)
  nats_per_bit = next((loss / b for loss, b in scores if loss and b and math.isfinite(loss)), None)
  if metric != 'nats per target' or nats_per_bit is None:
    return {}
  return {n: v * nats_per_bit for n, v in bits.items()}


def better(score: float | None, ngrams: Mapping[str, float]) -> bool | None:
  """Return whether a score, of which less is better, is better than that of the bigram model; None
  where either is unknown."""
  if score is None or 'bigram' not in ngrams:
    return None
  return score < ngrams['bigram']


def none_better(ngrams: Mapping[str, float], metric: str, task: str | None) -> str:
  """Say that no architecture is better than the bigram model, on a task if there are several."""
  return (
    f'{"" if task is None else f"{task}: "}No architecture predicts better than a {BIGRAM} '
    f'({ngrams["bigram"]:.3f} {metric}): train longer before comparing.'
  )


def in_words(
  ngrams: Mapping[str, float], metric: str, task: str | None, not_better: Sequence[str]
) -> str:
  """State the scores of the models, and which architectures, or how many trainings, are not better
  than the bigram model."""
  line = (
    f'{"" if task is None else f"{task}: "}For comparison, a {BIGRAM} has {ngrams["bigram"]:.3f} '
    f'{metric} on all held-out text, a unigram model {ngrams["unigram"]:.3f}.'
  )
  return line + (
    f' Not better than the bigram model: {", ".join(not_better)}.' if not_better else ''
  )
