"""Mixtral (Jiang et al. 2024), Jamba (Lieber et al. 2024), and the mixture of experts between LSTMs
(Shazeer et al. 2017)."""

from jaxformer.data import PublishedCorpus, PublishedTokenizer, Text
from jaxformer.training.optimizer import AdamW
from jaxformer.training.recipes.recipe import (
  Field,
  Origin,
  Origins,
  Source,
  derived,
  each,
  memory,
  ours,
  recipe,
)
from jaxformer.training.schedule import Cosine, InverseSquareRoot

JAMBA = Source('a summary of Lieber et al. 2024', 'arXiv:2403.19887')
SHAZEER = Source('Shazeer et al. 2017', 'arXiv:1701.06538')

UNPUBLISHED: tuple[Field, ...] = (
  'batch',
  'steps',
  'optimizer',
  'betas',
  'minimum',
  'warmup',
  'schedule',
  'decay',
  'clip',
  'dropout',
  'init',
  'precision',
)
LIKE_LLAMA2: Origins = {
  **each(ours('not published; as Llama 2'), *UNPUBLISHED),
  'tokens': ours('not published; 20 per active parameter'),
}

for name, tokens, rate, context, size in (
  ('mixtral-8x7b', 257.6e9, 3e-4, '32,768', '8x7B'),
  ('mixtral-8x22b', 783e9, 1.5e-4, '65,536', '8x22B'),
):
  recipe(
    name,
    amount=tokens,
    data=Text(
      corpus=PublishedCorpus(name='multilingual data'),
      tokenizer=PublishedTokenizer(
        name='Mistral SentencePiece BPE', vocab_size=32000, hub=f'mistralai/Mixtral-{size}-v0.1'
      ),
      sequence_length=4096,
    ),
    batch_size=1024,
    optimizer=AdamW(learning_rate=rate, beta1=0.9, beta2=0.95, eps=1e-5),
    schedule=Cosine(warmup=2000, final=0.1),
    init='N(0, 0.02)',
    origins=LIKE_LLAMA2
    | {
      'eps': ours('not published; as Llama 2'),
      'length': ours(f'not published; as Llama 2. The context of the model is {context}'),
      'peak': ours('not published; that of Llama 2 at the active size'),
      'tokenizer': memory(),
    },
    note='Of the training nothing is published (Jiang et al. 2024, arXiv:2401.04088).',
  )

recipe(
  'jamba-v0.1',
  amount=242.2e9,
  data=Text(
    corpus=PublishedCorpus(name='an in-house dataset of web pages, books and code'),
    tokenizer=PublishedTokenizer(name='Jamba BPE', vocab_size=65536, hub='ai21labs/Jamba-v0.1'),
    sequence_length=4096,
  ),
  batch_size=1024,
  optimizer=AdamW(learning_rate=3e-4, beta1=0.9, beta2=0.95, eps=1e-8),
  schedule=Cosine(warmup=2000, final=0.1),
  init='N(0, 0.02); Mamba layers as Mamba',
  origins=LIKE_LLAMA2
  | {
    'eps': ours('not published; as GPT-3'),
    'length': ours('not published; as Llama 2. The context of the model is 262,144'),
    'peak': ours('not published; that of Llama 2 at the active size'),
    'tokenizer': JAMBA.hint('', 'BPE of 64K tokens, digits apart'),
  },
  note='The paper states neither tokens nor optimizer nor rates.',
)

MOE_ORIGINS: Origins = {
  'tokens': derived('27,000 x 300,000 words, ten epochs of the One Billion Word benchmark'),
  'batch': Origin(
    'derived', SHAZEER.at('appendix C.1').source, '"about 300,000 words"; as 15,000 x 20'
  ),
  'length': ours('whole sentences in the paper; 20 is the context of the preset'),
  'steps': SHAZEER.at('appendix C.1'),
  'optimizer': SHAZEER.at('appendix C.1'),
  **each(ours('not published; the defaults of Kingma and Ba 2015'), 'betas', 'eps', 'peak'),
  'minimum': ours('follows from the schedule'),
  'warmup': SHAZEER.at('appendix C.1'),
  'schedule': SHAZEER.at('appendix C.1', '"proportional to the inverse square root of the step"'),
  'decay': ours('none stated'),
  'clip': ours('none stated'),
  'dropout': SHAZEER.at('table 7'),
  'init': ours(),
  'precision': ours(),
  'tokenizer': SHAZEER.at('appendix C.1'),
}

for name in ('moe-lstm-32', 'moe-lstm-256'):
  recipe(
    name,
    amount=8.1e9,
    data=Text(
      corpus=PublishedCorpus(name='One Billion Word benchmark'),
      tokenizer=PublishedTokenizer(name='words of the benchmark', vocab_size=793_471),
      sequence_length=20,
    ),
    batch_size=15_000,
    steps=27_000,
    optimizer=AdamW(
      learning_rate=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, clip=1.0
    ),
    schedule=InverseSquareRoot(warmup=1000),
    dropout=0.1,
    init='embedding N(0, 1), matrices uniform by fan-in, gates 0',
    remat='none',
    origins=MOE_ORIGINS,
    note='The "base learning rate" has no number in the paper. Its softmax is by importance '
    'sampling; here it is exact.',
  )
