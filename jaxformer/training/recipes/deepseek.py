"""DeepSeek-V2 and V2-Lite (DeepSeek-AI 2024, arXiv:2405.04434), DeepSeek-V3 (DeepSeek-AI 2024,
arXiv:2412.19437)."""

from typing import Any

from jaxformer.data import PublishedCorpus, PublishedTokenizer, Text
from jaxformer.training.optimizer import AdamW
from jaxformer.training.recipes.recipe import Origins, Source, derived, each, memory, ours, recipe
from jaxformer.training.schedule import WSD, ScheduleConfig, StepDecay

LITE = Source('README of the published weights', 'deepseek-ai/DeepSeek-V2-Lite')
V2 = Source('a summary of DeepSeek-AI 2024', 'arXiv:2405.04434')
V3 = Source('a summary of DeepSeek-AI 2024', 'arXiv:2412.19437')
LENGTH = 4096
RESET = ours('not published; the default of AdamW')
SHARED: Origins = {
  'eps': RESET,
  'minimum': derived('follows from the schedule'),
  'dropout': ours('none stated'),
}


def _steps(tokens: float, batch: int) -> int:
  return round(tokens / (batch * LENGTH))


def _recipe(
  name: str,
  tokens: float,
  batch: int,
  rate: float,
  schedule: ScheduleConfig,
  tokenizer: PublishedTokenizer,
  origins: Origins,
  **fields: Any,
) -> None:
  recipe(
    name,
    amount=tokens,
    data=Text(
      corpus=PublishedCorpus(name='an in-house corpus, mostly English and Chinese'),
      tokenizer=tokenizer,
      sequence_length=LENGTH,
    ),
    batch_size=batch,
    optimizer=AdamW(
      learning_rate=rate, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0
    ),
    schedule=schedule,
    init='N(0, 0.006)',
    origins=SHARED | origins,
    **fields,
  )


def _decayed(tokens: float, batch: int, hold: float, every: float) -> StepDecay:
  """Times 0.316 after the fraction `hold` of the steps, and again `every` later."""
  steps = _steps(tokens, batch)
  return StepDecay(warmup=2000, hold=round(hold * steps), every=round(every * steps), decay=0.316)


def _byte_pairs(name: str, size: int) -> PublishedTokenizer:
  return PublishedTokenizer(
    name=f'byte-level BPE of {name}', vocab_size=size, hub=f'deepseek-ai/{name}'
  )


_recipe(
  'deepseek-v2-lite',
  5.7e12,
  4608,
  4.2e-4,
  _decayed(5.7e12, 4608, 0.8, 0.1),
  _byte_pairs('DeepSeek-V2-Lite', 102400),
  {
    **each(
      LITE.at('section 6'),
      *('tokens', 'batch', 'length', 'optimizer', 'betas', 'peak', 'warmup', 'schedule'),
      *('decay', 'clip'),
    ),
    'steps': derived('5.7T tokens / (4,608 x 4,096)'),
    'init': V2.hint('section 3.1.2', 'of DeepSeek-V2'),
    'precision': memory('bfloat16'),
    'tokenizer': memory(),
  },
  note='The extension of the context to 128K tokens comes after this training.',
)

_recipe(
  'deepseek-v2',
  8.1e12,
  9216,
  2.4e-4,
  _decayed(8.1e12, 9216, 0.6, 0.3),
  _byte_pairs('DeepSeek-V2', 102400),
  {
    **each(
      V2.hint('section 3.1.2'),
      *('tokens', 'length', 'optimizer', 'peak', 'warmup', 'schedule', 'clip', 'init'),
    ),
    **each(LITE.hint('section 6', 'of DeepSeek-V2-Lite'), 'betas', 'decay'),
    'batch': ours('grows from 2,304 to 9,216 over the first 225B tokens there'),
    'steps': derived('8.1T tokens / (9,216 x 4,096)'),
    'precision': memory('bfloat16'),
    'tokenizer': V2.hint('section 3.1.1', 'byte-level BPE of 100K'),
  },
  note='Without the losses that balance devices and communication, and without the factors on the '
  'latents that the paper mentions and the published weights do not have; the extension of the '
  'context to 128K tokens comes after this training.',
)

_recipe(
  'deepseek-v3',
  14.8e12,
  15360,
  2.2e-4,
  WSD(warmup=2000, decay=4.8 / 14.8, final=0.1),
  _byte_pairs('DeepSeek-V3', 129280),
  {
    **each(V3.hint('section 4.2'), 'tokens', 'length', 'warmup', 'clip', 'decay'),
    **each(memory('from the paper'), 'optimizer', 'betas', 'peak', 'init'),
    'batch': ours('grows from 3,072 to 15,360 over the first 469B tokens there'),
    'steps': derived('14.8T tokens / (15,360 x 4,096)'),
    'schedule': ours(
      'constant for 10T tokens, a cosine to a tenth over 4.3T, and two constants there; a linear '
      'decay over all these 4.8T here'
    ),
    'precision': ours('products in float8 in the paper'),
    'tokenizer': V3.hint('section 4.1', 'byte-level BPE of 128K'),
  },
  note='Without multi-token prediction, a second objective of weight 0.3, then 0.1. The step of '
  'the biases follows the learning rate, and is constant in the paper.',
)
