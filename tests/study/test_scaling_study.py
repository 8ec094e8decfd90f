"""Scaling studies: planning, learning rates, laws and predictions of invented losses, and one study
end to end."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest

from jaxformer.cli import main
from jaxformer.config import InputError
from jaxformer.data import AssociativeRecall, Dates
from jaxformer.models.zoo import FAMILIES
from jaxformer.study.law_report import predictions
from jaxformer.study.report import csv_text
from jaxformer.study.results import gather
from jaxformer.study.runner import Planned, Runner, Trial, Tuned, run_study
from jaxformer.study.scaling import Law
from jaxformer.study.sharing import Interrupted
from jaxformer.study.studies import STUDIES
from jaxformer.study.study import Budget, FixedModel, ScaledFamily, ScalingGrid, Study, budgets
from jaxformer.training import AdamW
from jaxformer.training.interrupt import Interrupt
from tests.study.test_report import ENVIRONMENT, Page, html_text, markdown_text
from tests.tiers import thorough

quick = pytest.mark.quick
LAW, K, POWER = Law(E=1.2, A=40.0, B=120.0, alpha=0.4, beta=0.35), 9.0, 0.96
TASK = AssociativeRecall(length=6, test_sequences=64)


def study(**changes):
  all_budgets = budgets((3e8, 1.2e9, 4.8e9, 3.6e10), (600, 1200, 2400, 4800))
  held_out = (all_budgets[3].replace(params=all_budgets[3].params[1:3]),)
  grid = {'budgets': all_budgets[:3], 'held_out': held_out, 'bootstrap': 40}
  of_grid = {n: changes.pop(n) for n in list(changes) if n in ScalingGrid.__dataclass_fields__}
  return Study(
    **{
      'name': 'invented',
      'entries': (ScaledFamily(family='gru', name='GRU-2014'),),
      'tasks': (TASK,),
      'batch_size': 8,
      'learning_rates': (1e-3, 3e-3),
      'seeds': (1,),
      'scaling': ScalingGrid(**grid | of_grid),
    }
    | changes
  )


def invented(noise=0.003, diverged=(), s=None, ngrams=None):
  """Trainings whose losses are those of `LAW` but for noise; those whose place is among `diverged`
  are none. `ngrams` are bits per byte of such models of a text with 1.5 bytes per target."""
  s, rng, scaled = s or study(), np.random.default_rng(3), []
  model = FAMILIES['gru'].make(width=8, layers=1, vocab_size=10, context_length=8)
  for b in (*s.scaling.budgets, *s.scaling.held_out):
    for n in b.params:
      tokens = round(b.flops / K / n**POWER)
      loss = float(LAW.loss(n, tokens)) * np.exp(noise * rng.normal())
      if len(scaled) in diverged:
        loss = np.inf
      held_out = b.flops > s.scaling.budgets[-1].flops
      run = Trial(
        3e-3,
        1,
        f'runs/invented/{len(scaled)}',
        loss,
        {'eval/loss': loss, 'eval/source': 'recall test'}
        | ({'eval/bits_per_byte': loss / 1.5 / np.log(2)} if ngrams else {}),
      )
      planned = Planned(
        s.at(n, max(tokens, 64)),
        s.entries[0],
        TASK,
        model,
        n,
        '',
        b.flops,
        K * n**POWER,
        held_out,
        0.1,
      )
      scaled.append(Tuned(planned, (), 3e-3, False, (run,)))
  facts = {f'{n}_bits_per_byte': v for n, v in (ngrams or {}).items()}
  environment = ENVIRONMENT | {'data': {s.task_titles[0]: facts}}
  return gather(s, {s.task_titles[0]: tuple(scaled)}, {}, {}, environment)


def law(results):
  """The one law of the invented study."""
  (f,) = results.tasks[0].laws
  return f


@quick
def test_the_law_is_found_again():
  f = law(invented())
  for name, i in f.coefficients.items():
    assert i.low <= getattr(LAW, name) <= i.high
    assert i.low < i.value < i.high
  assert f.flops_law == pytest.approx((K, POWER))
  assert f.runs == 12
  assert f.explained > 0.99
  assert f.residual == pytest.approx(0.003, rel=0.7)
  assert f.exponent.low <= LAW.exponent(POWER) <= f.exponent.high
  for o in f.optima:
    best = LAW.optimal(o.flops, K, POWER)[0]
    assert o.params.low <= best <= o.params.high
    assert o.parabola is None or (
      o.parabola.inside and o.parabola.params == pytest.approx(best, rel=0.3)
    )
  assert [o.parabola is None for o in f.optima] == [False, False, False, True]
  assert [p.within_interval for p in f.held_out] == [True, True]
  assert all(
    p.predicted.value == pytest.approx(LAW.loss(p.params, p.tokens), rel=0.02) for p in f.held_out
  )


@quick
def test_observations_outside_the_interval():
  results = invented()
  f = law(results)
  for p in f.held_out:
    assert f'predicted {p.predicted.value:.3f}' in results.answer[0]
    assert f'observed {p.loss:.3f}, within the interval' in results.answer[0]
    assert dataclasses.replace(p, loss=None).within_interval is None
  beyond = tuple(dataclasses.replace(p, loss=2 * p.loss) if p.held_out else p for p in f.trainings)
  task = dataclasses.replace(results.tasks[0], laws=(dataclasses.replace(f, trainings=beyond),))
  found = dataclasses.replace(results, tasks=(task,))
  assert found.answer[0].count('outside the interval, relative error +9') == 2
  (table,) = predictions(found)
  assert [row[-2:] for row in table.rows] == [
    (f'{p.loss / p.predicted.value - 1:+.1%}', 'no') for p in beyond[-2:]
  ]


@quick
def test_models_of_bytes_stand_beside_the_losses_in_nats(monkeypatch):
  monkeypatch.setattr('jaxformer.study.report.law_figures', lambda results: [])

  def with_bigram(nats):
    return invented(ngrams={'unigram': 9.0, 'bigram': nats / 1.5 / np.log(2)}, diverged=(0,))

  losses = [t.loss for t in law(invented(diverged=(0,))).trainings if t.loss is not None]
  middle = float(np.median(losses))
  some, none = with_bigram(middle), with_bigram(1.0)
  assert some.tasks[0].ngrams['bigram'] == pytest.approx(middle)
  assert some.tasks[0].ngrams['unigram'] == pytest.approx(9 * 1.5 * np.log(2))
  marks = [t.better_than_bigram for t in law(some).trainings]
  assert marks == [None if t.loss is None else t.loss < middle for t in law(some).trainings]
  assert some.answer[-1].endswith(
    f'Not better than the bigram model: {marks.count(False)} of 14 trainings of GRU-2014.'
  )
  assert f'{middle:.3f} nats per target' in some.answer[-1]
  rows = Page(html_text(some)).rows
  start = next(i for i, row in enumerate(rows) if 'better than bigram' in row)
  shown = [row[rows[start].index('better than bigram')] for row in rows[start + 1 : start + 15]]
  assert shown == [{True: 'yes', False: 'no', None: ''}[m] for m in marks]
  assert none.answer[0] == (
    'No architecture predicts better than a bigram model of the training text (1.000 nats per '
    'target): train longer before comparing.'
  )
  assert none.json()['answer'][1].startswith('GRU-2014: ')


@quick
def test_runs_that_diverged_take_no_part():
  results = invented(diverged=(0, 12))
  f = law(results)
  assert (f.runs, f.trainings[0].loss, f.trainings[12].within_interval) == (11, None, None)
  assert 'diverged' in results.answer[0]
  assert markdown_text(results).count('diverged') >= 3
  none = invented(diverged=range(9))
  assert 'no law (five coefficients need at least 6 runs; there are 3)' in none.answer[0]
  assert law(none).no_parabola['3e+08'] == 'a parabola needs at least 3 sizes; there are 0'
  Page(html_text(none))


@quick
def test_all_forms_agree():
  results = invented()
  page, markdown = Page(html_text(results)), markdown_text(results)
  data = json.loads(json.dumps(results.json()), parse_constant=lambda c: pytest.fail(c))
  rows = list(csv.DictReader(io.StringIO(csv_text(results))))
  points = data['tasks'][0]['laws'][0]['trainings']
  assert len(rows) == len(points) == 14
  assert page.fetched == []
  for row, p in zip(rows, points, strict=True):
    assert float(row['loss']) == p['loss']
    assert float(row['predicted_low']) == p['predicted']['low']
    assert (row['held_out'], row['within_interval']) == (
      str(p['held_out']),
      str(p['within_interval']),
    )
    assert any(f'{p["params"]:,.0f}' in r and f'{p["loss"]:.3f}' in r for r in page.rows)
    assert f' {p["loss"]:.3f} |' in markdown
  assert data['answer'][0] in markdown
  assert 'GRU-2014' in markdown
  assert data['digest'] in markdown


# ---- what is planned ---------------------------------------------------------------------------


@pytest.fixture
def tried(monkeypatch, tmp_path):
  """What would be trained: (FLOPs, tokens, rates) of each, in order; the second rate is always the
  best."""
  found = []

  def tuned(self, p, rates):
    found.append((p.study.target, p.study.tokens, rates))
    return Tuned(
      p, (), rates[-1], False, tuple(Trial(1e-3, i, 'run', 1.0, {}) for i in p.study.seeds)
    )

  monkeypatch.chdir(tmp_path)  # locks are files there
  monkeypatch.setattr(Runner, 'tuned', tuned)
  return found


@quick
def test_tokens_make_up_the_budget(tried):
  (done,) = run_study(study(tolerance=0.5), lambda line: None, Interrupt()).values()
  for p in [t.planned for t in done]:
    batch = 8 * TASK.positions
    assert p.study.tokens % batch == 0
    assert abs(p.study.tokens * p.flops_per_token - p.flops) <= batch * p.flops_per_token / 2
    assert p.size == pytest.approx(p.study.target, rel=0.5)
  assert [t.planned.held_out for t in done] == [False] * 12 + [True] * 2


@quick
def test_rates(tried):
  run_study(study(tolerance=0.5, rate_exponent=None), lambda line: None, Interrupt())
  assert {rates for _, _, rates in tried} == {(1e-3, 3e-3)}
  assert len(tried) == 14
  tried.clear()
  run_study(study(tolerance=0.5, rate_exponent=-0.5), lambda line: None, Interrupt())
  assert tried[0][2] == (1e-3, 3e-3)  # the middle of the least budget, and nothing else
  assert tried[0][0] == 2400
  by_rates = [rates for _, _, rates in tried[1:]]
  assert (
    by_rates
    == [(3e-3,)] * 3
    + [(1.5e-3,)] * 4
    + [(7.5e-4,)] * 4
    + [(pytest.approx(3e-3 / 120**0.5, rel=0.01),)] * 2
  )


@quick
@pytest.mark.parametrize(
  ('changes', 'parts'),
  [
    ({'entries': ()}, ['Study.entries', 'at least one']),
    (
      {
        'entries': (
          FixedModel(
            model_config=FAMILIES['gru'].make(width=8, layers=1, vocab_size=10, context_length=8)
          ),
        )
      },
      ['Study.entries', 'one size'],
    ),
    ({'budgets': budgets((1e7,), (1e3, 2e3, 4e3))}, ['ScalingGrid.budgets', 'at least two']),
    (
      {'budgets': budgets((4e7, 1e7), (1e3, 2e3, 4e3))},
      ['ScalingGrid.budgets', '4e+07, 1e+07', 'ascending'],
    ),
    (
      {'budgets': budgets((1e7, 4e7), (1e3, 2e3))},
      ['ScalingGrid.budgets', '2 sizes', 'at least 3'],
    ),
    ({'held_out': budgets((1e9,), (1e3,))}, ['ScalingGrid.held_out', '1e+09', 'more than 4.8e+09']),
    ({'learning_rates': (3e-3, 1e-3)}, ['Study.learning_rates', 'ascending']),
    (
      {'optimizer': AdamW(learning_rate=0.5)},
      ['Study.optimizer.learning_rate = 0.5: has no effect', 'learning_rates'],
    ),
    ({'seeds': (0,)}, ['Study.tuning_seed']),
    ({'bootstrap': 1}, ['ScalingGrid.bootstrap = 1']),
    ({'tokens': 5}, ['Study.tokens = 5', 'scaling.budgets']),
    ({'match': 'state_bytes'}, ['Study.match']),
    ({'tasks': (TASK, TASK)}, ['Study.tasks', 'one task']),
    ({'name': 'a/b'}, ['Study.name', 'folder']),
  ],
)
def test_bad_studies(changes, parts):
  with pytest.raises(InputError) as e:
    study(**changes)
  for part in parts:
    assert part in str(e.value)


@quick
@pytest.mark.parametrize(
  ('changes', 'parts'),
  [
    (
      {'budgets': budgets((1e4, 1e7), (600, 1200, 2400))},
      ['10000 FLOPs', 'one batch of GRU', 'at least'],
    ),
    ({'budgets': budgets((1e7, 2e7), (1190, 1200, 1210))}, ['at 1e+07 FLOPs', 'further apart']),
    ({'tasks': (Dates(),)}, ['pairs']),
    ({'tolerance': 1e-6}, ['gru: nothing comes within', 'params']),
  ],
)
def test_what_cannot_be_planned(changes, parts, tried):
  with pytest.raises(InputError) as e:
    run_study(study(**{'tolerance': 0.5} | changes), lambda line: None, Interrupt())
  for part in parts:
    assert part in str(e.value)
  assert tried == []  # before any trains


@quick
def test_budgets_grow():
  _, second = budgets((1e10, 4e10), (1e4, 3e4, 9e4))
  assert second == Budget(flops=4e10, params=(2e4, 6e4, 18e4))
  with pytest.raises(InputError, match=r'Budget\.params'):
    Budget(flops=1e9, params=(2.0, 1.0))


# ---- from end to end ---------------------------------------------------------------------------

STUDY = """
from jaxformer.data import AssociativeRecall
from jaxformer.study.study import Budget, ScaledFamily, ScalingGrid, Study

