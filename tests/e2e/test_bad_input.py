"""What cannot be used is said in one message, with code 2, before anything of the user's is
touched."""

import errno
import io
import os
import shlex
import shutil

import pytest

from jaxformer.cli import main
from jaxformer.cli.output import read_stdin
from jaxformer.config import InputError
from tests.e2e.conftest import FIRST
from tests.e2e.program import SMALL, contents, last


@pytest.fixture
def refused(capsys):
  """Runs a command that must fail; its message."""

  def run(command, folder):
    words = shlex.split(command) if isinstance(command, str) else list(map(str, command))
    before = contents(folder)
    assert main(last(words)) == 2
    out, err = capsys.readouterr()
    assert out == ''
    assert 'Traceback (most recent call last)' not in err
    errors = err[err.index('error: ') :]
    assert err.count('error: ') == 1
    assert len(errors.splitlines()) <= 16
    assert contents(folder) == before
    return errors

  return run


FILES = {
  'empty.txt': b'',
  'bad.txt': b'abc\xff\xfe',
  'binary.dat': b'\x7fELF\0\0',
  'short.txt': b'hi',
  'some.txt': b'one two three\n' * 400,
  'broken.jsonl': b'{"text": "fine"}\n{broken\n',
  'fields.jsonl': b'{"texts": "x"}\n',
  'garbage.json': b'garbage',
  'nothing.py': b'x = 1\n',
  'number.py': b'experiment = 3\n',
  'attribute.py': b'def __getattr__(name): raise KeyError(name)\n',
  'generator.py': b'raise GeneratorExit\n',
  'loud.py': b'print("loud")\nexperiment = lambda: print("louder")\n',
  'syntax.py': b'def f(:\n',
  'fails.py': b'def experiment():\n  return 1 / 0\n',
  'config.py': b'from jaxformer.training import TrainingConfig\nTrainingConfig(steps=-1)\n',
}

OPTIONS = [
  ('trian gpt2-tiny', "'trian'", 'did you mean train?'),
  ('train', 'PRESET|FILE', 'train --help'),
  ('train gpt2-tinny', "'gpt2-tinny'", 'did you mean gpt2-tiny'),
  ('plan nope', "'nope'", 'jaxformer list'),
  ('train gpt2-tiny extra', "'extra'"),
  ('train gpt2-tiny --jsn', "'--jsn'", '--json'),
  ('list --model.width 3', '--model.width', 'takes no overrides'),
  ('generate first --dtype float8', "'float8'", 'float32, bfloat16'),
  ('generate first --top-k x', '--top-k', "'x'"),
  ('generate first --top-k ٣', "--top-k = '٣'", 'a whole number'),
  ('generate first --top-k 1.5', '--top-k = 1.5', 'a whole number'),
  ('generate first --top-p -inf', '--top-p = -inf', 'a finite number'),
  ('generate first --seed 1 --seed 2', '--seed = 2', 'also given as --seed 1'),
  ("generate ''", "run = ''", 'not be empty'),
  ("train gpt2-tiny --run.dir ''", "run.dir = ''", 'not be empty'),
  ('generate first --temperature -1e5', 'temperature = -100000.0', 'at least 0'),
  ('generate first --temperature -1', 'temperature = -1.0', 'at least 0'),
  ('generate first --temperature nan', 'temperature = nan'),
  ('generate first --top-k -2', 'top_k = -2', 'at least 0'),
  ('generate first --top-p 1.5', 'top_p = 1.5'),
  ('generate first --temperature 0 --top-k 4', 'top_k = 4', 'temperature 0'),
  ('bench gpt2-tiny --steps -1', 'steps = -1'),
  ('bench gpt2-tiny --context-length 0', 'context_length = 0', 'positive'),
  ('data inof', "'inof'", 'did you mean info?'),
  ('generate nope', "no run 'nope'"),
  ('convert nope out', "no run 'nope'"),
  ('generate some.txt', 'some.txt is a file'),
  ('generate .', 'not a run folder', 'config.json'),
]

