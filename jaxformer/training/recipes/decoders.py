"""Dense decoders of 2023 to 2025: Mistral 7B and Nemo, Qwen2.5 and Qwen3, Gemma 2 and 3, OLMo 2
and 3, and SmolLM3. Of most little is published but the amount of data; no report was at hand."""

from jaxformer.data import PublishedCorpus, PublishedTokenizer, Text
from jaxformer.training.optimizer import AdamW
from jaxformer.training.recipes.recipe import Field, Origins, derived, each, memory, ours, recipe
from jaxformer.training.schedule import Cosine

LIKE_LLAMA2: tuple[Field, ...] = (
  'batch',
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
  'init',
  'precision',
)


def decoder(
  name: str,
  *,
  report: str,
  amount: float,
  known: bool = True,
  rate: float,
  length: int,
  tokenizer: PublishedTokenizer,
  corpus: str,
  note: str = '',
) -> None:
  """Register a recipe with the hyperparameters of Llama 2.

  Args:
    report: where the amount is stated, as remembered.
    known: whether an amount is published; else it is chosen.
    rate: peak, that of Llama 2 at the size.
  """
  tokens = memory(f'as remembered of {report}') if known else ours('not published; a round number')
  origins: Origins = {
    **each(ours('not confirmed in a source, or not published; as Llama 2'), *LIKE_LLAMA2),
    'tokens': tokens,
    'steps': derived('tokens / (batch x length)'),
    'length': memory(f'of most of the training, as remembered of {report}'),
    'tokenizer': memory('the name of the repository is from memory'),
  }
  recipe(
    name,
    amount=amount,
    data=Text(corpus=PublishedCorpus(name=corpus), tokenizer=tokenizer, sequence_length=length),
    batch_size=2**22 // length,
    optimizer=AdamW(learning_rate=rate, beta1=0.9, beta2=0.95, eps=1e-5),
    schedule=Cosine(warmup=2000, final=0.1),
    init='N(0, 0.02)',
    origins=origins,
    note=note,
  )


SMALL, LARGE = 3e-4, 1.5e-4  # of Llama 2 up to 13B parameters and at 70B

for name, vocab_size, hub in (
  ('mistral-7b-v0.1', 32000, 'mistralai/Mistral-7B-v0.1'),
  ('mistral-7b-v0.3', 32768, 'mistralai/Mistral-7B-v0.3'),
  ('mistral-nemo-12b', 131072, 'mistralai/Mistral-Nemo-Base-2407'),
):
  decoder(
    name,
    report='Jiang et al. 2023, arXiv:2310.06825',
    amount=2e12,
    known=False,
    rate=SMALL,
    length=8192,
    tokenizer=PublishedTokenizer(name='Mistral BPE', vocab_size=vocab_size, hub=hub),
    corpus='an undisclosed mix',
    note='Of the training nothing is published.',
  )

QWEN = 'the embedding has rows beyond those of the tokenizer'
for name, vocab_size, rate in (
  ('qwen2.5-0.5b', 151936, SMALL),
  ('qwen2.5-1.5b', 151936, SMALL),
  ('qwen2.5-3b', 151936, SMALL),
  ('qwen2.5-7b', 152064, SMALL),
  ('qwen2.5-14b', 152064, SMALL),
  ('qwen2.5-32b', 152064, LARGE),
  ('qwen2.5-72b', 152064, LARGE),
):
  size = name.removeprefix('qwen2.5-').upper()
  decoder(
    name,
    report='Qwen Team 2024, arXiv:2412.15115',
    amount=18e12,
    rate=rate,
    length=4096,
    tokenizer=PublishedTokenizer(
      name='Qwen byte-level BPE', vocab_size=vocab_size, hub=f'Qwen/Qwen2.5-{size}'
    ),
    corpus='an undisclosed mix',
    note=f'A stage of longer sequences follows. The vocabulary: {QWEN}.',
  )

for size, rate in (
  ('0.6B', SMALL),
  ('1.7B', SMALL),
  ('4B', SMALL),
  ('8B', SMALL),
  ('14B', SMALL),
  ('32B', LARGE),
):
  decoder(
    f'qwen3-{size.lower()}',
    report='Qwen Team 2025, arXiv:2505.09388',
    amount=36e12,
    rate=rate,
    length=4096,
    tokenizer=PublishedTokenizer(
      name='Qwen byte-level BPE', vocab_size=151936, hub=f'Qwen/Qwen3-{size}-Base'
    ),
    corpus='an undisclosed mix of 119 languages',
    note=f'A stage of longer sequences follows. The vocabulary: {QWEN}.',
  )

DISTILLED = 'The published weights were trained on the probabilities of a larger model.'
for name, amount, vocab_size, length, hub, rate, note in (
  ('gemma2-2b', 2e12, 256000, 8192, 'gemma-2-2b', SMALL, DISTILLED),
  ('gemma2-9b', 8e12, 256000, 8192, 'gemma-2-9b', SMALL, DISTILLED),
  ('gemma2-27b', 13e12, 256000, 8192, 'gemma-2-27b', LARGE, ''),
  ('gemma3-270m', 6e12, 262144, 32768, 'gemma-3-270m', SMALL, ''),
  ('gemma3-1b', 2e12, 262144, 32768, 'gemma-3-1b-pt', SMALL, DISTILLED),
  ('gemma3-4b', 4e12, 262208, 32768, 'gemma-3-4b-pt', SMALL, DISTILLED),
):
  second = name.startswith('gemma2')
  decoder(
    name,
    report=f'Gemma Team {"2024, arXiv:2408.00118" if second else "2025, arXiv:2503.19786"}',
    amount=amount,
    rate=rate,
    length=length,
    tokenizer=PublishedTokenizer(
      name='Gemma SentencePiece', vocab_size=vocab_size, hub=f'google/{hub}'
    ),
    corpus='an undisclosed mix',
    note=note,
  )

for name, amount, vocab_size, length, hub, rate in (
  ('olmo2-1b', 4e12, 100352, 4096, 'OLMo-2-0425-1B', SMALL),
  ('olmo2-7b', 4e12, 100352, 4096, 'OLMo-2-1124-7B', SMALL),
  ('olmo2-13b', 5e12, 100352, 4096, 'OLMo-2-1124-13B', SMALL),
  ('olmo2-32b', 6e12, 100352, 4096, 'OLMo-2-0325-32B', LARGE),
  ('olmo3-7b', 5.9e12, 100278, 8192, 'Olmo-3-1025-7B', SMALL),
  ('olmo3-32b', 5.5e12, 100278, 8192, 'Olmo-3-1125-32B', LARGE),
):
  second = name.startswith('olmo2')
  decoder(
    name,
    report='OLMo Team 2024, arXiv:2501.00656' if second else 'OLMo Team 2025',
    amount=amount,
    rate=rate,
    length=length,
    tokenizer=PublishedTokenizer(
      name='OLMo byte-level BPE', vocab_size=vocab_size, hub=f'allenai/{hub}'
    ),
    corpus='OLMo-mix' if second else 'Dolma 3',
    note='Stages on smaller mixes follow. The authors publish their configurations, which were not '
    'at hand.',
  )

decoder(
  'smollm3-3b',
  report="the authors' announcement, 2025",
  amount=11.2e12,
  rate=SMALL,
  length=4096,
  tokenizer=PublishedTokenizer(
    name='Llama 3 BPE', vocab_size=128256, hub='HuggingFaceTB/SmolLM3-3B-Base'
  ),
  corpus='web, code and mathematics in three stages',
  note='A stage of longer sequences follows.',
)