sizes = (1.4e4, 2.8e4, 5.6e4)
study = Study(
  name='tiny', entries=(ScaledFamily(family='gpt2'),),
  tasks=(AssociativeRecall(length=6, test_sequences=64),),
  batch_size=8, learning_rates=(3e-3,), seeds=(1,), tolerance=1.0,
  scaling=ScalingGrid(
    budgets=(Budget(flops=1e8, params=sizes), Budget(flops=2e8, params=sizes)),
    held_out=(Budget(flops=4e8, params=sizes[1:2]),), bootstrap=5))
"""


@pytest.mark.e2e
@thorough
def test_an_interrupted_study_resumes(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'study.py').write_text(STUDY)
  train = Runner._train
  trained = []

  def counted(self, group):
    train(self, group)
    trained.append(group[0].run.name)
    if stop and len(trained) == 3:
      raise Interrupted

  monkeypatch.setattr(Runner, '_train', counted)
  stop = True
  assert main(['compare', 'study.py']) == 75
  assert not (tmp_path / 'runs' / 'tiny' / 'report').exists()
  stop = False
  assert main(['compare', 'study.py', '--json']) == 0
  first = json.loads(capsys.readouterr().out)
  assert len(trained) == len(set(trained)) == 7
  assert sorted(p.name for p in (tmp_path / 'runs' / 'tiny' / 'report').iterdir()) == [
    'report.csv',
    'report.html',
    'report.json',
    'report.md',
  ]
  assert main(['compare', 'study.py', '--json']) == 0
  second = json.loads(capsys.readouterr().out)
  assert len(trained) == 7
  assert first['tasks'] == second['tasks']
  (found,) = first['tasks'][0]['laws']
  assert all(t['loss'] > 0 for t in found['trainings'])
  assert len({t['params'] for t in found['trainings']}) == 3


@quick
def test_the_named_one_is_well_formed(capsys):
  s = STUDIES['scaling']
  assert s.scaling.held_out
  assert main(['compare', 'scaling', '--study.scaling.budgets.0.params', '2e4,4e4', '--show']) == 2
  assert 'at least 3' in capsys.readouterr().err
