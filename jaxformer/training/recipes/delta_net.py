"""DeltaNet (Yang et al. 2024), Gated DeltaNet (Yang et al. 2025) and Kimi Delta Attention alone."""

from jaxformer.data import PublishedCorpus, Text
from jaxformer.training.optimizer import AdamW
from jaxformer.training.recipes.linear_attention import FLA, INIT, LENGTH, MISTRAL, SLIM_PAJAMA
from jaxformer.training.recipes.recipe import Origins, Source, derived, each, memory, ours, recipe
from jaxformer.training.schedule import Cosine

DELTA = 'Yang et al. 2024, arXiv:2406.06484'
GATED = 'Yang et al. 2025, arXiv:2412.06464'
SUMMARY = Source('a summary of Yang et al. 2024', 'arXiv:2406.06484')
FINE_WEB = PublishedCorpus(name='FineWeb-Edu')
FLA_INIT = FLA.hint('fla/models', '_init_weights of its models')
SAME: Origins = {
  'steps': derived('tokens / (batch x length)'),
  **each(ours('not known; as GPT-3'), 'betas', 'eps'),
  **each(ours('not known'), 'dropout', 'precision'),
  'init': FLA_INIT,
}

for name, amount, batch in (  # sequences
  ('deltanet-340m', 15e9, 256),
  ('deltanet-1.3b', 100e9, 1024),
):
  recipe(
    name,
    amount=amount,
    data=Text(corpus=SLIM_PAJAMA, tokenizer=MISTRAL, sequence_length=LENGTH),
    batch_size=batch,
    optimizer=AdamW(learning_rate=3e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.01),
    schedule=Cosine(warmup=round(amount / 100 / (batch * LENGTH)), final=0.1),
    init=INIT,
    origins=SAME
    | {
      'tokens': SUMMARY.hint(''),
      'batch': SUMMARY.hint('', '0.5M tokens')
      if name == 'deltanet-340m'
      else memory(f'2M tokens, as remembered of {DELTA}'),
      **each(
        memory(f'as remembered of {DELTA}'),
        'length',
        'optimizer',
        'peak',
        'minimum',
        'schedule',
        'decay',
        'clip',
      ),
      'warmup': ours('a hundredth of the tokens; that of the paper is not known'),
      'tokenizer': SUMMARY.hint('', 'SlimPajama in tokens of Mistral'),
    },
  )

for name, source in (
  ('gated-deltanet-340m', ours('not published; as that of 1.3B parameters')),
  ('gated-deltanet-1.3b', memory(f'as remembered of {GATED}')),
  ('kda-1.3b', ours('not published for this size; as Gated DeltaNet')),
):
  recipe(
    name,
    amount=15e9 if name == 'gated-deltanet-340m' else 100e9,
    data=Text(corpus=FINE_WEB, tokenizer=MISTRAL, sequence_length=LENGTH),
    batch_size=256,
    optimizer=AdamW(learning_rate=4e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1),
    schedule=Cosine(warmup=round(1e9 / (256 * LENGTH)), final=0.1),
    init=INIT,
    origins=SAME
    | each(
      source,
      'batch',
      'length',
      'optimizer',
      'peak',
      'minimum',
      'warmup',
      'schedule',
      'decay',
      'clip',
    )
    | {
      'tokens': ours('as DeltaNet of this size') if name == 'gated-deltanet-340m' else source,
      'tokenizer': ours('the paper has that of Llama 2, as remembered, which is not open'),
    },
    note=''
    if name == 'gated-deltanet-1.3b'
    else 'The preset is a model of the flash-linear-attention library.',
  )
