"""What a user does with the program, from the first run to weights for others."""

import json
import math
import re
import subprocess
import sys
import time

import pytest

from jaxformer.cli import main
from tests.e2e.conftest import FIRST
from tests.e2e.program import SMALL, contents, environment, last, start
from tests.tiers import thorough

pytestmark = [pytest.mark.e2e, pytest.mark.newest]


@pytest.fixture
def answer(capsys):
  """Runs a command in this process; its code, stdout as JSON, and stderr."""

  def run(*words, code=0):
    capsys.readouterr()
    found = main(last(words))
    out, err = capsys.readouterr()
    assert found == code, err
    return json.loads(out), err

  return run


# ---- training ----------------------------------------------------------------------------------


def test_train_answers_one_json_value_and_says_the_rest_on_stderr(first):
  home, value, done = first
  figures = {'metrics', 'unigram_bits_per_byte', 'bigram_bits_per_byte'}
  assert set(value) == {'run', 'step', 'exit_code', *figures}
  assert value['run'] == str(home / 'runs' / 'first')
  assert value['step'] == value['metrics']['step'] == 4
  assert value['metrics']['train/loss'] < math.log(264) + 1
  assert all(
    part in done.stderr
    for part in ('parameters, 1 devices', 'compiled the step', 'step 4/4', 'bits per byte')
  )
  # stderr is no terminal: each of these is one line, and comes before what it announces
  lines = done.stderr.splitlines()
  assert [line for line in lines if line.startswith('compiling')] == [
    'compiling the step',
    'compiling the evaluation and the sample',
  ]
  (compiled,) = (i for i, line in enumerate(lines) if line.startswith('compiled the step in '))
  assert lines[compiled - 1] == 'compiling the step'
  names = {p.name for p in (home / 'runs' / 'first').iterdir()} - {'.lock'}
  assert names == {
    'config.json',
    'environment.json',
    'metrics.jsonl',
    'events.jsonl',
    'checkpoints',
    'tokenizer',
    'samples.txt',
  }


def test_the_same_command_has_nothing_left_to_do(first, cache):
  home, value, _ = first
  before = contents(home / 'runs' / 'first' / 'checkpoints')
  done = start(FIRST, home, cache)
  assert done.returncode == 0, done.stderr
  assert 'has already completed its 4 steps' in done.stderr
  assert 'compiling' not in done.stderr
  scores = [
    (value['metrics']['eval/bits_per_byte'], 'this model after 4 steps'),
    (value['unigram_bits_per_byte'], 'unigram model of bytes'),
    (value['bigram_bits_per_byte'], 'bigram model of bytes'),
  ]
  lines = [f'  {bits:.3f}  {what}\n' for bits, what in sorted(scores)]
  assert ''.join(lines) in done.stdout
  (start_of_run,) = json.loads((home / 'runs' / 'first' / 'environment.json').read_text())[:1]
  for name in ('unigram_bits_per_byte', 'bigram_bits_per_byte'):
    assert start_of_run['data'][name] == value[name]
  assert contents(home / 'runs' / 'first' / 'checkpoints') == before


