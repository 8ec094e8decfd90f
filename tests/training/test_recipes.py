"""Recipes of the published models: numbers of the papers, and what every recipe says of itself."""

import typing

import pytest

import jaxformer
from jaxformer import config
from jaxformer.config import InputError
from jaxformer.data import open_data
from jaxformer.models.zoo import PRESETS
from jaxformer.training.experiment import check_complete
from jaxformer.training.recipes import RECIPES, Field, Status, preset_experiment
from tests.tiers import case

pytestmark = pytest.mark.quick


def peak(e) -> float:
  """The largest learning rate of a run."""
  at = max(0, e.schedule.warmup_steps(e.training.steps) - 1)
  return e.optimizer.learning_rate * float(e.schedule.factor(at, e.training.steps))


def last(e) -> float:
  """The learning rate of the last step."""
  steps = e.training.steps
  return e.optimizer.learning_rate * float(e.schedule.factor(steps - 1, steps))


def test_every_published_preset_has_a_recipe():
  assert set(RECIPES) == {name for name in PRESETS if not name.endswith('-tiny')}


@pytest.mark.parametrize('name', RECIPES)
def test_a_recipe_is_an_experiment_of_the_published_amount(name):
  recipe, e = RECIPES[name], preset_experiment(name)
  t = e.training
  per_step = t.batch_size * (e.data.positions if recipe.unit == 'tokens' else 1)
  # of steps; where they are published, of rows in a batch
  rounding = per_step / 2 if recipe.steps is None else t.steps * e.data.positions / 2
  if recipe.unit == 'tokens':
    assert e.tokens == t.steps * per_step
  assert abs(t.steps * per_step - recipe.amount) <= rounding
  assert e.model == PRESETS[name].model
  assert e.run.name == name
  assert config.from_json(config.to_json(e)) == e


@pytest.mark.parametrize('name', RECIPES)
def test_every_value_of_a_recipe_says_where_it_comes_from(name):
  origins = RECIPES[name].origins
  assert set(origins) == set(typing.get_args(Field))
  for field, origin in origins.items():
    assert origin.status in typing.get_args(Status), field
    assert origin.source if origin.status in ('published', 'secondary') else origin.note, field


@pytest.mark.parametrize('name', RECIPES)
def test_the_dropout_of_a_recipe_is_that_of_the_model(name):
  def rates(value):
    if isinstance(value, dict):
      yield from (v for k, v in value.items() if k in ('dropout', 'tied_dropout') and v)
      value = list(value.values())
    if isinstance(value, list):
      for v in value:
        yield from rates(v)

  dropout = RECIPES[name].dropout
  assert set(rates(config.to_json(PRESETS[name].model))) == ({dropout} if dropout else set())


