"""H3 (Fu et al. 2023), as its group configured it later in the repository of Hyena."""

from jaxformer.data import Text
from jaxformer.training.optimizer import AdamW
from jaxformer.training.recipes.gpt import TOKENIZER
from jaxformer.training.recipes.mamba import PILE
from jaxformer.training.recipes.recipe import Origins, Source, derived, each, memory, ours, recipe
from jaxformer.training.schedule import CosineThenConstant

SAFARI = Source('HazyResearch/safari', 'repository')
FILES = SAFARI.at('configs/experiment/pile')

ORIGINS: Origins = {
  'tokens': derived('steps x batch x length; the paper says about 400B (from memory)'),
  **each(FILES, 'batch', 'length', 'steps', 'optimizer', 'peak', 'minimum', 'decay', 'clip'),
  **each(memory('the default of PyTorch; the file of the optimizer was not read'), 'betas', 'eps'),
  'warmup': FILES.noted('1 % of the steps, from 1e-6'),
  'schedule': FILES.noted('cosine over three quarters of the steps, then constant'),
  'dropout': ours(
    'published: embedding 0.1, attention weights 0.1, residual 0; here the embedding only'
  ),
  'init': SAFARI.hint('configs/experiment/pile'),
  'precision': FILES,
  'tokenizer': SAFARI.at('configs/dataset/thepile.yaml', 'padded in the preset'),
}

for name, batch, steps, rate in (
  ('h3-125m', 256, 800_000, 6e-4),
  ('h3-355m', 256, 800_000, 3e-4),
  ('h3-1.3b', 512, 400_000, 2e-4),
  ('h3-2.7b', 512, 400_000, 1.6e-4),
):
  largest = name == 'h3-2.7b'
  changed = ours('published for this size: N(0, sqrt(2 / 5 D)) = N(0, 0.0125)')
  recipe(
    name,
    amount=419.4e9,
    data=Text(corpus=PILE, tokenizer=TOKENIZER, sequence_length=2048),
    batch_size=batch,
    steps=steps,
    optimizer=AdamW(learning_rate=rate, beta1=0.9, beta2=0.999, eps=1e-8),
    schedule=CosineThenConstant(warmup=steps // 100, final=0.1, until=0.75),
    dropout=0.1,
    init='N(0, 0.02), residual projections divided by sqrt(2 layers)',
    precision='bfloat16 mixed, residual stream in float32',
    origins=ORIGINS | ({'init': changed} if largest else {}),
    note='Its layers of attention stand elsewhere than in the released weights, which the preset '
    'follows. State-space parameters have the rate min(0.001, rate) and no decay.',
  )
