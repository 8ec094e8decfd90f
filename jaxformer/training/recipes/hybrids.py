"""Hybrids of recurrences and attention whose training is published in few words: Jamba 1.5 (Jamba
Team 2024), Zamba2 (Glorioso et al. 2024), Nemotron-H (NVIDIA 2025), LFM2 (Liquid AI 2025), Granite
4 H (IBM 2025), Falcon-H1 (Zuo et al. 2025), OLMo Hybrid (Ai2 2025), Qwen3-Next and Qwen3.5 (Qwen
Team 2025, 2026) and Kimi Linear (Kimi Team 2025)."""

from jaxformer.data import PublishedCorpus, PublishedTokenizer, Text
from jaxformer.training.optimizer import AdamW
from jaxformer.training.recipes.recipe import Field, Origin, Origins, each, memory, ours, recipe
from jaxformer.training.schedule import WSD, Cosine, ScheduleConfig

REST: tuple[Field, ...] = (
  'batch',
  'steps',
  'optimizer',
  'betas',
  'eps',
  'peak',
  'minimum',
  'warmup',
  'schedule',
  'decay',
  'clip',
  'dropout',
  'precision',
)
LLAMA2 = 'not published; as Llama 2'
LIKE_LLAMA2 = Cosine(warmup=2000, final=0.1)
CONFIG = Origin('secondary', 'config.json of the published weights', 'initializer_range')

README = Origin('published', 'Zyphra/Zamba2 (repository), README.md')


def hybrid(
  name: str,
  tokens: float,
  rate: float,
  tokenizer: PublishedTokenizer,
  origins: Origins,
  *,
  rows: int = 1024,
  length: int = 4096,
  schedule: ScheduleConfig = LIKE_LLAMA2,
  init: str = 'N(0, 0.02); Mamba layers as Mamba',
  note: str = 'Of the training little is published.',
) -> None:
  """Register a recipe. What `origins` does not name is that of Llama 2."""
  recipe(
    name,
    amount=tokens,
    data=Text(
      corpus=PublishedCorpus(name="the authors' collection of web pages, code and other text"),
      tokenizer=tokenizer,
      sequence_length=length,
    ),
    batch_size=rows,
    optimizer=AdamW(learning_rate=rate, beta1=0.9, beta2=0.95),
    schedule=schedule,
    init=init,
    origins={**each(ours(LLAMA2), *REST, 'length'), 'init': CONFIG, **origins},
    note=note,
  )


BY_SIZE: Origins = {'tokens': ours('not published; 20 per active parameter'), 'tokenizer': memory()}
for size, tokens, rate in (('mini', 242.2e9, 3e-4), ('large', 1.87e12, 1.5e-4)):
  hybrid(
    f'jamba-1.5-{size}',
    tokens,
    rate,
    PublishedTokenizer(
      name='Jamba BPE', vocab_size=65536, hub=f'ai21labs/AI21-Jamba-1.5-{size.title()}'
    ),
    BY_SIZE,
  )

RECALLED: tuple[Field, ...] = (
  'tokens',
  'batch',
  'length',
  'optimizer',
  'betas',
  'peak',
  'minimum',
  'warmup',
  'schedule',
  'decay',
)
NEMOTRON: Origins = {
  **each(memory('from the report, not read again'), *RECALLED),
  'steps': ours('follows from tokens, batch and length'),
  'tokenizer': memory('the tokenizer of Mistral NeMo'),
}
PRUNED: Origins = {'tokens': ours('pruned from a larger one and distilled; as the larger one')}
for size, tokens, origins in (
  ('4b', 15e12, NEMOTRON | PRUNED),
  ('8b', 15e12, NEMOTRON),
  ('47b', 20e12, NEMOTRON | PRUNED),
  ('56b', 20e12, NEMOTRON),
):
  hybrid(
    f'nemotron-h-{size}',
    tokens,
    8e-4,
    PublishedTokenizer(
      name='Nemotron-H BPE', vocab_size=131072, hub=f'nvidia/Nemotron-H-{size.upper()}-Base-8K'
    ),
    origins,
    rows=768,
    length=8192,
    schedule=WSD(warmup=1300, decay=0.2, final=0.01),
  )

LFM2: Origins = {
  'tokens': memory('from the announcement, not read again'),
  'tokenizer': memory(),
  'init': ours('N(0, 0.02), and the convolutions as PyTorch'),
}
for size, rate in (('350m', 6e-4), ('700m', 4e-4), ('1.2b', 3e-4)):
  hybrid(
    f'lfm2-{size}',
    10e12,
    rate,
    PublishedTokenizer(name='LFM2 BPE', vocab_size=65536, hub=f'LiquidAI/LFM2-{size.upper()}'),
    LFM2 | {'peak': ours('not published; between those of GPT-3 at these sizes and of Llama 2')},
    init='N(0, 0.02); convolutions uniform by fan-in',
  )

