"""Parameter counts of the named models, exactly: published integers, and closed forms written here
from the papers' tables.

Nothing is allocated; the sizes come from abstract shapes.
"""

import pytest

from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from tests.models import test_hybrids, test_xlstm, test_zamba2

pytestmark = pytest.mark.quick

EXACT = {
  'gpt2': 124_439_808,
  'gpt3-175b': 174_604_259_328,
  'llama2-7b': 6_738_415_616,
  'llama2-13b': 13_015_864_320,
  'llama2-70b': 68_976_648_192,
  'llama3-8b': 8_030_261_248,
  'llama3.1-8b': 8_030_261_248,
  'llama3-70b': 70_553_706_496,
  'llama3.1-70b': 70_553_706_496,
  'llama3.1-405b': 405_853_388_800,
  'h3-125m': 126_387_456,  # as the authors' README prints it
  'mamba-130m': 129_135_360,
  'mamba-2.8b': 2_768_345_600,
  'mamba2-130m': 128_989_632,
  'mamba2-2.7b': 2_702_599_680,
  'mamba3-1.3b': 1_387_122_688,
  'qwen2.5-0.5b': 494_032_768,
  'qwen2.5-7b': 7_615_616_512,
  'qwen2.5-72b': 72_706_203_648,
  'qwen3-0.6b': 596_049_920,
  'qwen3-8b': 8_190_735_360,
  'gemma2-2b': 2_614_341_888,
  'gemma2-27b': 27_227_128_320,
  'gemma3-270m': 268_098_176,
  'gemma3-1b': 999_885_952,
  'olmo2-1b': 1_484_916_736,
  'olmo2-7b': 7_298_617_344,
  'olmo3-7b': 7_298_011_136,
  'mistral-7b-v0.1': 7_241_732_096,
  'mistral-nemo-12b': 12_247_782_400,
  'smollm3-3b': 3_075_098_624,
  'retnet-1.3b': 1_351_727_104,
  'gla-340m': 374_475_776,
  'gla-7b': 6_741_635_072,
  'hgrn2-340m': 373_916_672,
  'hgrn2-1.3b': 1_364_396_032,
  'deltanet-340m': 374_362_112,
  'deltanet-1.3b': 1_365_677_056,
  'gated-deltanet-340m': 512_272_124,
  'gated-deltanet-1.3b': 1_387_348_732,
  'kda-1.3b': 1_390_941_568,
  'olmo-hybrid-7b': 7_430_870_688,
  'qwen3-next-80b-a3b': 79_674_391_296,
  'qwen3.5-9b': 8_953_803_264,
  'qwen3.5-35b-a3b': 34_660_610_688,
  # with its published layers; those that transformers assumes have 49,133,074,464. And the biases
  # that choose the experts, as for deepseek-v3
  'kimi-linear-48b-a3b': 49_122_675_072 + 26 * 256,
  'xlstm-7b': 6_865_424_896,
  'recurrentgemma-2b': 2_682_862_080,
  'recurrentgemma-9b': 8_579_977_216,
  'deepseek-v2-lite': 15_706_484_224,
  'deepseek-v2': 235_741_434_880,
  # with the biases that choose the experts, which are no parameters in other counts
  'deepseek-v3': 671_026_404_352 + 58 * 256,
  'gpt-oss-20b': 20_914_757_184,
  'gpt-oss-120b': 116_829_156_672,
  'llama4-scout': 107_769_861_120,
  'mixtral-8x7b': 46_702_792_704,
  'jamba-v0.1': 51_570_323_328,
  'rwkv4-169m': 169_342_464,
  'rwkv4-14b': 14_148_597_760,
  'rwkv7-0.1b': 191_034_624,
  'rwkv7-0.4b': 450_767_872,
  'rwkv7-1.5b': 1_527_404_544,
  'rwkv7-2.9b': 2_947_735_040,
  # Conventions: one vector of offsets a gate and offsets on the logits (seq2seq-lstm, gnmt); no
  # offsets, the matrices of the paper's appendix (rnnsearch) or equations (luong); no offsets in
  # attention, one table three times, 37,000 rows (transformer).
  'seq2seq-lstm': 384_112_000,
  'rnnsearch': 80_401_000,
  'luong': 220_000_000,
  'gnmt': 280_858_880,
  'transformer-base': 63_045_632,
  'transformer-big': 214_171_648,
}