FIELDS = [
  ('--model.widht 3', '--model.widht', 'did you mean width?'),
  ('--modle.width 3', '--modle.width', 'did you mean model?'),
  ('--mesh.foo 3', '--mesh.foo', 'known: context, data, expert, fsdp'),
  ('--training.seed.x 3', 'seed is 0, which has no fields'),
  ('--optimizer', '--optimizer', '--optimizer.FIELD'),
  ('--optimizer Lyon', "'Lyon'", 'did you mean Lion?'),
  ('--optimizer Stream', "optimizer = 'Stream'", 'AdamW, Lion, Muon'),
  ('--training.steps abc', "training.steps = 'abc'", 'a whole number'),
  ('--training.steps 1.5', 'training.steps = 1.5', 'a whole number'),
  ('--training.steps 0', 'steps = 0', 'positive'),
  ('--training.batch-size 9', '9', '8'),
  ('--optimizer.learning-rate x', "optimizer.learning_rate = 'x'", 'a number'),
  ('--optimizer.learning-rate nan', 'learning_rate = nan'),
  ('--model.tied maybe', "model.tied = 'maybe'", 'true or false'),
  ('--training.dtype float8', "'float8'", 'bfloat16'),
  ('--training.remat foo', "'foo'", 'known: '),
  ('--training.trackers foo', "'foo'", 'TensorBoard'),
  ('--run.name ../x', "'../x'", 'letters'),
  ('--run.dir some.txt', "run.dir = 'some.txt'", 'cannot be made'),
  ('--model.heads 5', 'width = 64', 'heads = 5'),
  ('--data.sequence-length 100000', 'sequence_length = 100000', 'at most 256'),
  ('--mesh.fsdp 3', 'fsdp 3', 'there are 8'),
  ('--mesh.fsdp 64', 'fsdp 64', 'there are 8'),
  ('--mesh.fsdp -1', 'only one axis may be -1'),
  ('--mesh.data 0', 'data = 0'),
  ('--mesh.tensor 8 --model.heads 4 --model.width 36', 'mesh.tensor = 8', 'must divide'),
  ('--model.vocab-size 100', 'vocab_size = 100', '257'),
  ('--init-from nope', "no run 'nope'"),
]

CORPORA = [
  ('nope.txt', "'nope.txt'", 'no such file'),
  ('empty', "'empty'", 'holds no files'),
  ('no*.such', "'no*.such'", 'no file matches'),
  ('empty.txt', 'holds no text'),
  ('bad.txt', 'bad.txt', 'not valid UTF-8 at byte offset 3'),
  ('binary.dat', 'binary.dat', 'not text', 'accepted: '),
  ('broken.jsonl', 'broken.jsonl:2', 'not valid JSON'),
  ('fields.jsonl', "no field 'text'", 'texts'),
  ('short.txt', 'sequence_length = 32'),
  ('some.txt --data.tokenizer TokenizerFile', 'needs path'),
  (
    'some.txt --data.tokenizer TokenizerFile --data.tokenizer.path nope.json',
    "'nope.json'",
    'cannot be read',
  ),
  (
    'some.txt --data.tokenizer TokenizerFile --data.tokenizer.path garbage.json',
    "'garbage.json'",
    'not a tokenizer.json',
  ),
  (
    'some.txt --data.tokenizer BytePairs --data.tokenizer.vocab-size 3',
    'vocab_size = 3',
    'at least 257',
  ),
  (
    'some.txt --data.tokenizer BytePairs --data.tokenizer.vocab-size 1e18',
    'vocab_size = 1000000000000000000',
    'at most 16,777,216',
  ),
]

EXPERIMENTS = [
  ('attribute.py', 'attribute.py cannot be run', "KeyError: 'experiment'"),
  ('generator.py', 'generator.py cannot be run', 'GeneratorExit'),
  ('loud.py', 'loud.py: defines no `experiment`'),
  ('missing.py', 'missing.py', 'No such file'),
  ('nothing.py', 'nothing.py', 'defines no `experiment`'),
  ('number.py', 'number.py', 'defines no `experiment`'),
  ('syntax.py', 'syntax.py cannot be run', 'SyntaxError'),
  ('fails.py', 'fails.py cannot be run', 'line 2, in experiment', 'ZeroDivisionError'),
  ('config.py', 'config.py: ', 'steps = -1'),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'empty').mkdir()
  for name, data in FILES.items():
    (tmp_path / name).write_bytes(data)
  return tmp_path


def check(errors, fragments):
  for fragment in fragments:
    assert fragment in errors


@pytest.mark.quick
@pytest.mark.parametrize('case', OPTIONS, ids=lambda c: c[0])
def test_options(case, refused, folder):
  check(refused(case[0], folder), case[1:])


