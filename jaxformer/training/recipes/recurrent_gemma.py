"""RecurrentGemma (Botev et al. 2024)."""

from jaxformer.data import PublishedCorpus, PublishedTokenizer, Text
from jaxformer.training.optimizer import AdamW
from jaxformer.training.recipes.recipe import Origins, Source, derived, each, memory, ours, recipe
from jaxformer.training.schedule import Cosine

CODE = Source('google-deepmind/recurrentgemma', 'repository')

ORIGINS: Origins = {
  'tokens': memory('2T for both sizes'),
  'length': memory(),
  'steps': derived('tokens / (batch x length)'),
  **each(
    ours('not published; as Llama 2'),
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
  ),
  'init': CODE.at('recurrentgemma/jax/modules.py and layers.py'),
  'precision': CODE.hint('recurrentgemma/jax/layers.py', 'the recurrence in float32'),
  'tokenizer': memory('that of Gemma'),
}

for name in ('2b', '9b'):
  recipe(
    f'recurrentgemma-{name}',
    amount=2.0e12,
    data=Text(
      corpus=PublishedCorpus(name='web documents, mathematics and code'),
      tokenizer=PublishedTokenizer(
        name='Gemma SentencePiece BPE', vocab_size=256_000, hub=f'google/recurrentgemma-{name}'
      ),
      sequence_length=8192,
    ),
    batch_size=512,
    optimizer=AdamW(learning_rate=3e-4, beta1=0.9, beta2=0.95, eps=1e-5),
    schedule=Cosine(warmup=2000, final=0.1),
    init='N(0, 1 / fan-in), residual projections N(0, 2 / (layers fan-in)), decays 0.9 to 0.999',
    origins=ORIGINS,
    note='Of optimizer and schedule nothing is published.',
  )
