"""What the claims about mixers, interleaving and experts rest on: stacks of one shape and equal
size, and verdicts that follow from the intervals."""

import dataclasses
import importlib
import pathlib
import sys

import pytest

from jaxformer.config import InputError
from jaxformer.models.params import define
from jaxformer.study.costs import Costs
from jaxformer.study.results import Outcome, Results, TaskResults
from jaxformer.study.statistics import compare, estimate

CLAIMS = str(pathlib.Path(__file__).parents[2] / 'experiments' / 'claims')
sys.path.insert(0, CLAIMS)  # as when a claim is run
mixers, hybrid_recall, mixers_compared, overwriting, sparse_experts = (
  importlib.import_module(n)
  for n in ('mixers', 'hybrid_recall', 'mixers_compared', 'overwriting', 'sparse_experts')
)
interleaving, three_to_one, latent_cache, many_experts = (
  importlib.import_module(n)
  for n in ('interleaving', 'three_to_one', 'latent_cache', 'many_experts')
)
sys.path.remove(CLAIMS)

pytestmark = pytest.mark.quick

NEAR_ONE, HALF, HIGH = (0.99, 0.995, 0.998), (0.5, 0.52, 0.47), (0.97, 0.99, 0.9)


def outcomes(
  first: str, scores: dict[str, tuple[float, ...]], lower_is_better: bool = False
) -> tuple[Outcome, ...]:
  """What a study's report would hold of these scores of seeds 1, 2, 3."""
  seeds = {name: dict(enumerate(found, 1)) for name, found in scores.items()}
  differences = {d.name: d for d in compare(seeds, first, lower_is_better=lower_is_better)}
  return tuple(
    Outcome(
      name,
      1,
      1,
      1.0,
      1,
      0.0,
      (),
      0.01,
      False,
      seeds[name],
      estimate(found),
      differences.get(name),
      differences[name].verdict if name in differences else None,
      (),
      None,
      (),
    )
    for name, found in scores.items()
  )


def task(first: str, scores: dict[str, tuple[float, ...]]) -> TaskResults:
  return TaskResults('T', 'accuracy', 32, 'tests', outcomes(first, scores))


@pytest.mark.parametrize(
  ('claim', 'data', 'layers'),
  [
    (hybrid_recall, hybrid_recall.TASK, 4),
    (overwriting, overwriting.CHANGING, 2),
    (three_to_one, three_to_one.TASK, 4),
  ],
)
def test_stacks_of_one_shape_have_equal_size(claim, data, layers):
  study = claim.study(1.0, 'runs')
  for entry in study.entries:
    # as a study calls it
    model = entry.model(study, data.task.vocab_size, data.positions, None)
    assert (model.width, sum(len(g.pattern) * g.repeats for g in model.stack)) == (
      claim.WIDTH,
      layers,
    )
    assert define(model).active_size == pytest.approx(study.target, rel=study.tolerance)


def test_models_with_latents_and_grouped_queries_have_equal_size():
  study = latent_cache.study(1.0, 'runs')
  sizes = [
    define(entry.model(study, latent_cache.VOCABULARY, latent_cache.LENGTH)).size
    for entry in study.entries
  ]
  assert sizes == pytest.approx([study.target] * 3, rel=study.tolerance)


def test_a_size_that_the_width_does_not_allow_is_refused():
  study = hybrid_recall.study(1.0, 'runs').replace(target=1e6)
  with pytest.raises(InputError, match='width'):
    study.entries[0].model(study, 64, 64)


@pytest.mark.parametrize(
  ('scores', 'expected'), [(NEAR_ONE, 'solved'), (HALF, 'not solved'), (HIGH, 'undecided')]
)
def test_what_it_is_to_solve_a_task(scores, expected):
  (outcome,) = outcomes('a', {'a': scores})
  assert mixers.solved(outcome) == expected


def test_a_run_that_diverged_solves_nothing():
  (outcome,) = outcomes('a', {'a': NEAR_ONE})
  assert (
    mixers.solved(dataclasses.replace(outcome, scores={**outcome.scores, 4: None})) == 'not solved'
  )


