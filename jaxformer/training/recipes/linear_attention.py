"""RetNet (Sun et al. 2023), gated linear attention (Yang et al. 2024), HGRN2 (Qin et al. 2024) and
MiniMax-Text-01 (MiniMax 2025)."""

from jaxformer.data import PublishedCorpus, PublishedTokenizer, Text
from jaxformer.training.optimizer import AdamW
from jaxformer.training.recipes.recipe import (
  Field,
  Origins,
  Source,
  derived,
  each,
  memory,
  ours,
  recipe,
)
from jaxformer.training.schedule import Cosine, Linear

RETNET = 'Sun et al. 2023, arXiv:2307.08621'
GLA = 'Yang et al. 2024, arXiv:2312.06635'
FLA = Source('flash-linear-attention 0.6.0', 'package')
SUMMARY = Source('a summary of Yang et al. 2024', 'arXiv:2312.06635')
LENGTH = 2048
SLIM_PAJAMA = PublishedCorpus(name='SlimPajama')
MISTRAL = PublishedTokenizer(
  name='Mistral SentencePiece BPE', vocab_size=32000, hub='mistralai/Mistral-7B-v0.1'
)
INIT = 'N(0, 0.02)'
FLA_INIT = FLA.hint('fla/models/modeling_utils.py', 'the default of its models')

STATED: tuple[Field, ...] = (
  'batch', 'length', 'optimizer', 'peak', 'warmup', 'schedule', 'decay'
)  # fmt: skip

recipe(
  'retnet-1.3b',
  amount=100e9,
  data=Text(
    corpus=PublishedCorpus(name='the Pile, C4 and The Stack'),
    tokenizer=PublishedTokenizer(name='a BPE of 32,000 tokens', vocab_size=32000),
    sequence_length=LENGTH,
  ),
  batch_size=2048,
  optimizer=AdamW(learning_rate=6e-4, beta1=0.9, beta2=0.98, eps=1e-8, weight_decay=0.05),
  schedule=Linear(warmup=375),
  init=INIT,
  origins={
    **each(memory(f'as remembered of {RETNET}'), 'tokens', 'betas', *STATED),
    'steps': derived('100B tokens / (batch x length)'),
    **each(ours('not known'), 'eps', 'minimum', 'clip', 'precision'),
    'dropout': ours('0.1 in the paper, as remembered; none in the preset'),
    'init': FLA_INIT,
    'tokenizer': ours('that of the paper is not known; a vocabulary of the size of the preset'),
  },
  note='The preset is the model of 1.3B parameters of the flash-linear-attention library; that of '
  'the paper has ungated feed-forward layers.',
)

ORIGINS: Origins = {
  **each(memory(f'as remembered of {GLA}'), 'minimum', 'clip', *STATED),
  'steps': derived('tokens / (batch x length)'),
  **each(ours('not known; as GPT-3'), 'betas', 'eps'),
  **each(ours('not known'), 'dropout', 'precision'),
  'init': FLA_INIT,
  'tokenizer': SUMMARY.hint('', 'SlimPajama in tokens of Mistral'),
}

for name, amount, batch, warmup, tokens in (
  ('gla-340m', 15e9, 256, 0.5e9, memory(f'as remembered of {GLA}')),
  ('gla-7b', 20e9, 1024, 1e9, memory('as remembered of the name of the released weights')),
):
  recipe(
    name,
    amount=amount,
    data=Text(corpus=SLIM_PAJAMA, tokenizer=MISTRAL, sequence_length=LENGTH),
    batch_size=batch,
    optimizer=AdamW(learning_rate=3e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.01),
    schedule=Cosine(warmup=round(warmup / (batch * LENGTH)), final=0.1),
    init=INIT,
    origins=ORIGINS
    | {'tokens': tokens}
    | (
      each(ours('not known; that of 1.3B parameters in the paper'), 'batch', 'peak', 'warmup')
      if name == 'gla-7b'
      else {}
    ),
  )

# HGRN2 in the sizes and with the training in which later papers compare it with GLA.
for name, amount, batch, warmup in (
  ('hgrn2-340m', 15e9, 256, 0.5e9),
  ('hgrn2-1.3b', 100e9, 1024, 1e9),
):
  recipe(
    name,
    amount=amount,
    data=Text(corpus=SLIM_PAJAMA, tokenizer=MISTRAL, sequence_length=LENGTH),
    batch_size=batch,
    optimizer=AdamW(learning_rate=3e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.01),
    schedule=Cosine(warmup=round(warmup / (batch * LENGTH)), final=0.1),
    init=INIT + ', lower bounds 0',
    origins=ORIGINS
    | each(
      ours('that of GLA at the same size; of this size nothing is known'),
      'tokens',
      'minimum',
      'clip',
      'tokenizer',
      *STATED,
    ),
  )

recipe(
  'minimax-text-01',
  amount=11.4e12,
  data=Text(
    corpus=PublishedCorpus(name='an in-house dataset of web pages, books and code'),
    tokenizer=PublishedTokenizer(
      name='MiniMax BPE', vocab_size=200_064, hub='MiniMaxAI/MiniMax-Text-01'
    ),
    sequence_length=8192,
  ),
  batch_size=4096,
  optimizer=AdamW(learning_rate=2e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1),
  schedule=Cosine(warmup=500, final=0.1),
  init=INIT,
  origins={
    **each(
      memory('as remembered of MiniMax 2025, arXiv:2501.08313'),
      'length',
      'optimizer',
      'betas',
      'peak',
      'warmup',
      'decay',
      'tokenizer',
    ),
    'tokens': memory('as remembered: 7.2T at the peak rate and 3.2T at lower ones, and more'),
    'batch': ours('published as growing from 16M to 128M tokens, as remembered; here 34M'),
    'steps': derived('tokens / (batch x length)'),
    'schedule': ours('constant and then exponential in the paper, as remembered; here a cosine'),
    'init': ours('the default of transformers; Xavier in the paper, as remembered'),
    **each(ours('not known'), 'minimum', 'eps', 'clip', 'dropout', 'precision'),
  },
  note='The stages of longer contexts that follow are no part of it.',
)
