"""xLSTM[7:1] (Beck et al. 2024)."""

from jaxformer.data import PublishedCorpus, Text
from jaxformer.training.optimizer import AdamW
from jaxformer.training.recipes.mamba import NEOX
from jaxformer.training.recipes.recipe import Origins, Source, derived, each, memory, ours, recipe
from jaxformer.training.schedule import Cosine

CODE = Source('NX-AI/xlstm', 'xlstm 2.0.6')

ORIGINS: Origins = {
  'tokens': memory('300B of SlimPajama, for the comparison of sizes'),
  **each(memory(), 'batch', 'length', 'optimizer', 'betas', 'eps', 'peak', 'warmup', 'schedule'),
  **each(memory(), 'minimum', 'decay', 'clip', 'tokenizer'),
  'steps': derived('300B tokens / (batch x length)'),
  'dropout': CODE.at('xlstm_block_stack.py', '0'),
  'init': CODE.at('reset_parameters of the layers and of xlstm_lm_model.py'),
  'precision': ours(),
}

for size, peak in (('125m', 3e-3), ('350m', 2e-3), ('760m', 1.5e-3), ('1.3b', 1e-3)):
  recipe(
    f'xlstm-7-1-{size}',
    amount=3.0e11,
    data=Text(corpus=PublishedCorpus(name='SlimPajama'), tokenizer=NEOX, sequence_length=2048),
    batch_size=512,
    optimizer=AdamW(
      learning_rate=peak, beta1=0.9, beta2=0.95, eps=1e-5, weight_decay=0.1, clip=1.0
    ),
    schedule=Cosine(warmup=750, final=0.1),
    init='N(0, 2 / 5 D), residual projections N(0, 4 / (D blocks^2)), no recurrent weights, '
    "forget gates' biases 3 to 6 (mLSTM) and a power law from 5 to -7 (sLSTM)",
    origins=ORIGINS,
    note='The positions of the sLSTM blocks are from secondary sources; the numbers of parameters '
    'agree with those of the paper in all digits that it prints, from memory.',
  )