@pytest.mark.quick
@pytest.mark.parametrize('case', FIELDS, ids=lambda c: c[0])
def test_fields(case, refused, folder):
  check(
    refused(['train', 'gpt2-tiny', *SMALL, '--run.name', 'x', *shlex.split(case[0])], folder),
    case[1:],
  )


@pytest.mark.quick
@pytest.mark.parametrize('case', CORPORA, ids=lambda c: c[0])
def test_corpora(case, refused, folder):
  own = [
    '--data.corpus',
    'Files',
    '--data.split',
    'ByPosition',
    '--data.corpus.path',
    *shlex.split(case[0]),
  ]
  check(refused(['train', 'gpt2-tiny', *SMALL, '--run.name', 'x', *own], folder), case[1:])


@pytest.mark.quick
@pytest.mark.parametrize('case', EXPERIMENTS, ids=lambda c: c[0])
def test_experiment_files(case, refused, folder):
  check(refused(['train', case[0]], folder), case[1:])


@pytest.mark.quick
@pytest.mark.parametrize(
  ('command', 'fragments'),
  [
    ('data info --data.corpsu Files', ('--data.corpsu', 'did you mean corpus?')),
    ('data info --datas.corpus Files', ('--datas.corpus', 'did you mean data?')),
    ('data info --model.width 3', ('--model.width', 'only overrides of data')),
    ('data info --data Files', ("data = 'Files'", 'known: AssociativeRecall', 'Text', 'Pairs')),
    ('data info --data Digits', ("data = 'Digits'", 'a task', 'Text and Pairs')),
    ('data info --data Pairs', ('Pairs needs corpus',)),
    (
      'data info --data Pairs --data.corpus Tsv --data.corpus.path gone.tsv',
      ('Tsv.path', 'gone.tsv', 'a file that exists'),
    ),
    ('train gpt2-tiny --data Dates', ('data = Dates', 'source-target pairs', 'LanguageModel')),
    (
      'data train-tokenizer empty --data.corpus PydocTopics --vocab-size 300',
      ('empty', 'cannot be written'),
    ),
  ],
)
def test_data(command, fragments, refused, folder):
  check(refused(command, folder), fragments)


@pytest.mark.quick
@pytest.mark.parametrize(
  ('command', 'fragments'),
  [
    ('plan gpt2 --target v5e-' + '9' * 5000, ('target = ', 'must be a cloud name')),
    ('plan gpt2 --target v5e-٨', ('target = ', 'must be a cloud name')),
    (
      f'plan gpt2 --training.batch-size {2**60} --target v5e-8',
      ('batch_size = 1152921504606846976', 'below 2^31'),
    ),
    ('compare quickstart --study.seeds -1 --show', ('seeds = (-1,)', 'at least 0')),
    ('compare quickstart --study.dir some.txt', ("study.dir = 'some.txt'", 'is not a folder')),
    ('compare quickstart --study.dir gs://a/b --train-only', ("study.dir = 'gs://a/b'", 'disk')),
    ("compare quickstart --study.dir '' --train-only", ("study.dir = ''", 'not be empty')),
  ],
  ids=lambda x: x[:40] if isinstance(x, str) else '',
)
def test_plans_and_studies(command, fragments, refused, folder):
  check(refused(command, folder), fragments)


@pytest.mark.quick
def test_kv_heads_that_do_not_divide_the_heads(refused, folder):
  check(refused('train llama3-tiny --model.kv-heads 3', folder), ['kv_heads = 3', 'heads = 4'])


# ---- runs and folders of weights, damaged ------------------------------------------------------


@pytest.fixture
def damaged(home, tmp_path, monkeypatch):
  """A copy of the run, to spoil."""
  shutil.copytree(home / 'runs', tmp_path / 'runs')
  monkeypatch.chdir(tmp_path)
  return tmp_path / 'runs' / 'first'


def gone(run, path):
  target = run / path
  shutil.rmtree(target) if target.is_dir() else target.unlink()


def cut(run, path):
  for file in (run / path).rglob('*'):
    if file.is_file():
      file.write_bytes(file.read_bytes()[:20])


def rename(file, old, new):
  file.write_text(file.read_text().replace(old, new))


