"""gpt-oss (OpenAI 2025)."""

from jaxformer.data import PublishedCorpus, PublishedTokenizer, Text
from jaxformer.training.optimizer import AdamW
from jaxformer.training.recipes.experts import LIKE_LLAMA2
from jaxformer.training.recipes.recipe import memory, ours, recipe
from jaxformer.training.schedule import Cosine

for name, tokens in ('gpt-oss-20b', 83.7e9), ('gpt-oss-120b', 114.2e9):
  recipe(
    name,
    amount=tokens,
    data=Text(
      corpus=PublishedCorpus(name='text on science, programming and general knowledge'),
      tokenizer=PublishedTokenizer(
        name='o200k_harmony BPE', vocab_size=201088, hub=f'openai/{name}'
      ),
      sequence_length=4096,
    ),
    batch_size=1024,
    optimizer=AdamW(learning_rate=3e-4, beta1=0.9, beta2=0.95, eps=1e-5),
    schedule=Cosine(warmup=2000, final=0.1),
    init='N(0, 0.02)',
    origins=LIKE_LLAMA2
    | {
      'eps': ours('not published; as Llama 2'),
      'length': ours('not published; the context before YaRN. That of the model is 131,072'),
      'peak': ours('not published; that of Llama 2 7B'),
      'tokenizer': memory('as remembered of the model card, arXiv:2508.10925'),
    },
    note='Of the pre-training nothing is published but that it took trillions of tokens; the '
    'released weights result from reinforcement learning after it.',
  )