def test_the_parts_of_the_claim_about_four_mixers():
  scores = {'S4D': HALF, 'H3': NEAR_ONE, 'Mamba': NEAR_ONE, 'attention': NEAR_ONE}
  tasks = {
    'memory': task('S4D', {'S4D': NEAR_ONE, 'attention': NEAR_ONE, 'LSTM': HALF}),
    'recall': task('S4D', scores),
    'selection': task('S4D', scores),
  }
  flops = {name: [1.0, 4.0 if name == 'attention' else 2.0] for name in scores}
  assert mixers_compared.decide(tasks, flops)[0] == 'supported'
  weak = tasks | {'recall': task('S4D', scores | {'H3': HIGH})}
  assert mixers_compared.decide(weak, flops)[0] == 'partly supported'
  assert not mixers_compared.parts(tasks, flops | {'attention': [1.0, 2.0]})['at a quadratic price']


@pytest.mark.parametrize(
  ('hybrid', 'mamba', 'expected'),
  [
    (NEAR_ONE, HALF, 'supported'),
    (NEAR_ONE, NEAR_ONE, 'partly supported'),
    (HALF, HALF, 'contradicted'),
    (HIGH, HALF, 'not supported'),
  ],
)
def test_the_verdict_on_interleaving(hybrid, mamba, expected):
  found = task('attention', {'attention': NEAR_ONE, 'Mamba': mamba, 'hybrid': hybrid})
  assert hybrid_recall.decide(found, caches('Mamba', 101))[0] == expected


def caches(recurrent: str, hybrid: int) -> dict[str, list[int]]:
  sizes = {'attention': 400, recurrent: 1, 'hybrid': hybrid}
  return {name: [size] * len(interleaving.CONTEXTS) for name, size in sizes.items()}


@pytest.mark.parametrize(
  ('hybrid', 'delta', 'size', 'expected'),
  [
    (NEAR_ONE, HALF, 101, 'supported'),
    (NEAR_ONE, NEAR_ONE, 101, 'partly supported'),
    (NEAR_ONE, HALF, 120, 'contradicted'),  # of 400 bytes, more than a quarter
    (HALF, HALF, 101, 'contradicted'),
  ],
)
def test_the_verdict_on_three_to_one(hybrid, delta, size, expected):
  scores = {'attention': NEAR_ONE, 'Gated DeltaNet': delta, 'hybrid': hybrid}
  found, cache = task('attention', scores), caches('Gated DeltaNet', size)
  verdict, because = three_to_one.decide(found, cache)
  assert verdict == expected
  # 12 of 48 layers with keys and values of 2 x 256 numbers at 262,144 positions, and 36 states
  assert '6.52 GB, with attention in every layer 25.8 GB' in because
  assert [row[0] for row in interleaving.rows(found, cache)] == list(scores)


def test_state_of_three_to_one_is_a_quarter_and_a_constant():
  sizes = three_to_one.caches(three_to_one.study(1.0, 'runs'))
  rest = {h - a / 4 for h, a in zip(sizes['hybrid'], sizes['attention'], strict=True)}
  assert rest == {0.75 * sizes['Gated DeltaNet'][0]}
  assert len(set(sizes['Gated DeltaNet'])) == 1


GROUPED, FEWER = (2.5, 2.52, 2.49), (2.6, 2.63, 2.6)


@pytest.mark.parametrize(
  ('latent', 'fewer', 'expected'),
  [
    ((2.5, 2.521, 2.489), FEWER, 'supported'),
    ((2.5, 2.521, 2.489), GROUPED, 'partly supported'),
    ((2.6, 2.4, 2.5), FEWER, 'not supported'),
    ((2.6, 2.62, 2.59), FEWER, 'contradicted'),
  ],
)
def test_the_verdict_on_latents(latent, fewer, expected):
  full, short, few = latent_cache.MIXERS
  scores = {full: GROUPED, short: latent, few: fewer}
  found = TaskResults('T', 'bits per byte', 128, 'tests', outcomes(full, scores, True))
  cache = latent_cache.caches(latent_cache.study(1.0, 'runs'))
  verdict, because = latent_cache.decide(found, cache)
  assert verdict == expected
  # per layer keys and values of 4 heads of 8, a latent of 24 and a key of 8, and two heads of 8
  assert list(cache.values()) == [2 * 2 * 2 * 32, 2 * 2 * 32, 2 * 2 * 2 * 16]
  assert 'DeepSeek-V2: 69.1 kB per position, with 8 groups of queries 246 kB' in because
  assert [row[0] for row in latent_cache.rows(found, cache)] == list(scores)