SPOILED = {
  'no parameters': (lambda run: gone(run, 'checkpoints/4/params'), 'corrupt'),
  'cut short': (lambda run: cut(run, 'checkpoints/4'), 'corrupt'),
  'no meta data': (lambda run: gone(run, 'checkpoints/4/meta'), 'corrupt'),
  'no checkpoint': (lambda run: gone(run, 'checkpoints/4'), 'no checkpoint'),
  'no tokenizer': (lambda run: gone(run, 'tokenizer'), 'holds no tokenizer'),
  'config cut': (lambda run: (run / 'config.json').write_text('{'), 'JSON'),
  'a list for a config': (
    lambda run: (run / 'config.json').write_text('[1]'),
    'holds no experiment',
  ),
  'unknown type': (
    lambda run: rename(run / 'config.json', '"Attention"', '"Atention"'),
    'did you mean Attention',
  ),
}


@pytest.mark.e2e
@pytest.mark.parametrize('how', SPOILED)
def test_spoiled_runs(how, damaged, refused):
  spoil, fragment = SPOILED[how]
  spoil(damaged)
  assert fragment in refused('generate first --prompt x', damaged)


@pytest.mark.e2e
def test_training_does_not_begin_anew_over_damaged_checkpoints(damaged, capsys):
  """In this process there are 8 devices; a mesh may differ when a run goes on."""
  cut(damaged, 'checkpoints/4/params')
  before = contents(damaged / 'checkpoints')
  assert main(last([*FIRST, '--training.steps', '6'])) == 2
  assert 'corrupt' in capsys.readouterr().err
  assert contents(damaged / 'checkpoints') == before


STORES = [
  (
    'train gpt2-tiny --run.dir s3://bucket/runs',
    "run.dir = 's3://bucket/runs': Orbax",
    'supports only gs://',
    'mount the bucket',
  ),
  (
    'train gpt2-tiny --run.dir ftp://host/runs',
    "run.dir = 'ftp://host/runs': no such store",
    'gs://BUCKET/FOLDER',
  ),
  ('train gpt2-tiny --run.dir gs:///runs', "run.dir = 'gs:///runs': names no bucket"),
  (
    'train gpt2-tiny --run.dir gs://bucket/runs',
    "run.dir = 'gs://bucket/runs': needs gcsfs: pip install 'jaxformer[storage]'",
  ),
  ('train gpt2-tiny --init-from gs://bucket/runs/a@4', 'gs://bucket/runs/a: needs gcsfs'),
  ('eval gs://bucket/runs/a@4', 'gs://bucket/runs/a: needs gcsfs'),
  ('generate s3://bucket/a', 's3://bucket/a: Orbax'),
  ('convert hf://a/b out', 'hf://a/b: no such store'),
]


@pytest.mark.quick
@pytest.mark.parametrize('case', STORES, ids=lambda c: c[0])
def test_stores_that_cannot_be_used(case, tmp_path, refused, monkeypatch):
  import fsspec

  def missing(name):
    raise ImportError('Please install gcsfs to access Google Storage')

  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(fsspec, 'get_filesystem_class', missing)
  errors = refused(case[0], tmp_path)
  check(errors, case[1:])
  assert len(errors.splitlines()) == 1


RUNS = [
  (['generate', 'frist'], "no run 'frist'", 'did you mean first?'),
  (['generate', 'first@9'], "no checkpoint of step '9'", 'there are 4'),
  (['generate', 'first', '--prompt', 'x', '--max-new-tokens', '300'], '300', '256 learned'),
  (['generate', 'first', '--seed', '-1'], 'seed = -1'),
  (['generate', 'first', '--max-new-tokens', '0'], 'max_new_tokens = 0', 'at least 1'),
  (['eval', 'first', '--batches', '0'], 'batches = 0', 'at least 1'),
  (['generate', 'first', '--stop', ''], 'stop', 'empty'),
  (['eval', 'first', '--model.width', '3'], '--model.width', 'data only'),
  (['convert', 'first', 'runs'], 'runs', 'is not overwritten'),
  (
    [*FIRST, '--model.width', '32', '--training.batch-size', '16'],
    'a different experiment',
    'model.width: 64 -> 32',
    'training.batch_size: 8 -> 16',
  ),
  ([*FIRST, '--init-from', 'first'], '--init-from', 'was started from random weights'),
  (
    [
      'train',
      'gpt2-tiny',
      *SMALL,
      '--model.width',
      '32',
      '--run.name',
      'x',
      '--init-from',
      'first',
    ],
    'do not fit this model',
  ),
]


@pytest.mark.e2e
@pytest.mark.parametrize('case', RUNS, ids=lambda c: ' '.join(c[0][:2] + c[0][-2:]))
def test_what_a_run_cannot_do(case, home, refused):
  check(refused(case[0], home), case[1:])