GRANITE: Origins = {
  'tokens': Origin('secondary', 'a summary of the model card of Granite 4 H', '"15 trillion"'),
  'tokenizer': memory(),
}
for size, params, rate in (('micro', '3b', 3e-4), ('tiny', '7b', 3e-4), ('small', '32b', 1.5e-4)):
  hybrid(
    f'granite-4-h-{size}-{params}',
    15e12,
    rate,
    PublishedTokenizer(
      name='Granite 4 BPE', vocab_size=100_352, hub=f'ibm-granite/granite-4.0-h-{size}-base'
    ),
    GRANITE | {'peak': ours('not published in a source that was read; as Llama 2')},
    init='N(0, 0.1); Mamba layers as Mamba',
  )

hybrid(
  'falcon-h1-0.5b',
  2.5e12,
  2.56e-4,
  PublishedTokenizer(name='Falcon-H1 BPE', vocab_size=32784, hub='tiiuae/Falcon-H1-0.5B-Base'),
  {
    'tokens': memory('from the report, not read again'),
    'peak': memory('256e-6 at the base model, from the report, not read again'),
    'tokenizer': memory(),
  },
  note='The report trains with rates and decays of their own per group of parameters, beside the '
  'multipliers that the preset has; here all have one.',
)

hybrid(
  'olmo-hybrid-7b',
  5.5e12,
  3e-4,
  PublishedTokenizer(name='OLMo byte-level BPE', vocab_size=100_352, hub='allenai/Olmo-Hybrid-7B'),
  {
    'tokens': memory('about those of OLMo 3 7B, not read again'),
    'peak': ours('not published in a source that was read; as Llama 2'),
    'tokenizer': memory(),
    'init': ours('N(0, 0.02) as transformers, and the decays as there'),
  },
  init='N(0, 0.02); decays as gated DeltaNet',
)

QWEN: Origins = {
  'tokens': ours('not published in a source that was read; as Qwen3'),
  'peak': ours('not published in a source that was read; as Llama 2 at the active size'),
  'tokenizer': memory('the name of the repository'),
  'init': ours('N(0, 0.02) as transformers, and the decays as there'),
}
QWEN_INIT = 'N(0, 0.02); decays uniform in (0.01, 16), their steps start at softplus(1)'
hybrid(
  'qwen3-next-80b-a3b',
  15e12,
  3e-4,
  PublishedTokenizer(
    name='Qwen byte-level BPE', vocab_size=151_936, hub='Qwen/Qwen3-Next-80B-A3B-Instruct'
  ),
  QWEN | {'tokens': memory('as remembered of the announcement')},
  init=QWEN_INIT,
  note='The announcement has no settings of the optimizer. The published models predict several '
  'tokens in training.',
)
for name, size in (('qwen3.5-9b', '9B'), ('qwen3.5-35b-a3b', '35B-A3B')):
  hybrid(
    name,
    36e12,
    3e-4,
    PublishedTokenizer(name='Qwen byte-level BPE', vocab_size=248_320, hub=f'Qwen/Qwen3.5-{size}'),
    QWEN,
    init=QWEN_INIT,
    note='Of the training little is published. The published models read images too, and predict '
    'several tokens in training.',
  )

hybrid(
  'kimi-linear-48b-a3b',
  5.7e12,
  3e-4,
  PublishedTokenizer(
    name='Kimi BPE', vocab_size=163_840, hub='moonshotai/Kimi-Linear-48B-A3B-Instruct'
  ),
  {
    'tokens': Origin('published', 'README of MoonshotAI/Kimi-Linear', '"trained with 5.7T tokens"'),
    'peak': ours('not published in a source that was read; as Llama 2 at the active size'),
    'tokenizer': memory('the name of the repository'),
    'init': ours('N(0, 0.02) as transformers, and the decays as there'),
  },
  init='N(0, 0.02); decays as gated DeltaNet',
  note='The report trains with another optimizer, MuonClip, as remembered; here it is AdamW.',
)

hybrid(
  'zamba2-2.7b',
  3e12,
  3e-4,
  PublishedTokenizer(name='Mistral BPE', vocab_size=32000, hub='mistralai/Mistral-7B-v0.1'),
  {
    'tokens': README.noted('3T tokens, and 100B to anneal'),
    'tokenizer': README.noted('Mistral v0.1'),
    'init': ours('the default of transformers'),
  },
  note='Of the training little is published; the sizes are from secondary sources.',
)