@thorough
def test_more_steps_go_on_where_the_run_stopped(answer, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  words = ['train', 'gpt2-tiny', *SMALL, '--run.name', 'longer', '--json']
  answer(*words, '--training.steps', '2')
  value, err = answer(*words, '--training.steps', '3')
  assert value['step'] == 3
  assert re.search(r'resuming \S+longer at step 2 with training\.steps: 2 -> 3', err)


def test_an_experiment_file(answer, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'question.py').write_text(
    'from jaxformer.data import Text, PydocTopics\n'
    'from jaxformer.models.zoo import PRESETS\n'
    'from jaxformer.training import Experiment, TrainingConfig\n'
    'def experiment():\n'
    '  training = TrainingConfig(steps=2, batch_size=8, eval_batches=1, trackers=())\n'
    '  data = Text(corpus=PydocTopics(), sequence_length=32)\n'
    "  return Experiment(model=PRESETS['gpt2-tiny'].model, data=data, training=training)\n"
  )
  value, _ = answer('train', 'question.py', *SMALL[:6], '--training.steps', 1, '--json')
  assert (value['run'], value['step']) == (str(tmp_path / 'runs' / 'question'), 1)
  assert answer('plan', 'question.py', '--json')[0]['length'] == 32


def test_a_tokenizer_of_ones_own(answer, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert (
    main(
      [
        'data',
        'train-tokenizer',
        'pairs.json',
        '--vocab-size',
        '300',
        '--data.corpus',
        'PydocTopics',
      ]
    )
    == 0
  )
  assert 'pairs.json: 300 tokens' in capsys.readouterr().err
  own = ['--data.tokenizer', 'TokenizerFile', '--data.tokenizer.path', 'pairs.json']
  info = answer('data', 'info', '--data.corpus', 'PydocTopics', *own, '--json')[0]
  assert info['tokenizer']['vocab_size'] == 300
  model = ['--model.vocab-size', 304, '--training.steps', 1]
  value, _ = answer('train', 'gpt2-tiny', *SMALL, *own, *model, '--run.name', 'pairs', '--json')
  assert value['step'] == 1
  (tmp_path / 'pairs.json').unlink()  # the run has its own
  assert (
    len(
      answer('generate', 'pairs', '--prompt', 'The ', '--max-new-tokens', 3, '--json')[0][0][
        'tokens'
      ]
    )
    <= 3
  )


def test_numbers_that_are_not_finite_exit_70(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  wild = ['--optimizer.learning-rate', '1e30', '--schedule', 'Constant']
  assert main(['train', 'gpt2-tiny', *SMALL, '--run.name', 'wild', *wild, '--json']) == 70
  out, err = capsys.readouterr()
  value = json.loads(out)
  assert (value['run'], value['step'], value['exit_code']) == (str(tmp_path / 'runs/wild'), 2, 70)
  assert value['metrics']['train/loss'] is None
  assert 'step 2 is not finite; there is no checkpoint' in err


def test_interrupting_the_compilation_exits_130_without_a_traceback(tmp_path, monkeypatch, capsys):
  def interrupted(*_):
    raise KeyboardInterrupt

  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr('jaxformer.training.loop.compiled_train_step', interrupted)
  assert main(['train', 'gpt2-tiny', *SMALL, '--run.name', 'stopped']) == 130
  out, err = capsys.readouterr()
  assert out == ''
  assert 'Traceback' not in err


# ---- a trained model ---------------------------------------------------------------------------


def test_generate_prints_the_prompt_and_the_text(first, cache):
  home = first[0]
  done = start(
    ['generate', 'first', '--prompt', '-', '--max-new-tokens', '8', '--temperature', '0'],
    home,
    cache,
    text='def f(',
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith('def f(')
  assert done.stderr == ''


def test_generate_json_stop_and_several_prompts(home, answer):
  def texts(*words):
    return answer(
      'generate', 'runs/first@4', *words, '--max-new-tokens', 24, '--temperature', 0, '--json'
    )[0]

  one, two = texts('--prompt', 'The ', '--prompt', 'class A')
  assert set(one) == {'prompt', 'text', 'tokens', 'finished'}
  assert (one['prompt'], two['prompt']) == ('The ', 'class A')
  assert one['text'] == bytes(t for t in one['tokens'] if t < 256).decode(errors='replace')
  stop = one['text'][3]
  (stopped,) = texts('--prompt', 'The ', '--stop', stop)
  assert stopped['text'] == one['text'][: one['text'].index(stop)]
  assert stopped['finished']
  off = ['--top-p', '1.0', '--top-k', '0', '--min-p', '0', '--repetition-penalty', '1.0']
  assert texts('--prompt', 'The ', '--prompt', 'class A', *off) == [one, two]


def test_eval_repeats_what_training_measured(first, home, answer):
  value = answer('eval', 'first', '--batch-size', 8, '--batches', 1, '--json')[0]
  assert value['loss'] == pytest.approx(first[1]['metrics']['eval/loss'], rel=1e-5)
  assert value['bits_per_byte'] == pytest.approx(
    first[1]['metrics']['eval/bits_per_byte'], rel=1e-5
  )
  assert value['bigram_bits_per_byte'] == pytest.approx(first[1]['bigram_bits_per_byte'])


@thorough
def test_weights_for_others_say_the_same_and_can_be_trained_on(
  home, answer, tmp_path, monkeypatch, capsys
):
  out = tmp_path / 'weights'
  assert main(['convert', 'first', str(out)]) == 0
  assert {p.name for p in out.iterdir()} == {'config.json', 'model.safetensors', 'tokenizer.json'}
  words = ['--prompt', 'import os\n', '--max-new-tokens', 16, '--temperature', 0, '--json']
  assert answer('generate', out, *words)[0] == answer('generate', 'first', *words)[0]
  monkeypatch.chdir(tmp_path)
  train = ['train', 'gpt2-tiny', *SMALL, '--training.steps', 1, '--init-from']
  theirs, _ = answer(*train, 'weights', '--run.name', 'theirs', '--json')
  ours, _ = answer(*train, home / 'runs' / 'first', '--run.name', 'ours', '--json')
  assert theirs['metrics']['train/loss'] == ours['metrics']['train/loss'] < 5
  before = contents(tmp_path)
  assert main(last([*train, 'weights', '--model.repeats', '2', '--run.name', 'other'])) == 2
  assert 'stack.0.repeats: 1 -> 2' in capsys.readouterr().err
  assert contents(tmp_path) == before


# ---- without a model ---------------------------------------------------------------------------


def test_the_largest_preset_is_planned_in_seconds_and_little_memory(tmp_path, cache):
  # Not `ru_maxrss`: a process inherits that of the one that started it.
  program = (
    '-c',
    'import re, sys\nfrom jaxformer.cli import main\ncode = main()\n'
    r'print(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1], file=sys.stderr)'
    '\nsys.exit(code)',
  )
  began = time.monotonic()
  done = start(['plan', 'llama3.1-405b', '--json'], tmp_path, cache, program=program)
  assert done.returncode == 0, done.stderr
  # a minute on any machine; allocating the model would never end
  assert time.monotonic() - began < 60
  value = json.loads(done.stdout)
  assert value['params'] == value['active_params'] == 405_853_388_800
  assert value['decode_state_bytes'] == 2 * 126 * 8 * 128 * 131_072 * 2
  assert int(done.stderr.split()[-1]) * 1024 < 2 * 2**30


def test_list_names_every_preset_with_its_size(answer):
  rows = {r['name']: r for r in answer('list', '--json')[0]}
  assert set(rows['gpt2']) == {'name', 'family', 'params', 'active_params'}
  assert {
    name: rows[name]['params'] for name in ('gpt2', 'llama2-7b', 'llama3-8b', 'llama3.2-1b')
  } == {
    'gpt2': 124_439_808,
    'llama2-7b': 6_738_415_616,
    'llama3-8b': 8_030_261_248,
    'llama3.2-1b': 1_235_814_400,
  }


def test_a_reader_that_leaves_early_is_no_error(tmp_path, cache):
  done = subprocess.run(
    ['bash', '-c', 'set -o pipefail; "$0" -m jaxformer list | head -1', sys.executable],
    cwd=tmp_path,
    env=environment(cache),
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )
  assert (done.returncode, done.stderr) == (0, '')
  assert done.stdout.split() == ['name', 'family', 'params', 'active']


def test_bench_measures_training_and_decoding(answer):
  value, err = answer(
    'bench', 'gpt2-tiny', *SMALL, '--steps', 2, '--new-tokens', 4, '--context-length', 8, '--json'
  )
  said = [re.sub(r'[\d.]+ s$', 'SECONDS', line) for line in err.splitlines()]
  assert said == [
    'compiling the step',
    'compiled the step in SECONDS',
    'compiling decoding at a context of 8 tokens',
  ]
  assert value['training']['tokens_per_step'] == 8 * 32
  assert [r['context_length'] for r in value['decoding']] == [8]
  assert min(value['training']['tokens_per_second'], value['decoding'][0]['seconds_per_token']) > 0


def test_data_info(answer):
  value = answer('data', 'info', '--data.corpus', 'PydocTopics', '--json')[0]
  assert value['tokenizer']['vocab_size'] == 257
  assert value['bigram_bits_per_byte'] < value['unigram_bits_per_byte'] < 8


def test_overrides_reach_where_they_should(answer):
  value = answer(
    'train',
    'gpt2-tiny',
    '--show',
    '--model.heads',
    2,
    '--optimizer',
    'Lion',
    '--optimizer.learning-rate',
    '1e-4',
    '--training.trackers',
    'none',
    '--training.eval-batches',
    'none',
    '--model.stack.0.repeats',
    3,
  )[0]
  attention = [
    b['layer']
    for g in value['model']['stack']
    for p in g['pattern']
    for b in p['branches']
    if 'heads' in b['layer']
  ]
  assert attention
  assert {a['heads'] for a in attention} == {2}
  assert value['optimizer']['type'] == 'Lion'
  assert value['optimizer']['learning_rate'] == 1e-4
  assert (value['training']['trackers'], value['training']['eval_batches']) == ([], None)
  assert value['model']['stack'][0]['repeats'] == 3