@pytest.mark.parametrize(
  ('decaying', 'constant', 'expected'),
  [
    ({'GLA': HALF, 'Mamba-2': HALF}, NEAR_ONE, 'supported'),
    ({'GLA': HALF, 'Mamba-2': NEAR_ONE}, NEAR_ONE, 'partly supported'),
    ({'GLA': NEAR_ONE, 'Mamba-2': NEAR_ONE}, NEAR_ONE, 'not supported'),
    # as far behind where there is nothing to overwrite
    ({'GLA': HALF, 'Mamba-2': HALF}, HALF, 'not supported'),
  ],
)
def test_the_verdict_on_overwriting(decaying, constant, expected):
  deltas = {'DeltaNet': NEAR_ONE, 'Gated DeltaNet': NEAR_ONE}
  changing = task('GLA', decaying | deltas)
  staying = task('GLA', dict.fromkeys(decaying, constant) | deltas)
  assert overwriting.decide(changing, staying)[0] == expected
  assert [row[0] for row in overwriting.rows(changing, staying)] == [*decaying, *deltas]


def test_the_delta_rule_may_be_worse():
  scores = {'GLA': NEAR_ONE, 'Mamba-2': NEAR_ONE, 'DeltaNet': NEAR_ONE, 'Gated DeltaNet': HALF}
  found = task('GLA', scores)
  assert overwriting.decide(found, found)[0] == 'contradicted'


@pytest.mark.parametrize(
  ('mixture', 'flops', 'expected'),
  [
    ((2.4, 2.43, 2.41), 1.02, 'supported'),
    ((2.4, 2.43, 2.41), 1.2, 'partly supported'),
    ((2.4, 2.6, 2.5), 1.2, 'not supported'),
    ((2.6, 2.63, 2.61), 1.02, 'contradicted'),
  ],
)
def test_the_verdict_on_sparse_experts(mixture, flops, expected):
  scores = {'dense': (2.5, 2.52, 2.49), 'mixture': mixture}
  found = TaskResults('T', 'bits per byte', 128, 'tests', outcomes('dense', scores, True))
  dense, mixed = found.outcomes
  mixed = dataclasses.replace(mixed, params=4, train_flops_per_token=flops)
  found = dataclasses.replace(found, outcomes=(dense, mixed))
  costs = {'dense': Costs(100.0, 1.0, 1, ()), 'mixture': Costs(80.0, 1.0, 1, ())}
  verdict, because = sparse_experts.decide(
    Results(sparse_experts.study(1.0, 'runs'), (found,), costs, {}), [1.2, 1.4]
  )
  assert verdict == expected
  assert '1.25 times as long' in because


@pytest.mark.parametrize(
  ('many', 'params', 'expected'),
  [
    ((2.4, 2.43, 2.41), 1, 'supported'),
    ((2.4, 2.43, 2.41), 2, 'not supported'),
    ((2.4, 2.6, 2.5), 1, 'not supported'),
    ((2.6, 2.63, 2.61), 1, 'contradicted'),
  ],
)
def test_the_verdict_on_many_experts(many, params, expected):
  few, small = many_experts.MODELS
  scores = {few: (2.5, 2.52, 2.49), small: many}
  found = TaskResults('T', 'bits per byte', 128, 'tests', outcomes(few, scores, True))
  first, second = found.outcomes
  found = dataclasses.replace(found, outcomes=(first, dataclasses.replace(second, params=params)))
  results = Results(many_experts.study(1.0, 'runs'), (found,), {}, {})
  assert many_experts.decide(results, {few: [1.2], small: [1.4]})[0] == expected


def test_many_experts_and_few_have_equal_size():
  few, many = many_experts.MODELS.values()
  for size in ('size', 'active_size'):
    assert getattr(define(many), size) == pytest.approx(
      getattr(define(few), size), rel=many_experts.CLOSE
    )
