"""GPT-2 (Radford et al. 2019) and GPT-3 (Brown et al. 2020)."""

from jaxformer.data import PublishedCorpus, PublishedTokenizer, Text
from jaxformer.training.optimizer import AdamW
from jaxformer.training.recipes.recipe import Origins, Source, derived, each, ours, recipe
from jaxformer.training.schedule import Cosine, CosineThenConstant

TOKENIZER = PublishedTokenizer(
  name='GPT-2 byte-level BPE', vocab_size=50257, hub='openai-community/gpt2'
)
HUB = 'the name of the repository is from memory'

GPT2 = Source('Radford et al. 2019', 'Language Models are Unsupervised Multitask Learners')
GPT3 = Source('Brown et al. 2020', 'arXiv:2005.14165')
NANOGPT = 'config/train_gpt2.py of karpathy/nanoGPT'
INIT = 'N(0, 0.02), residual projections divided by sqrt(branches)'

GPT2_ORIGINS: Origins = {
  **each(GPT2.at('section 2.3'), 'batch', 'length', 'init'),
  'tokenizer': GPT2.at('sections 2.2, 2.3', HUB),
  'tokens': ours(f'not published; as {NANOGPT}. A blog states 800,000 steps of 512'),
  'steps': ours('300B tokens / (512 x 1,024)'),
  'peak': ours('"manually tuned", not given; nanoGPT (124M), else GPT-3 at the nearest size'),
  'minimum': ours(f'as {NANOGPT} and GPT-3'),
  'warmup': ours(f'as GPT-1 and {NANOGPT}'),
  'dropout': ours(f'as {NANOGPT}; the configuration on Hugging Face has 0.1, as GPT-1'),
  'precision': ours(),
  **each(
    ours(f'not published; as {NANOGPT}'), 'optimizer', 'betas', 'eps', 'schedule', 'decay', 'clip'
  ),
}

for name, rate in (
  ('gpt2', 6e-4),
  ('gpt2-medium', 3e-4),
  ('gpt2-large', 2.5e-4),
  ('gpt2-xl', 2e-4),
):
  recipe(
    name,
    amount=300e9,
    data=Text(corpus=PublishedCorpus(name='WebText'), tokenizer=TOKENIZER, sequence_length=1024),
    batch_size=512,
    optimizer=AdamW(learning_rate=rate, beta1=0.9, beta2=0.95, eps=1e-8),
    schedule=Cosine(warmup=2000, final=0.1),
    init=INIT,
    origins=GPT2_ORIGINS,
    note='Neither rates nor the number of steps of GPT-2 are published.',
  )

LENGTH = 2048
WARMUP = 375e6  # tokens
GPT3_ORIGINS: Origins = {
  'tokens': GPT3.at('table 2.1'),
  'peak': GPT3.at('table 2.1'),
  **each(GPT3.at('appendix B'), 'length', 'optimizer', 'betas', 'eps', 'minimum', 'decay', 'clip'),
  'steps': derived('300B tokens at the final batch size'),
  'warmup': GPT3.at('appendix B', '375M tokens; the number of steps is derived'),
  'schedule': GPT3.at('appendix B', 'cosine over 260B tokens, then constant'),
  'dropout': ours(),
  'init': GPT3.at('section 2.1', 'that of GPT-2'),
  'precision': ours('"half precision" in the contributions only'),
  'tokenizer': GPT3.at('section 2.1', f'that of GPT-2; {HUB}'),
}

TABLE = (  # 2.1: parameters, sequences and tokens of a batch, peak learning rate
  ('gpt3-125m', 125e6, 256, '0.5M', 6.0e-4),
  ('gpt3-350m', 350e6, 256, '0.5M', 3.0e-4),
  ('gpt3-760m', 760e6, 256, '0.5M', 2.5e-4),
  ('gpt3-1.3b', 1.3e9, 512, '1M', 2.0e-4),
  ('gpt3-2.7b', 2.7e9, 512, '1M', 1.6e-4),
  ('gpt3-6.7b', 6.7e9, 1024, '2M', 1.2e-4),
  ('gpt3-13b', 13e9, 1024, '2M', 1.0e-4),
  ('gpt3-175b', 175e9, 1536, '3.2M', 0.6e-4),
)
for name, _, batch, words, rate in TABLE:
  recipe(
    name,
    amount=300e9,
    data=Text(
      corpus=PublishedCorpus(name='filtered Common Crawl, WebText2, Books1, Books2, Wikipedia'),
      tokenizer=TOKENIZER,
      sequence_length=LENGTH,
      packing='stream',
    ),
    batch_size=batch,
    optimizer=AdamW(learning_rate=rate, beta1=0.9, beta2=0.95, eps=1e-8),
    schedule=CosineThenConstant(
      warmup=round(WARMUP / (batch * LENGTH)), final=0.1, until=260 / 300
    ),
    init=INIT,
    origins=GPT3_ORIGINS
    | {'batch': GPT3.at('table 2.1', f'"{words}" tokens; the number of sequences is derived')},
    note='The batch grows linearly from 32k tokens over the first 4B to 12B tokens, by size; here '
    'it has its final size from the start.',
  )