def test_rates_batches_and_warmup_of_gpt3():
  """Table 2.1, and appendix B: 375M tokens of warm-up, a cosine over 260B of 300B tokens."""
  small, large = preset_experiment('gpt3-125m'), preset_experiment('gpt3-175b')
  assert (peak(small), peak(large)) == pytest.approx((6.0e-4, 0.6e-4))
  assert small.training.batch_size * 2048 == 2**19
  assert large.training.batch_size * 2048 == 3 * 2**20
  assert small.schedule.warmup == round(375e6 / 2**19) == 715
  assert large.schedule.warmup == round(375e6 / (3 * 2**20)) == 119
  steps, at_260b = small.training.steps, round(260e9 / 2**19)
  rates = [float(small.schedule.factor(s, steps)) for s in (at_260b // 2, at_260b, steps - 1)]
  assert rates[0] > 0.5
  assert rates[1:] == pytest.approx([0.1, 0.1])


def test_rates_of_llama():
  """Touvron et al. 2023, section 2.2; Grattafiori et al. 2024, table 3 and section 3.4.1."""
  for name, rate, least in (
    ('llama2-7b', 3e-4, 0.1),
    ('llama2-70b', 1.5e-4, 0.1),
    ('llama3.1-8b', 3e-4, 0.01),
    ('llama3.1-405b', 8e-5, 0.01),
  ):
    e = preset_experiment(name)
    assert (peak(e), last(e)) == pytest.approx((rate, rate * least), rel=1e-5)
  e = preset_experiment('llama2-7b')
  assert (e.optimizer.beta1, e.optimizer.beta2, e.optimizer.eps) == (0.9, 0.95, 1e-5)
  assert (e.optimizer.weight_decay, e.optimizer.clip, e.schedule.warmup) == (0.1, 1.0, 2000)


@pytest.mark.parametrize('family', ['mamba', 'mamba2'])
def test_mamba_has_five_times_the_rate_of_gpt3(family):
  names = [n for n in RECIPES if PRESETS[n].family == family]
  for name, gpt3 in zip(names, ('125m', '350m', '760m', '1.3b', '2.7b'), strict=True):
    e, other = preset_experiment(name), preset_experiment(f'gpt3-{gpt3}')
    assert peak(e) == pytest.approx(5 * peak(other))
    assert last(e) == pytest.approx(1e-5)
    assert e.training.batch_size == other.training.batch_size


def test_rates_of_rwkv():
  """Peng et al. 2023, table 3: constant for 361 mini-epochs of 40,320 sequences, then exponential;
  Peng et al. 2024, table 17."""
  e = preset_experiment('rwkv4-169m')
  assert e.tokens == 8043 * 40_320 * 1024
  assert (peak(e), last(e)) == pytest.approx((6e-4, 1e-5), rel=1e-4)
  assert e.schedule.hold == 361 * 40_320 // 128
  assert (e.optimizer.beta2, e.optimizer.weight_decay) == (0.99, 0)
  e = preset_experiment('rwkv5-7b')
  assert (peak(e), last(e)) == pytest.approx((1.5e-4, 1e-5), rel=1e-4)
  assert e.training.batch_size * 4096 == 2_359_296


def test_rates_of_encoder_decoders():
  """Sutskever et al. 2014, section 3.4: halved every half epoch from 5 to 7.5; Vaswani et al. 2017,
  equation 3; Bahdanau et al. 2015: Adadelta."""
  e = preset_experiment('seq2seq-lstm')
  assert (e.training.steps, e.training.batch_size) == (703_125, 128)
  assert last(e) == pytest.approx(peak(e) / 2**5)
  e = preset_experiment('transformer-base')
  assert peak(e) == pytest.approx((512 * 4000) ** -0.5)
  assert last(e) == pytest.approx((512 * 100_000) ** -0.5)
  assert (e.training.label_smoothing, e.optimizer.beta2, e.optimizer.eps) == (0.1, 0.98, 1e-9)
  o = preset_experiment('rnnsearch').optimizer
  assert (o.tag, o.rho, o.eps, o.clip) == ('Adadelta', 0.95, 1e-6, 1.0)


def test_rates_and_clipping_of_a_sum_over_time_steps():
  """Zaremba et al. 2014 sum over the 20 or 35 steps of a row, where the loss here is their mean."""
  for name, length, clip, divided in (
    ('lstm-zaremba-small', 20, 5, 2**9),
    ('lstm-zaremba-large', 35, 10, 1.15**41),
  ):
    e = preset_experiment(name)
    assert (e.data.positions, e.training.batch_size) == (length, 20)
    assert (peak(e), e.optimizer.clip) == pytest.approx((length, clip / length))
    assert last(e) == pytest.approx(length / divided, rel=1e-4)


def test_what_is_not_published_is_not_said_to_be():
  assert RECIPES['gpt2'].origins['peak'].status == 'ours'
  assert RECIPES['mamba-130m'].origins['init'].status == 'secondary'
  assert RECIPES['llama3-8b'].origins['betas'].status == 'ours'


def test_tokenizer_and_corpus_must_be_given():
  with pytest.raises(InputError) as caught:
    check_complete(preset_experiment('llama2-7b'))
  message = str(caught.value)
  assert message.startswith("data.tokenizer = 'Llama SentencePiece BPE (32,000 tokens")
  assert '--data.tokenizer TokenizerFile --data.tokenizer.path' in message
  assert '--data.corpus Files' in message
  assert '\n' not in message
  given = jaxformer.experiment('llama2-7b', overrides={'data.tokenizer': 'Bytes'})
  with pytest.raises(InputError, match=r'^data\.corpus = .*--data\.corpus Files'):
    check_complete(given)
  both = {'data.tokenizer': 'Bytes', 'data.corpus': 'StandardLibrary'}
  check_complete(jaxformer.experiment('llama2-7b', overrides=both))


def test_nothing_is_written_before_they_are_given(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(InputError, match='not part of jaxformer'):
    jaxformer.train('gpt2')
  assert not list(tmp_path.iterdir())


def test_what_reads_the_data_names_the_options_too():
  data = preset_experiment('gpt2').data.at_length(256)
  with pytest.raises(InputError, match=r"^data\.corpus = 'WebText': .*--data\.corpus Files"):
    jaxformer.load('gpt2-tiny').evaluate(data=data)
  with pytest.raises(InputError, match=r'^data\.tokenizer = .*--data\.corpus Tsv'):
    open_data(preset_experiment('rnnsearch').data)


def test_a_published_corpus_or_tokenizer_cannot_be_read():
  data = preset_experiment('gpt2').data
  with pytest.raises(InputError, match='WebText'):
    next(iter(data.corpus.rows()))
  with pytest.raises(InputError, match='WebText'):
    data.corpus.fingerprint()
  with pytest.raises(InputError, match='GPT-2'):
    data.tokenizer.train(())


def test_tiny_presets_keep_their_minute():
  e = preset_experiment('gpt2-tiny')
  assert (e.training.steps, e.training.batch_size, e.optimizer.learning_rate) == (400, 8, 3e-3)
  assert e.tokens == 400 * 8 * 256


@pytest.mark.parametrize(
  'name', ['llama2-7b', 'mamba-2.8b', 'gpt2-tiny', 'gnmt', 'transformer-base', 's4d-listops']
)
def test_a_plan_is_that_of_the_run(name):
  e, plan = jaxformer.experiment(name), jaxformer.plan(name)
  assert (plan.tokens, plan.length) == (e.tokens, e.data.positions)
  assert jaxformer.plan(name, tokens='1B').tokens == 1e9


@pytest.mark.parametrize(
  ('name', 'target'),
  [
    ('llama2-7b', 'v5e-64'),
    case('mamba-130m', 'v6e-8', standing=False),
    ('transformer-base', 'h100:8'),
    case('gpt2-tiny', 'v5e-4', standing=False),
  ],
)
def test_a_launch_is_what_was_planned(name, target):
  plan = jaxformer.plan(name, target=target, log=lambda line: None).json()
  launch = jaxformer.plan_launch(
    'sky',
    name,
    target=target,
    source='git+https://github.com/someone/jaxformer@0123abc',
    overrides={'run.dir': 'gs://bucket/runs'},
  )
  (job,) = launch.json()['jobs']
  same = ('tokens', 'train_flops', 'days', 'price_usd', 'chip_hours', 'utilization')
  assert {k: job[k] for k in same} == {k: plan['run'][k] for k in same}
  e = launch.jobs[0].experiment
  assert e.tokens == plan['run']['tokens']
  assert (e.data.positions, e.training.batch_size, e.training.remat, e.training.accumulate) == (
    plan['step']['sequence_length'],
    plan['step']['batch_size'],
    plan['remat'],
    plan['accumulate'],
  )
  assert e.mesh.sizes(launch.jobs[0].job.target.devices) == plan['mesh']
  # and the machines train this
  told = jaxformer.experiment(name, overrides=launch.jobs[0].job.overrides)
  assert told.replace(run=e.run) == e


@pytest.mark.parametrize('size', [case('1M', standing=False), case('125M', standing=True)])
def test_a_model_of_a_size_is_planned_as_it_is_trained(size):
  e, plan = jaxformer.experiment('mamba', params=size), jaxformer.plan('mamba', params=size)
  assert (plan.tokens, plan.length) == (e.tokens, e.data.positions)
  there = jaxformer.plan('mamba', params=size, target='v5e-8', log=lambda line: None).json()
  assert there['run']['tokens'] == e.tokens
  assert (there['step']['batch_size'], there['remat']) == (e.training.batch_size, e.training.remat)
  assert there['memory']['fits']


def test_a_large_model_without_a_recipe_is_not_trained_as_a_tiny_one():
  """20 tokens per active parameter of a corpus that must be given, with the batch and rate of GPT-3
  at the nearest size."""
  e = jaxformer.experiment('llama3', params='125M')
  active = jaxformer.plan('llama3', params='125M').active_params
  assert e.tokens == pytest.approx(20 * active, rel=1e-3)
  assert (e.optimizer.learning_rate, e.training.batch_size * e.data.positions) == (6e-4, 2**19)
  with pytest.raises(InputError, match=r'^data\.corpus = .*not part of jaxformer'):
    check_complete(e)
  from_config = jaxformer.experiment(PRESETS['gpt2'].model)
  assert list(from_config.data.missing()) == ['tokenizer', 'corpus']
  check_complete(jaxformer.experiment('llama3', params='1M'))


def test_a_batch_that_a_target_does_not_divide_is_named():
  with pytest.raises(
    InputError, match=r'training\.batch_size = 20: .* multiple of 64, the devices of v5e-64'
  ):
    jaxformer.plan('lstm-zaremba-medium', target='v5e-64', log=lambda line: None)


def test_nothing_is_launched_before_tokenizer_and_corpus_are_given(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  launch = jaxformer.plan_launch(
    'sky',
    'llama2-7b',
    target='v5e-64',
    source='git+https://github.com/someone/jaxformer@0123abc',
    overrides={'run.dir': 'gs://bucket/runs'},
  )
  assert list(launch.json()['to_be_given']) == ['data.tokenizer', 'data.corpus']
  assert any('to be given: data.tokenizer' in line for line in launch.lines())
  with pytest.raises(InputError, match='not part of jaxformer'):
    launch.submit()
  assert not list(tmp_path.iterdir())


def test_a_plan_on_a_target_keeps_the_batch_and_the_remat_policy():
  e = jaxformer.experiment('llama2-7b')
  found = jaxformer.plan('llama2-7b', target='v5e-64', log=lambda line: None).json()
  assert found['run']['tokens'] == e.tokens
  assert found['step']['batch_size'] == e.training.batch_size == 1024
  assert found['step']['sequence_length'] == 4096
  assert found['remat'] == e.training.remat
  assert found['memory']['fits']  # in microbatches
  assert found['accumulate'] > 1
