"""Scores of translations: BLEU and chrF by sacrebleu and exact matches, in total and by source
length.

BLEU (Papineni et al. 2002) and chrF (Popovic 2015) are computed on detokenized text (Post 2018) and
reported with sacrebleu's signature. sacrebleu is part of the extra `translation`; without it there
are only exact matches."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxformer.config import InputError
from jaxformer.data import Dataset, HeldOutPair, Tokenizer
from jaxformer.inference import translate
from jaxformer.models.params import Definition, Params

BOOTSTRAP = 1000
GROUPS = 4


@dataclasses.dataclass(frozen=True)
class Score:
  """
  Attributes:
    value: 0 to 100.
    interval: half-width of the 95% bootstrap interval (Koehn 2004); None without a bootstrap.
    signature: sacrebleu's, without which scores cannot be compared.
  """

  value: float
  interval: float | None
  signature: str


@dataclasses.dataclass(frozen=True)
class TranslationScores:
  """Scores of some translations.

  Attributes:
    pairs: translations scored.
    exact: those equal to the reference.
    metrics: BLEU and chrF by name; empty where sacrebleu is not installed.
  """

  pairs: int
  exact: int
  metrics: dict[str, Score]

  @property
  def exact_match(self) -> float:
    """The fraction of translations that equal the reference."""
    return self.exact / self.pairs

  def json(self) -> dict[str, Any]:
    value = {'pairs': self.pairs, 'exact_match': self.exact_match, 'bleu': None, 'chrf': None}
    return value | {name.lower(): dataclasses.asdict(s) for name, s in self.metrics.items()}


@dataclasses.dataclass(frozen=True)
class TranslationResult:
  """
  Attributes:
    scores: over all pairs.
    by_length: by (least, greatest) length of the sources of a group in tokens, without the end of
      the document, in ascending order and without empty groups.
    hypotheses: the translations, in the order of the pairs.
  """

  scores: TranslationScores
  by_length: dict[tuple[int, int], TranslationScores]
  hypotheses: list[str]

  def json(self) -> dict[str, Any]:
    """The scores as JSON data."""
    groups = [
      {'shortest': shortest, 'longest': longest} | scores.json()
      for (shortest, longest), scores in self.by_length.items()
    ]
    return self.scores.json() | {'by_source_length': groups}

  def lines(self) -> list[str]:
    """The scores for a reader, followed by the signatures."""
    out = [f'{self.scores.pairs:,} translations: {_line(self.scores)}']
    out += [
      f'  source of {shortest} to {longest} tokens ({scores.pairs:,}): {_line(scores)}'
      for (shortest, longest), scores in self.by_length.items()
    ]
    signatures = [f'  {name} {s.signature}' for name, s in self.scores.metrics.items()]
    return out + (
      signatures
      or ["  BLEU and chrF need the package 'sacrebleu': pip install 'jaxformer[translation]'"]
    )


def _line(scores: TranslationScores) -> str:
  parts = [f'exact match {scores.exact_match:.2%}']
  for name, score in scores.metrics.items():
    interval = '' if score.interval is None else f' ± {score.interval:.2f}'
    parts.append(f'{name} {score.value:.2f}{interval}')
  return ', '.join(parts)


def evaluate_translation(
  translations: Sequence[Sequence[int]],
  pairs: Sequence[HeldOutPair],
  tokenizer: Tokenizer,
  *,
  edges: Sequence[int] | None = None,
  bootstrap: int | None = BOOTSTRAP,
) -> TranslationResult:
  """Score the translations of the sources of `pairs`.

  Args:
    translations: token ids; what follows the end of a document is ignored.
    pairs: from `Dataset.held_out_pairs`.
    tokenizer: of the translations.
    edges: ascending source lengths, the inclusive upper limits of the groups; longer sources are
      the last group. None for four groups of about equal size.
    bootstrap: resamples for the interval of the scores over all pairs; None for no interval.
  """
  if not pairs:
    raise InputError('translation: no pairs to score')
  if len(translations) != len(pairs):
    raise ValueError(f'there are {len(translations)} translations of {len(pairs)} texts')
  end = tokenizer.end_of_document
  hypotheses = [
    tokenizer.decode(list(itertools.takewhile(lambda token: token != end, ids)))
    for ids in translations
  ]
  references = [p.reference for p in pairs]
  lengths = np.array([len(p.source_ids) - 1 for p in pairs])
  return TranslationResult(
    score(hypotheses, references, bootstrap),
    by_length(hypotheses, references, lengths, edges),
    hypotheses,
  )


def translate_held_out(
  definition: Definition,
  params: Params,
  dataset: Dataset,
  limit: int,
  *,
  bootstrap: int | None = BOOTSTRAP,
  **options: Any,
) -> TranslationResult:
  """Score greedy translations of at most `limit` held-out sources. `options` are those of
  `inference.translate`."""
  pairs, tokenizer = dataset.held_out_pairs(limit), dataset.tokenizer
  assert tokenizer is not None, 'pairs are text'
  end = tokenizer.end_of_document
  assert end is not None, 'pairs end with a token'
  decoding: dict[str, Any] = {'end': end, **options}
  found = translate(
    definition, params, [p.source_ids for p in pairs], vocab_size=dataset.vocab_size, **decoding
  )
  return evaluate_translation([t.tokens for t in found], pairs, tokenizer, bootstrap=bootstrap)


def by_length(
  hypotheses: Sequence[str],
  references: Sequence[str],
  lengths: Sequence[int] | np.ndarray,
  edges: Sequence[int] | None = None,
) -> dict[tuple[int, int], TranslationScores]:
  """Score groups by source length, without intervals; `edges` as for `evaluate_translation`."""
  lengths = np.asarray(lengths)
  if edges is None:
    edges = np.unique(np.quantile(lengths, np.arange(1, GROUPS) / GROUPS, method='lower')).tolist()
  if list(edges) != sorted(set(edges)):
    raise InputError('edges', list(edges), 'ascending')
  group = np.searchsorted(edges, lengths)
  out = {}
  for g in np.unique(group):
    mine = np.flatnonzero(group == g)
    between = int(lengths[mine].min()), int(lengths[mine].max())
    out[between] = score([hypotheses[i] for i in mine], [references[i] for i in mine])
  return out


def score(
  hypotheses: Sequence[str], references: Sequence[str], bootstrap: int | None = None
) -> TranslationScores:
  """Score translations against one reference each. Raises `InputError` for unequal or zero
  counts."""
  if not hypotheses or len(hypotheses) != len(references):
    raise InputError(
      f'translation: {len(hypotheses)} translations and {len(references)} references: must be as '
      'many of both, at least one'
    )
  if bootstrap is not None and bootstrap < 2:
    raise InputError('bootstrap', bootstrap, 'at least 2, or none')
  exact = sum(h == r for h, r in zip(hypotheses, references, strict=True))
  try:
    from sacrebleu.metrics import BLEU, CHRF
  except ImportError:
    return TranslationScores(len(hypotheses), exact, {})
  # `force` only silences the warning about text that appears to be tokenized.
  metrics = {
    name: _scored(metric, hypotheses, references, bootstrap)
    for name, metric in (('BLEU', BLEU(force=True)), ('chrF', CHRF()))
  }
  return TranslationScores(len(hypotheses), exact, metrics)


def _scored(
  metric: Any, hypotheses: Sequence[str], references: Sequence[str], bootstrap: int | None
) -> Score:
  found = metric.corpus_score(list(hypotheses), [list(references)], n_bootstrap=bootstrap or 1)
  signature = str(metric.get_signature())
  facts = json.loads(found.format(width=6, signature=signature, is_json=True))
  # sacrebleu states no interval where all resamples score 0.
  return Score(
    found.score, None if bootstrap is None else facts.get('confidence_var', 0.0), signature
  )