@pytest.mark.e2e
def test_folders_of_weights_that_cannot_be_read(home, refused, tmp_path, capsys):
  assert main(['convert', 'first', str(tmp_path / 'good')]) == 0
  capsys.readouterr()

  def message(change):
    folder = tmp_path / 'weights'
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tmp_path / 'good', folder)
    change(folder)
    return refused(['generate', folder, '--prompt', 'x'], tmp_path)

  def replace(old, new):
    return lambda f: (f / 'config.json').write_text(
      (f / 'config.json').read_text().replace(old, new)
    )

  assert 'never read here' in message(
    lambda f: (f / 'model.safetensors').rename(f / 'pytorch_model.bin')
  )
  assert 'corrupt or truncated' in message(
    lambda f: (f / 'model.safetensors').write_bytes((f / 'model.safetensors').read_bytes()[:1000])
  )
  assert "'mish'" in message(replace('gelu_new', 'mish'))
  assert 'did you mean gpt2?' in message(replace('"gpt2"', '"gptt2"'))
  assert 'there is no tokenizer.json' in message(lambda f: (f / 'tokenizer.json').unlink())


@pytest.mark.quick
def test_a_dict_of_parameters_is_checked_by_name_and_shape(tmp_path, monkeypatch):
  import numpy as np

  import jaxformer
  from jaxformer.models.params import define

  monkeypatch.chdir(tmp_path)
  flags = {w.removeprefix('--'): v for w, v in zip(SMALL[::2], SMALL[1::2], strict=True)}
  experiment = jaxformer.experiment('gpt2-tiny', overrides=flags | {'run.name': 'given'})
  params = {n: np.zeros(i.shape, np.float32) for n, i in define(experiment.model).info.items()}
  params['final_norm.scale'], params['spare'] = (
    np.zeros(3, np.float32),
    params.pop('final_norm.bias'),
  )
  with pytest.raises(InputError) as e:
    jaxformer.train(experiment, init_from=params)
  for line in (
    'final_norm.bias: not found',
    'spare: found, but not in the model',
    'final_norm.scale: (3,) found, the model has (64,)',
  ):
    assert line in str(e.value)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.quick
@pytest.mark.parametrize(
  ('stdin', 'problem'),
  [
    (None, 'is closed'),
    (io.TextIOWrapper(io.BytesIO(b'ab\xff'), 'utf-8'), 'not valid UTF-8 at byte offset 2'),
  ],
)
def test_standard_input_that_cannot_be_read(stdin, problem, monkeypatch):
  monkeypatch.setattr('sys.stdin', stdin)
  with pytest.raises(InputError, match=f'standard input: {problem}'):
    read_stdin()


@pytest.mark.quick
def test_nothing_goes_to_the_number_of_a_closed_stderr(monkeypatch, capfd, tmp_path):
  monkeypatch.setattr('sys.stderr', None)
  kept = os.dup(2)
  os.close(2)
  try:
    assert main(['nope']) == 2
    with (tmp_path / 'file').open('w') as file:
      assert file.fileno() > 2
  finally:
    os.dup2(kept, 2)
    os.close(kept)
  assert capfd.readouterr().out == ''


@pytest.mark.quick
@pytest.mark.parametrize('error', [PermissionError, NotADirectoryError])
def test_a_path_that_cannot_be_used_is_told_in_a_line(error, monkeypatch, capsys):
  number = errno.EACCES if error is PermissionError else errno.ENOTDIR

  def run(**_):
    raise error(number, 'The reason', '/a/path')

  monkeypatch.setattr('jaxformer.cli.list.run', run)
  assert main(['list']) == 2
  assert capsys.readouterr() == ('', "error: path = '/a/path': The reason\n")


@pytest.mark.quick
@pytest.mark.parametrize(
  'error',
  [
    MemoryError('Unable to allocate 7.28 TiB'),
    RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 50304067704 bytes.'),
    RuntimeError('INTERNAL: Error dispatching computation:\nOut of memory allocating 5 bytes.'),
  ],
)
def test_too_little_memory_is_told_in_a_line(error, monkeypatch, capsys):
  def run(**_):
    raise error

  monkeypatch.setattr('jaxformer.cli.list.run', run)
  assert main(['list']) == 1
  out, err = capsys.readouterr()
  assert out == ''
  assert err.startswith('error: out of memory; must be a smaller batch')
  assert len(err.splitlines()) == 1
