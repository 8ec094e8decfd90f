"""What a study says while it trains."""

import types

import pytest

from jaxformer.data import AssociativeRecall
from jaxformer.models.zoo import FAMILIES
from jaxformer.study.runner import Planned, Runner, Trial
from jaxformer.study.sharing import Interrupted
from jaxformer.study.study import FixedModel, Study

pytestmark = pytest.mark.quick
TASK = AssociativeRecall()
MODEL = FAMILIES['gru'].make(width=8, layers=1, vocab_size=10, context_length=8)


@pytest.fixture
def said(monkeypatch):
  """Lines of progress, and the size of each group where it is trained."""
  found, scores = [], {'eval/loss': 1.0, 'eval/accuracy': 0.5}
  monkeypatch.setattr('jaxformer.study.runner.finished', lambda experiment: None)
  monkeypatch.setattr(
    'jaxformer.study.runner._trial', lambda experiment: Trial(1e-3, 1, 'run', 1.0, scores)
  )
  monkeypatch.setattr(Runner, '_train', lambda self, group: found.append(len(group)))
  return found


def trained(said, signal=None):
  entry = FixedModel(name='GRU', model_config=MODEL)
  study = Study(name='s', entries=(entry,), tasks=(TASK,), runs_per_program=2)
  dataset = types.SimpleNamespace(config=TASK)
  planned = Planned(study, entry, TASK, MODEL, 1.0, 'recall')
  runner = Runner(dataset, types.SimpleNamespace(signal=signal), said.append)
  return runner.trained(planned, ['one', 'two', 'three'])


def test_each_program_is_announced_once_before_it_is_compiled(said):
  assert len(trained(said)) == 3
  kept = [s if isinstance(s, int) else s.partition(' | accuracy')[0] for s in said]
  result = 'recall | GRU | rate 0.001 | seed 1'
  assert kept == [
    'recall | GRU | compiling, then training 2 runs in one program',
    2,
    result,
    result,
    'recall | GRU | compiling, then training 1 run',
    1,
    result,
  ]


def test_nothing_is_announced_after_a_signal(said):
  with pytest.raises(Interrupted):
    trained(said, signal='SIGTERM')
  assert said == []
