"""Decoding against repeated forward passes; rows on their own; ends, sizes and errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.config import InputError
from jaxformer.inference import GREEDY, DecodeTime, Sampling, generate, time_decode
from jaxformer.inference.decoding import advance, bucket, request
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from jaxformer.sharding import MeshConfig, Parallel, make_mesh
from jaxformer.workflows.benchmark import Benchmark
from tests.helpers import state_bytes
from tests.inference.models import CONFIGS, greedy, model

PROMPTS = [[1, 2, 3], [4, 5, 6, 7] * 5, [8], [9, 10, 11, 12, 13, 14, 15]]


@pytest.mark.parametrize('name', CONFIGS)
def test_greedy_is_the_argmax_of_forward_passes(name):
  definition, params = model(name)
  got = generate(request(definition, params, PROMPTS, max_new_tokens=18, sampling=GREEDY))
  want = [greedy(definition, params, p, 18) for p in PROMPTS]
  assert [g.tokens for g in got] == want
  # a model that always says the same would show nothing
  assert len({t for row in want for t in row}) > 5
  assert not any(g.finished for g in got)


@pytest.mark.quick
@pytest.mark.parametrize(
  'sampling', [GREEDY, Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.2)], ids=str
)
def test_a_row_does_not_depend_on_its_neighbours(sampling):
  definition, params = model('window')

  def run(prompts):
    return [
      g.tokens
      for g in generate(
        request(definition, params, prompts, max_new_tokens=12, sampling=sampling, seed=5)
      )
    ]

  first = run([PROMPTS[0], PROMPTS[2]])
  assert run([PROMPTS[0], list(range(25))])[0] == first[0]  # more padding
  assert run([list(range(25)), PROMPTS[2]])[1] == first[1]


@pytest.mark.quick
def test_seeds():
  definition, params = model('alibi')

  def run(seed):
    return [
      g.tokens
      for g in generate(request(definition, params, [[3], [3]], max_new_tokens=12, seed=seed))
    ]

  assert run(1) == run(1)
  assert run(1) != run(2)
  assert run(1)[0] != run(1)[1]


@pytest.mark.quick
def test_end_of_document_ends_a_row_and_all_ends_the_loop():
  definition, params = model('alibi')
  whole = [
    g.tokens
    for g in generate(request(definition, params, PROMPTS, max_new_tokens=20, sampling=GREEDY))
  ]
  end = whole[0][6]
  got = generate(
    request(definition, params, PROMPTS, max_new_tokens=20, sampling=GREEDY, end_of_document=end)
  )
  for tokens, g in zip(whole, got):
    assert g.finished == (end in tokens)
    assert g.tokens == (tokens[: tokens.index(end)] if end in tokens else tokens)
  r = request(
    definition, params, PROMPTS[:1], max_new_tokens=20, sampling=GREEDY, end_of_document=end
  )
  assert int(r.advance(r.begin(), 20).count) == whole[0].index(end) + 1


@pytest.mark.quick
def test_repetition_penalty_reaches_the_prompt_and_the_new_tokens():
  definition, params = model('alibi')
  forward = jax.jit(lambda p, t: definition.merge(p)(t).y[0])
  tokens, penalty = [1, 2, 3], 1.8  # token 0 is padding, and no part of the prompt
  for _ in range(8):
    padded = np.zeros((1, 16), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.array(forward(params, padded)[len(tokens) - 1])
    for t in set(tokens):
      logits[t] = logits[t] / penalty if logits[t] > 0 else logits[t] * penalty
    tokens.append(int(logits.argmax()))
  got = generate(
    request(
      definition,
      params,
      [[1, 2, 3]],
      max_new_tokens=8,
      sampling=Sampling(temperature=0.0, repetition_penalty=penalty),
    )
  )
  assert got[0].tokens == tokens[3:]


@pytest.mark.quick
def test_the_whole_context_of_learned_positions():
  definition, params = model('gpt2-tiny')
  context_length = definition.config.context_length
  prompt = [i % 200 for i in range(context_length - 3)]
  got = generate(request(definition, params, [prompt, [1, 2]], max_new_tokens=3, sampling=GREEDY))
  assert got[0].tokens == greedy(definition, params, prompt, 3, length=context_length)
  with pytest.raises(
    InputError,
    match=f'prompt 1 has {context_length - 3} tokens.*max_new_tokens = 4.*{context_length}',
  ):
    generate(request(definition, params, [[1], prompt], max_new_tokens=4))


@pytest.mark.quick
def test_beyond_the_context_where_nothing_is_learned():
  definition, params = model('sinusoidal')
  prompt = [i % 29 for i in range(70)]
  got = generate(request(definition, params, [prompt], max_new_tokens=5, sampling=GREEDY))
  assert got[0].tokens == greedy(definition, params, prompt, 5, length=80)


@pytest.mark.quick
def test_empty_prompt_starts_from_the_end_of_document():
  definition, params = model('alibi')
  empty, given = (
    generate(
      request(definition, params, [p], max_new_tokens=4, sampling=GREEDY, end_of_document=7)
    )[0]
    for p in ([], [7])
  )
  assert empty == given


@pytest.mark.quick
@pytest.mark.parametrize(
  ('prompts', 'options', 'message'),
  [
    ([[1], []], {}, 'prompt 1 is empty'),
    ([], {}, 'prompts: must be at least one'),
    ([[1, 32]], {}, 'token 32.*32'),
    ([[1, -1]], {}, 'token -1'),
    ([[1]], {'max_new_tokens': 0}, 'max_new_tokens = 0'),
    ([[1]], {'end_of_document': 32}, 'end_of_document = 32'),
    ([[1]], {'seed': -1}, 'seed = -1'),
  ],
)
def test_errors(prompts, options, message):
  definition, params = model('alibi')
  with pytest.raises(InputError, match=message):
    generate(request(definition, params, prompts, **{'max_new_tokens': 3} | options))


@pytest.mark.quick
def test_similar_requests_share_programs():
  definition, params = model('alibi')
  assert [bucket(n) for n in (1, 16, 17, 200, 256, 257, 513)] == [16, 16, 32, 256, 256, 512, 768]

  def run(length, new):
    return generate(
      request(definition, params, [list(range(length))] * 3, max_new_tokens=new, sampling=GREEDY)
    )

  run(17, 17)
  before = advance._cache_size()
  run(30, 29)
  assert advance._cache_size() == before


def test_bf16():
  definition, params = model('grouped')
  r = request(definition, params, PROMPTS, max_new_tokens=8, sampling=GREEDY, dtype=jnp.bfloat16)
  begun = r.begin()
  assert {
    x.dtype for x in jax.tree.leaves(begun.state) if jnp.issubdtype(x.dtype, jnp.floating)
  } == {jnp.dtype(jnp.bfloat16)}
  assert r.advance(begun, 8).tokens_BN.shape == (4, 16)


@pytest.mark.parametrize(
  ('axes', 'prompts'),
  [
    ({'fsdp': 4, 'tensor': 2}, PROMPTS * 2),
    ({'fsdp': 2, 'tensor': 4}, PROMPTS[:3]),  # neither rows nor key/value heads can be divided
  ],
  ids=['divisible', 'not'],
)
def test_sharded_equals_one_device(axes, prompts):
  definition, params = model('grouped')
  mesh = make_mesh(MeshConfig(**{'data': 1} | axes))
  placed = jax.device_put(params, definition.shardings(Parallel(mesh)))
  want = generate(request(definition, params, prompts, max_new_tokens=8, sampling=GREEDY))
  assert (
    generate(
      request(
        definition, placed, prompts, max_new_tokens=8, sampling=GREEDY, parallel=Parallel(mesh)
      )
    )
    == want
  )


@pytest.mark.quick
def test_time_decode():
  definition, params = model('alibi')
  times = time_decode(definition, params, 16, 16, batch=2, repeats=1)
  assert 0 < times.seconds_per_token < times.compile_seconds
  assert times.prefill_seconds > 0


@pytest.mark.quick
def test_a_state_of_gigabytes_is_shown_as_such():
  time = DecodeTime(4096, 2_500_000_000, 0.1, 0.01, 1.0)
  shown = Benchmark('model', 'cpu', 1, None, [time._asdict()]).lines()
  assert shown[-1].split()[-2:] == ['2.5', 'GB']


@pytest.mark.quick
def test_state_bytes():
  llama = define(PRESETS['llama3-8b'].model)
  L, G, K, S = 32, 8, 128, 8192
  assert state_bytes(llama, 1, S) == 2 * L * G * K * S * 2
  assert state_bytes(llama, 3, S, bytes_per_number=1) == 3 * 2 * L * G * K * S
  window = define(CONFIGS['window'])
  assert state_bytes(window, 1, 1000) == state_bytes(window, 1, 5) == 2 * 4 * 8 * 5 * 2
  assert state_bytes(llama, 1, 100) == 2 * llama.config.state_size(100)  # as declared


@pytest.mark.quick
@pytest.mark.parametrize(
  'sampling',
  [GREEDY, Sampling(temperature=5.0), Sampling(top_p=0.99, repetition_penalty=1.2)],
  ids=str,
)
def test_rows_of_the_head_that_are_no_tokens_are_never_drawn(sampling):
  """Models round their vocabulary up; a model of random weights would draw those rows in no
  time."""
  definition, params = model('alibi')
  got = generate(
    request(definition, params, PROMPTS, max_new_tokens=40, sampling=sampling, vocab_size=16)
  )
  assert {t for g in got for t in g.tokens} <= set(range(16))
  with pytest.raises(InputError, match='prompt 0 has token 16'):
    generate(request(definition, params, [[16]], max_new_tokens=1, vocab_size=16))
