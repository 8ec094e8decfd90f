"""nanoGPT's character-level recipe for a CPU.

Question: does a GPT trained here learn as nanoGPT's does, under its own recipe for laptops? nanoGPT
  publishes a validation loss of
1.88 (an estimate from 20 batches); its recipe run again in PyTorch gave 1.92 over the whole
validation split.

    jaxformer train experiments/nanogpt_cpu.py --data.corpus.path tinyshakespeare.txt

The text is Karpathy's tinyshakespeare.txt, 1,115,394 characters, of which the last tenth validates.
4 layers, 4 heads, width 128, context 64, no offsets, batches of 12 random windows, 2,000 steps.

Cost: three minutes on two CPU cores.
Result: 1.9077 nats a character over the whole validation split after 2,000 steps, 2.0760 after
  1,000 (jax 0.10.2, seed 1337).
"""

from jaxformer.data import ByPosition, Characters, Files, Text
from jaxformer.layers.attention import Attention
from jaxformer.layers.init import Normal
from jaxformer.layers.mlp import Mlp
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.position import LearnedPositions
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group
from jaxformer.training import AdamW, Cosine, Experiment, TrainingConfig

WIDTH, LAYERS, HEADS, CONTEXT = 128, 4, 4, 64
norm = LayerNorm(bias=False)
attention = Attention.Config(heads=HEADS, out_init=Normal(residual=True))
# torch's nn.GELU() is the exact one
mlp = Mlp.Config(hidden=4 * WIDTH, activation='gelu', out_init=Normal(residual=True))
block = Block.Config(branches=(PreNorm(layer=attention, norm=norm), PreNorm(layer=mlp, norm=norm)))

experiment = Experiment(
  model=LanguageModel.Config(
    vocab_size=65,
    width=WIDTH,
    context_length=CONTEXT,
    tied=True,
    positions=LearnedPositions(init=Normal(std=0.02)),
    final_norm=norm,
    stack=(Group(pattern=(block,), repeats=LAYERS),),
  ),
  data=Text(
    corpus=Files(path='tinyshakespeare.txt'),
    tokenizer=Characters(),
    sequence_length=CONTEXT,
    split=ByPosition(fraction=0.1),
    packing='random_windows',
  ),
  optimizer=AdamW(learning_rate=1e-3, beta1=0.9, beta2=0.99, weight_decay=0.1, clip=1.0),
  schedule=Cosine(warmup=100, final=0.1),
  training=TrainingConfig(
    steps=2000, batch_size=12, eval_every=1000, eval_batches=None, checkpoint_every=1000, seed=1337
  ),
)