# name -> width, layers, context. Heads do not change the count.
GPT = {
  'gpt2': (768, 12, 1024),
  'gpt2-medium': (1024, 24, 1024),
  'gpt2-large': (1280, 36, 1024),
  'gpt2-xl': (1600, 48, 1024),
  'gpt3-125m': (768, 12, 2048),
  'gpt3-350m': (1024, 24, 2048),
  'gpt3-760m': (1536, 24, 2048),
  'gpt3-1.3b': (2048, 24, 2048),
  'gpt3-2.7b': (2560, 32, 2048),
  'gpt3-6.7b': (4096, 32, 2048),
  'gpt3-13b': (5120, 40, 2048),
  'gpt3-175b': (12288, 96, 2048),
}
# name -> width, layers, hidden, heads, key/value heads, vocabulary, tied
LLAMA = {
  'llama2-7b': (4096, 32, 11008, 32, 32, 32000, False),
  'llama2-13b': (5120, 40, 13824, 40, 40, 32000, False),
  'llama2-70b': (8192, 80, 28672, 64, 8, 32000, False),
  'llama3-8b': (4096, 32, 14336, 32, 8, 128256, False),
  'llama3-70b': (8192, 80, 28672, 64, 8, 128256, False),
  'llama3.1-8b': (4096, 32, 14336, 32, 8, 128256, False),
  'llama3.1-70b': (8192, 80, 28672, 64, 8, 128256, False),
  'llama3.1-405b': (16384, 126, 53248, 128, 8, 128256, False),
  'llama3.2-1b': (2048, 16, 8192, 32, 8, 128256, True),
  'llama3.2-3b': (3072, 28, 8192, 24, 8, 128256, True),
}
# name -> width, layers
MAMBA = {
  'mamba-130m': (768, 24),
  'mamba-370m': (1024, 48),
  'mamba-790m': (1536, 48),
  'mamba-1.4b': (2048, 48),
  'mamba-2.8b': (2560, 64),
}
MAMBA2 = {
  'mamba2-130m': (768, 24),
  'mamba2-370m': (1024, 48),
  'mamba2-780m': (1536, 48),
  'mamba2-1.3b': (2048, 48),
  'mamba2-2.7b': (2560, 64),
}
# name -> width, layers
MAMBA3 = {'mamba3-1.3b': (2048, 48)}


# name -> width, which is also the number of units
ZAREMBA = {'lstm-zaremba-small': 200, 'lstm-zaremba-medium': 650, 'lstm-zaremba-large': 1500}


def lstm_count(D, V=10_000, layers=2):
  """Embedding, head and its offsets; a layer: four gates, each with two matrices and one vector of
  offsets."""
  return 2 * V * D + V + layers * 4 * (2 * D * D + D)


# name -> width, layers, of which with attention
H3 = {
  'h3-125m': (768, 12, 1),
  'h3-355m': (1024, 24, 2),
  'h3-1.3b': (2048, 24, 2),
  'h3-2.7b': (2560, 32, 3),
}


def h3_count(D, L, attention, V=50264, N=64):
  """Tied embedding, norm; a block: four projections and a feed-forward of 4 D (12 D^2), their
  offsets (9 D), two norms (4 D); of
  those without attention: B and C of the shift system (2 N D), a skip, and of the diagonal one, for
    N / 2 complex numbers a
  channel, A, B and C (3 N D), a step and a skip."""
  return V * D + 2 * D + L * (12 * D * D + 13 * D) + (L - attention) * (5 * N * D + 3 * D)


# name -> width, layers, hidden, heads, key/value heads, vocabulary, experts, experts a token
MIXTRAL = {
  'mixtral-8x7b': (4096, 32, 14336, 32, 8, 32000, 8, 2),
  'mixtral-8x22b': (6144, 56, 16384, 48, 8, 32000, 8, 2),
}
# name -> width, layers, hidden, heads, key/value heads, vocabulary, experts, experts a token
JAMBA = {
  'jamba-v0.1': (4096, 32, 14336, 32, 8, 65536, 16, 2),
  'jamba-1.5-mini': (4096, 32, 14336, 32, 8, 65536, 16, 2),
  'jamba-1.5-large': (8192, 72, 24576, 64, 8, 65536, 16, 2),
}
# -> width, hidden, experts, experts a token
MOE_LSTM = {'moe-lstm-32': (512, 1024, 32, 4), 'moe-lstm-256': (512, 1024, 256, 4)}


