"""Llama 2 (Touvron et al. 2023) and Llama 3, 3.1, 3.2 (Grattafiori et al. 2024)."""

from jaxformer.data import PublishedCorpus, PublishedTokenizer, Text
from jaxformer.training.optimizer import AdamW
from jaxformer.training.recipes.recipe import Origin, Origins, Source, derived, each, ours, recipe
from jaxformer.training.schedule import Cosine

LLAMA2 = Source('Touvron et al. 2023', 'arXiv:2307.09288')
LLAMA3 = Source('Grattafiori et al. 2024', 'arXiv:2407.21783')
CARD3 = Source('model card of Llama 3 and 3.1', 'meta-llama/llama3')
CARD32 = Source('model card of Llama 3.2', 'meta-llama/llama-models')
HUB = 'the name of the repository is from memory; it is gated'
INIT = 'N(0, 0.02)'

LLAMA2_ORIGINS: Origins = {
  **each(LLAMA2.at('table 1'), 'tokens', 'length', 'peak'),
  'batch': LLAMA2.at('table 1', '"4M" tokens; the number of sequences is derived'),
  **each(
    LLAMA2.at('section 2.2'),
    'optimizer',
    'betas',
    'eps',
    'minimum',
    'warmup',
    'schedule',
    'decay',
    'clip',
  ),
  'steps': derived('2.0T tokens / (1,024 x 4,096)'),
  **each(ours(), 'dropout', 'init', 'precision'),
  'tokenizer': LLAMA2.at('section 2.2', HUB),
}

for name, rate in (('llama2-7b', 3.0e-4), ('llama2-13b', 3.0e-4), ('llama2-70b', 1.5e-4)):
  recipe(
    name,
    amount=2.0e12,
    data=Text(
      corpus=PublishedCorpus(name='a mix of publicly available sources'),
      tokenizer=PublishedTokenizer(
        name='Llama SentencePiece BPE', vocab_size=32000, hub='meta-llama/Llama-2-7b-hf'
      ),
      sequence_length=4096,
    ),
    batch_size=1024,
    optimizer=AdamW(learning_rate=rate, beta1=0.9, beta2=0.95, eps=1e-5),
    schedule=Cosine(warmup=2000, final=0.1),
    init=INIT,
    origins=LLAMA2_ORIGINS,
  )

# "We use similar recipes to pre-train the 8B and 70B models": of them only the rate is given.
OF_405B = 'stated for 405B only'
OF_LLAMA2 = 'not published; as Llama 2'
SHARED: Origins = {
  **each(ours(OF_LLAMA2), 'betas', 'eps', 'clip'),
  'decay': ours('as Llama 2; the scaling-law runs have 0.1'),
  **each(ours(), 'dropout', 'init'),
  'precision': Origin(
    'secondary', 'a table of recipes of another project', 'bfloat16, gradients summed in float32'
  ),
  'tokenizer': LLAMA3.at('section 3.2', HUB),
  'length': LLAMA3.at('section 3.4.1'),
  'peak': LLAMA3.at('table 3'),
}
TOKENIZER = PublishedTokenizer(
  name='Llama 3 BPE', vocab_size=128256, hub='meta-llama/Meta-Llama-3-8B'
)


def llama3(name: str, tokens: float, batch: int, rate: float, origins: Origins, note: str) -> None:
  """Register a recipe of the Llama 3 family."""
  recipe(
    name,
    amount=tokens,
    data=Text(
      corpus=PublishedCorpus(name="Meta's collection of web pages, code and other text"),
      tokenizer=TOKENIZER,
      sequence_length=8192,
    ),
    batch_size=batch,
    optimizer=AdamW(learning_rate=rate, beta1=0.9, beta2=0.95, eps=1e-5),
    schedule=Cosine(warmup=8000, final=0.01),
    init=INIT,
    origins=SHARED | origins,
    note=note,
  )


for name, rate, after in (
  ('llama3-8b', 3e-4, ''),
  ('llama3-70b', 1.5e-4, ''),
  ('llama3.1-8b', 3e-4, ' A stage at up to 131,072 tokens follows, whose amount is not given.'),
  ('llama3.1-70b', 1.5e-4, ' A stage at up to 131,072 tokens follows, whose amount is not given.'),
):
  llama3(
    name,
    tokens=15e12,
    batch=1024,
    rate=rate,
    origins={
      'tokens': CARD3.at('', '"over 15 trillion tokens"'),
      'batch': ours('8M tokens, the second stage of 405B'),
      'steps': ours('15T tokens / (1,024 x 8,192)'),
      **each(ours(OF_405B), 'optimizer', 'minimum', 'warmup', 'schedule'),
    },
    note='The report gives the peak rate of this size only.' + after,
  )

llama3(
  'llama3.1-405b',
  tokens=15.6e12,
  batch=2048,
  rate=8e-5,
  origins={
    'tokens': LLAMA3.at('section 1'),
    'batch': LLAMA3.at(
      'section 3.4.1', '"4M", from 252M tokens "8M", from 2.87T tokens "16M"; here 16M throughout'
    ),
    'length': LLAMA3.at('section 3.4.1', '4,096 for the first 252M tokens'),
    'steps': ours('15.6T tokens at the final batch size; the cosine of the paper has 1,200,000'),
    'optimizer': LLAMA3.at('section 3.4.1'),
    'minimum': LLAMA3.at('section 3.4.1', 'then linearly to 0 over the last 40M tokens'),
    'warmup': LLAMA3.at('section 3.4.1'),
    'schedule': LLAMA3.at('section 3.4.1'),
    'decay': Origin(
      'secondary', LLAMA3.at('section 3.2.1').source, 'of the scaling-law runs: 0.1 of the rate'
    ),
  },
  note='Batch and length change during the run; here they have their final size from the start. '
  'Six stages to 131,072 tokens, about 800B, and averaged checkpoints follow.',
)

for name in ('llama3.2-1b', 'llama3.2-3b'):
  llama3(
    name,
    tokens=9e12,
    batch=512,
    rate=3e-4,
    origins={
      'tokens': CARD32.at('', '"up to 9 trillion tokens"'),
      'steps': ours('9T tokens / (512 x 8,192)'),
      'batch': ours('4M tokens, as Llama 2'),
      'length': ours('as Llama 3'),
      'peak': ours('as Llama 3 8B'),
      'precision': ours(),
      'tokenizer': CARD32.at('', HUB),
      **each(ours('as Llama 3.1 405B'), 'optimizer', 'minimum', 'warmup', 'schedule'),
    },
    note='The published weights were not trained from scratch: they were pruned from Llama 3.1 8B, '
    'then trained on the logits of 8B and 70B.',
  )
