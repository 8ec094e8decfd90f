"""The text models of Llama 4 (Meta 2025)."""

from jaxformer.data import PublishedCorpus, PublishedTokenizer, Text
from jaxformer.training.optimizer import AdamW
from jaxformer.training.recipes.experts import LIKE_LLAMA2
from jaxformer.training.recipes.recipe import memory, ours, recipe
from jaxformer.training.schedule import Cosine

for name, tokens, hub in (
  ('llama4-scout', 40e12, 'meta-llama/Llama-4-Scout-17B-16E'),
  ('llama4-maverick', 22e12, 'meta-llama/Llama-4-Maverick-17B-128E'),
):
  recipe(
    name,
    amount=tokens,
    data=Text(
      corpus=PublishedCorpus(name="Meta's collection of public, licensed and its own text"),
      tokenizer=PublishedTokenizer(name='Llama 4 BPE', vocab_size=202048, hub=hub),
      sequence_length=8192,
    ),
    batch_size=1024,
    optimizer=AdamW(learning_rate=3e-4, beta1=0.9, beta2=0.95, eps=1e-5),
    schedule=Cosine(warmup=2000, final=0.1),
    init='N(0, 0.02)',
    origins=LIKE_LLAMA2
    | {
      'tokens': memory('as remembered of the model card'),
      'eps': ours('not published; as Llama 2'),
      'length': ours('not published; a chunk of its attention'),
      'peak': ours('not published; that of Llama 2 13B'),
      'tokenizer': memory('the name of the repository; it is gated'),
    },
    note='No paper describes the training. The published models read images too, and their tokens '
    'include those of images.',
  )