def mixtral_count(D, L, F, H, G, V, E, k, active=False):
  """A Llama whose feed-forward layers are E, of which a token uses k, with a router of D E."""
  return llama_count(D, L, (k if active else E) * F, H, G, V, False) + L * D * E


def jamba_count(D, L, F, H, G, V, E, k, active=False, N=16):
  """Embedding, head and norm; a block in eight with attention, in the others a Mamba layer whose
  dt, B and C have norms (R + 2 N); E feed-forward layers and a router in every second, one in the
  others; two norms."""
  inner, R = 2 * D, D // 16
  mamba = (
    3 * D * inner
    + 5 * inner
    + inner * (R + 2 * N)
    + R * inner
    + inner
    + inner * N
    + inner
    + R
    + 2 * N
  )
  attention = 2 * D * D + 2 * D * G * (D // H)
  experts = L // 2 * (3 * D * F * (k if active else E) + D * E)
  return 2 * V * D + D + L // 8 * (attention + 7 * mamba) + experts + L // 2 * 3 * D * F + L * 2 * D


def moe_lstm_count(D, F, E, k, active=False, V=793_471):
  """Embedding, head and its offsets; two LSTMs; two matrices an expert; logits and their noise."""
  return lstm_count(D, V) + 2 * D * F * (k if active else E) + 2 * D * E


# name -> width, layers
RWKV4 = {
  'rwkv4-169m': (768, 12),
  'rwkv4-430m': (1024, 24),
  'rwkv4-1b5': (2048, 24),
  'rwkv4-3b': (2560, 32),
  'rwkv4-7b': (4096, 32),
  'rwkv4-14b': (5120, 40),
}
# name -> width, layers, hidden
RWKV5 = {
  'rwkv5-0.4b': (1024, 24, 3584),
  'rwkv5-1.5b': (2048, 24, 7168),
  'rwkv5-3b': (2560, 32, 8960),
  'rwkv5-7b': (4096, 32, 14336),
}
# name -> width, layers, hidden, ranks of mixing and decay
RWKV6 = {
  'rwkv6-1.6b': (2048, 24, 7168, 32, 64),
  'rwkv6-3b': (2560, 32, 8960, 32, 64),
  'rwkv6-7b': (4096, 32, 14336, 64, 128),
  'rwkv6-14b': (4096, 61, 14336, 64, 128),
}
# name -> width, layers, ranks of decay, in-context rate, value mixing and gate
RWKV7 = {
  'rwkv7-0.1b': (768, 12, 64, 64, 32, 128),
  'rwkv7-0.4b': (1024, 24, 64, 64, 32, 128),
  'rwkv7-1.5b': (2048, 24, 96, 96, 64, 256),
  'rwkv7-2.9b': (2560, 32, 96, 96, 64, 320),
}


# -> width, layers, vocabularies
SEQ2SEQ = {'seq2seq-lstm': (1000, 4, 160_000, 80_000)}
LUONG = {'luong': (1000, 4, 50_000)}  # -> width, layers, vocabulary
# -> width of the embedding, units, hidden units of the attention, maxout units, vocabulary
RNNSEARCH = {'rnnsearch': (620, 1000, 1000, 500, 30_000)}
GNMT = {'gnmt': (1024, 8, 32_000)}  # -> width, layers, vocabulary
# -> width, layers, hidden
TRANSFORMER = {'transformer-base': (512, 6, 2048), 'transformer-big': (1024, 6, 4096)}


def gates(inputs, units):
  """Of an LSTM."""
  return 4 * ((inputs + units) * units + units)


def seq2seq_count(D, L, S, V):
  """Two embeddings, head and its offsets; as many LSTMs on both sides."""
  return S * D + V * D + V * D + V + 2 * L * gates(D, D)


def luong_count(D, L, V):
  """Two embeddings and the head; as many LSTMs without offsets on both sides, one of which reads
  what is fed back too; a matrix for [c, h]."""
  return 3 * V * D + 2 * L * 8 * D * D + 4 * D * D + 2 * D * D


def rnnsearch_count(m, n, A, maxout, V):
  """Two embeddings and the head; GRUs of three gates, two that read m and one that reads m and 2 n;
  W_a, U_a and v_a; W_s; U_o, V_o and C_o."""
  gru = 2 * 3 * (m * n + n * n) + 3 * (m * n + n * n + 2 * n * n)
  return (
    2 * V * m + maxout * V + gru + (n * A + 2 * n * A + A) + n * n + 2 * maxout * (n + m + 2 * n)
  )


def gnmt_count(D, L, V):
  """Two embeddings, head and its offsets; LSTMs: two at the bottom of the encoder, one that reads
  both, L - 2 more; L that read a context too; two matrices and a vector of attention."""
  return 3 * V * D + V + L * gates(D, D) + gates(2 * D, D) + L * gates(2 * D, D) + 2 * D * D + D


def transformer_count(D, L, F, V=37_000):
  """One table; of the encoder's layers four projections, a feed-forward with offsets and two norms;
  of the decoder's four projections and a norm more."""
  encoder = 4 * D * D + 2 * D * F + F + D + 4 * D
  return V * D + L * (2 * encoder + 4 * D * D + 2 * D)


def gpt_count(D, L, T, V=50257):
  """Embedding, positions; a block: q, k, v, o and a feed-forward of 4 D (12 D^2), their offsets (9
  D), two norms (4 D); a norm."""
  return V * D + T * D + L * (12 * D * D + 13 * D) + 2 * D


def llama_count(D, L, F, H, G, V, tied):
  """Embedding and head; a block: q and o (2 D^2), k and v of G heads, three projections of the
  feed-forward, two norms; a norm."""
  return V * D * (1 if tied else 2) + L * (2 * D * D + 2 * D * G * (D // H) + 3 * D * F + 2 * D) + D


def mamba_count(D, L, N=16, V=50280):
  """Embedding; a block of 2 D channels: in twice and out (6 D^2), four taps with offsets and D (12
  D), [dt, B, C] of rank D / 16, dt with offsets, rates, a norm; a norm."""
  R, inner = D // 16, 2 * D
  return (
    V * D
    + L * (3 * D * inner + 6 * inner + inner * (R + 2 * N) + R * inner + inner + inner * N + D)
    + D
  )


def mamba2_count(D, L, N=128, P=64, V=50288):
  """Embedding; a block of 2 D channels in heads of P: in ([z, x, B, C, dt]) and out, four taps with
  offsets over [x, B, C], three numbers a head, the gated norm, a norm; a norm."""
  inner, H = 2 * D, 2 * D // P
  return (
    V * D
    + L * (D * (2 * inner + 2 * N + H) + inner * D + 5 * (inner + 2 * N) + 3 * H + inner + D)
    + D
  )


def mamba3_count(D, L, N=128, P=64, V=32000):
  """Embedding and head; a block of 2 D channels in heads of P: in ([z, x, B, C, dt, A, lambda,
  theta], N / 4 angles) and out, biases of B and C, two numbers a head, norms of B and C, a norm; a
  norm."""
  inner, H = 2 * D, 2 * D // P
  into = 2 * inner + 2 * N + 3 * H + N // 4
  return 2 * V * D + L * (D * into + inner * D + 2 * H * N + 2 * H + 2 * N + D) + D


def rwkv4_count(D, L, V=50277):
  """Embedding and head; a block: r, k, v, o and r, k, v of channels of 4 D (4 + 1 + 8 D^2), five
  mixes, decay and bonus, two norms (11 D); two norms."""
  return 2 * V * D + 13 * D * D * L + D * (11 * L + 4)


def rwkv5_count(D, L, F, V=65536):
  """Embedding and head; a block: r, k, v, g, o and r of channels (6 D^2), k and v of channels (2 D
  F), six mixes, decay and bonus, a norm of heads and two of the block (14 D); two norms."""
  return 2 * V * D + L * (6 * D * D + 2 * D * F + 14 * D) + 4 * D


def rwkv6_count(D, L, F, M, R, V=65536):
  """Those of RWKV-5; in a block two more mixes (2 D) and low-rank pairs, five of mixing and one of
  the decay."""
  return rwkv5_count(D, L, F, V) + L * (2 * D + 10 * D * M + 2 * D * R)


def rwkv7_count(D, L, w, a, v, g, V=65536):
  """Embedding and head; a block: r, k, v, o and channels of 4 D (12 D^2), low-rank pairs, six mixes
  and one, w0, a0, v0, three vectors of keys and bonus, a norm of heads and two of the block (19 D);
  the first block mixes in no values; two norms."""
  return 2 * V * D + L * (12 * D * D + 2 * D * (w + a + v + g) + 19 * D) - (2 * v + 1) * D + 4 * D


# name -> width, layers, hidden, heads, key/value heads, head dim, vocabulary, tied
QWEN2 = {
  'qwen2.5-0.5b': (896, 24, 4864, 14, 2, 64, 151936, True),
  'qwen2.5-1.5b': (1536, 28, 8960, 12, 2, 128, 151936, True),
  'qwen2.5-3b': (2048, 36, 11008, 16, 2, 128, 151936, True),
  'qwen2.5-7b': (3584, 28, 18944, 28, 4, 128, 152064, False),
  'qwen2.5-14b': (5120, 48, 13824, 40, 8, 128, 152064, False),
  'qwen2.5-32b': (5120, 64, 27648, 40, 8, 128, 152064, False),
  'qwen2.5-72b': (8192, 80, 29568, 64, 8, 128, 152064, False),
}
QWEN3 = {
  'qwen3-0.6b': (1024, 28, 3072, 16, 8, 128, 151936, True),
  'qwen3-1.7b': (2048, 28, 6144, 16, 8, 128, 151936, True),
  'qwen3-4b': (2560, 36, 9728, 32, 8, 128, 151936, True),
  'qwen3-8b': (4096, 36, 12288, 32, 8, 128, 151936, False),
  'qwen3-14b': (5120, 40, 17408, 40, 8, 128, 151936, False),
  'qwen3-32b': (5120, 64, 25600, 64, 8, 128, 151936, False),
}
GEMMA2 = {
  'gemma2-2b': (2304, 26, 9216, 8, 4, 256, 256000, True),
  'gemma2-9b': (3584, 42, 14336, 16, 8, 256, 256000, True),
  'gemma2-27b': (4608, 46, 36864, 32, 16, 128, 256000, True),
}
GEMMA3 = {
  'gemma3-270m': (640, 18, 2048, 4, 1, 256, 262144, True),
  'gemma3-1b': (1152, 26, 6912, 4, 1, 256, 262144, True),
  'gemma3-4b': (2560, 34, 10240, 8, 4, 256, 262208, True),
}
OLMO = {
  'olmo2-1b': (2048, 16, 8192, 16, 16, 128, 100352, False),
  'olmo2-7b': (4096, 32, 11008, 32, 32, 128, 100352, False),
  'olmo2-13b': (5120, 40, 13824, 40, 40, 128, 100352, False),
  'olmo2-32b': (5120, 64, 27648, 40, 8, 128, 100352, False),
  'olmo3-7b': (4096, 32, 11008, 32, 32, 128, 100278, False),
  'olmo3-32b': (5120, 64, 27648, 40, 8, 128, 100278, False),
}
DENSE = {
  'mistral-7b-v0.1': (4096, 32, 14336, 32, 8, 128, 32000, False),
  'mistral-7b-v0.3': (4096, 32, 14336, 32, 8, 128, 32768, False),
  'mistral-nemo-12b': (5120, 40, 14336, 32, 8, 128, 131072, False),
  'smollm3-3b': (2048, 36, 11008, 16, 4, 128, 128256, True),
}


def dense_count(D, L, F, H, G, K, V, tied, norms=2, extra=0):
  """Embedding, and head unless tied; a block: q and o (2 D H K), k and v (2 D G K), three matrices
  of F, its norms, and `extra`; the final norm."""
  block = 2 * D * K * (H + G) + 3 * D * F + norms * D + extra
  return (1 if tied else 2) * V * D + L * block + D


def qwen2_count(D, L, F, H, G, K, *rest):
  """With biases of q, k and v."""
  return dense_count(D, L, F, H, G, K, *rest, extra=K * (H + 2 * G))


def qwen3_count(D, L, F, H, G, K, *rest):
  """With norms of one head's query and key."""
  return dense_count(D, L, F, H, G, K, *rest, extra=2 * K)


def gemma2_count(*sizes):
  """With four norms in a block."""
  return dense_count(*sizes, norms=4)


def gemma3_count(D, L, F, H, G, K, *rest):
  """With four norms in a block, and those of one head's query and key."""
  return dense_count(D, L, F, H, G, K, *rest, norms=4, extra=2 * K)


def olmo_count(D, L, F, H, G, K, *rest):
  """With norms of all queries and of all keys."""
  return dense_count(D, L, F, H, G, K, *rest, extra=K * (H + G))


# vocabulary, width, layers, heads, key/value heads, hidden units, of experts, and their number
LLAMA4_MAVERICK = (202048, 5120, 48, 40, 8, 16384, 8192, 128)
MINIMAX = (200064, 6144, 80, 64, 8, 9216, 32)


def llama4_count(V, D, L, H, G, F, E_hidden, E):
  """Every second layer has experts beside a shared one; heads of 128, no biases."""
  attention = 2 * D * 128 * (H + G)
  sparse = E * D + 3 * D * E_hidden * (E + 1)
  return 2 * V * D + L * (attention + 2 * D) + L // 2 * (3 * D * F + sparse) + D


def minimax_count(V, D, L, H, G, F, E):
  """Seven of eight layers have lightning attention, with a gate and a norm; experts everywhere."""
  full = 2 * D * 128 * (H + G)
  linear = 5 * D * 128 * H + 128 * H
  experts = E * D + 3 * D * F * E
  return 2 * V * D + L // 8 * full + (L - L // 8) * linear + L * (experts + 2 * D) + D


COUNTED = {
  name: formula(*sizes)
  for formula, table in (
    (gpt_count, GPT),
    (llama_count, LLAMA),
    (qwen2_count, QWEN2),
    (qwen3_count, QWEN3),
    (gemma2_count, GEMMA2),
    (gemma3_count, GEMMA3),
    (olmo_count, OLMO),
    (dense_count, DENSE),
    (lstm_count, {n: (d,) for n, d in ZAREMBA.items()}),
    (h3_count, H3),
    (mamba_count, MAMBA),
    (mamba2_count, MAMBA2),
    (mamba3_count, MAMBA3),
    (rwkv4_count, RWKV4),
    (rwkv5_count, RWKV5),
    (rwkv6_count, RWKV6),
    (rwkv7_count, RWKV7),
    (mixtral_count, MIXTRAL),
    (jamba_count, JAMBA),
    (moe_lstm_count, MOE_LSTM),
    (seq2seq_count, SEQ2SEQ),
    (luong_count, LUONG),
    (rnnsearch_count, RNNSEARCH),
    (gnmt_count, GNMT),
    (transformer_count, TRANSFORMER),
    (llama4_count, {'llama4-maverick': LLAMA4_MAVERICK}),
    (minimax_count, {'minimax-text-01': MINIMAX}),
  )
  for name, sizes in table.items()
}
COUNTED |= test_hybrids.COUNTED | test_xlstm.COUNTED | test_zamba2.COUNTED


@pytest.mark.parametrize('name', COUNTED)
def test_closed_form(name):
  assert define(PRESETS[name].model).size == COUNTED[name]


def test_every_preset_is_counted():
  """By a closed form, or as published."""
  kinds = LanguageModel.Config | EncoderDecoder.Config
  named = {n for n in PRESETS if isinstance(PRESETS[n].model, kinds) and not n.endswith('-tiny')}
  assert named - set(COUNTED) <= set(EXACT)
  assert set(COUNTED) <= named


@pytest.mark.parametrize('name', EXACT)
def test_published(name):
  assert define(PRESETS[name].model).size == EXACT[name]


@pytest.mark.parametrize('name', ZAREMBA)
def test_zaremba_in_millions(name):
  """20M and 66M parameters, as papers that compare with them quote medium and large."""
  assert {200: 4.65e6, 650: 19.8e6, 1500: 66.0e6}[ZAREMBA[name]] == pytest.approx(
    lstm_count(ZAREMBA[name]), rel=0.003
  )


@pytest.mark.parametrize(
  ('name', 'billions'),
  [('rwkv5-0.4b', 0.46), ('rwkv5-7b', 7.5), ('rwkv6-1.6b', 1.6), ('rwkv6-3b', 3.1)],
)
def test_eagle_and_finch_in_billions(name, billions):
  """As the paper's abstract has them; and the hidden sizes above are those of the official rule."""
  assert COUNTED[name] == pytest.approx(billions * 1e9, rel=0.005)
  D, _, F = (RWKV5 | RWKV6)[name][:3]
  assert int((D * 3.5) // 32 * 32) == F


@pytest.mark.parametrize(
  ('name', 'attention'),
  [('h3-125m', {6}), ('h3-355m', {8, 16}), ('h3-1.3b', {8, 16}), ('h3-2.7b', {8, 16, 24})],
)
def test_h3_attends_in_the_published_places(name, attention):
  layers = [
    b.branches[0].layer.tag
    for g in PRESETS[name].model.stack
    for _ in range(g.repeats)
    for b in g.pattern
  ]
  assert {i for i, tag in enumerate(layers) if tag == 'Attention'} == attention
  assert len(layers) == H3[name][1]


@pytest.mark.parametrize(
  ('name', 'width', 'heads'),
  [
    ('llama3.2-1b', 64, 32),
    ('llama3.2-3b', 128, 24),
    ('gpt3-1.3b', 128, 16),
    ('gpt3-13b', 128, 40),
  ],
)
def test_head_sizes(name, width, heads):
  """Head counts leave no trace in the totals; the papers give these."""
  model = PRESETS[name].model
  attention = model.stack[0].pattern[0].branches[0].layer
  assert (attention.head_size(model.width), attention.heads) == (width, heads)


@pytest.mark.parametrize(
  ('width', 'factor', 'multiple', 'hidden'),
  [
    (4096, 1.0, 256, 11008),
    (5120, 1.0, 256, 13824),
    (8192, 1.3, 4096, 28672),
    (4096, 1.3, 1024, 14336),
  ],
)
def test_llama_hidden_sizes_follow_the_published_rule(width, factor, multiple, hidden):
  """Two thirds of 4 D, times a factor, rounded up."""
  raw = int(factor * int(2 * 4 * width / 3))
  assert -(-raw // multiple) * multiple == hidden
  assert hidden in {m[2] for m in LLAMA.values() if m[0] == width}


@pytest.mark.parametrize(
  ('name', 'formula', 'sizes', 'published'),
  [
    ('mixtral-8x7b', mixtral_count, MIXTRAL, 12_879_925_248),
    ('mixtral-8x22b', mixtral_count, MIXTRAL, None),
    ('jamba-v0.1', jamba_count, JAMBA, 12_110_311_296),
    ('jamba-1.5-large', jamba_count, JAMBA, None),
    ('moe-lstm-256', moe_lstm_count, MOE_LSTM, None),
  ],
)
def test_mixtures_use_some_of_their_experts(name, formula, sizes, published):
  active = define(PRESETS[name].model).active_size
  assert active == formula(*sizes[name], active=True)
  assert published in (None, active)


def test_jamba_is_as_published():
  """Attention in layers 4, 12, 20, 28; experts in every second layer; one period stored, scanned
  four times."""
  model = PRESETS['jamba-v0.1'].model
  (group,) = model.stack
  assert (len(group.pattern), group.repeats) == (8, 4)
  blocks = group.pattern * group.repeats
  assert [i for i, b in enumerate(blocks) if b.branches[0].layer.tag == 'Attention'] == [
    4,
    12,
    20,
    28,
  ]
  assert [i for i, b in enumerate(blocks) if b.branches[1].layer.tag == 'Moe'] == list(
    range(1, 32, 2)
  )


def test_dense_models_use_all_their_parameters():
  for name in ('gpt2', 'llama3.2-1b'):
    assert define(PRESETS[name].model).active_size == define(PRESETS[name].model).size
