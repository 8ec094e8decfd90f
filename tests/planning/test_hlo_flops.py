"""FLOPs from HLO text: products with the rounds of their loops, as the TPU's compiler writes them
(convolutions) and others do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxformer.planning.hlo_flops import compiled_flops

LOOP = """HloModule m

%body (p: (s32[], bf16[2,8,16], bf16[16,32])) -> (s32[], bf16[2,8,16], bf16[16,32]) {
  %p = (s32[], bf16[2,8,16]{2,1,0}, bf16[16,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[2,8,16]{2,1,0} get-tuple-element(%p), index=1
  %w = bf16[16,32]{1,0} get-tuple-element(%p), index=2
  %w3 = bf16[16,32,1]{1,0,2} bitcast(%w)
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %h = bf16[2,8,32]{2,1,0} convolution(%x, %w3), window={size=1}, dim_labels=0bf_io0->0bf
  ROOT %t = (s32[], bf16[2,8,16]{2,1,0}, bf16[16,32]{1,0}) tuple(%next, %x, %w)
}

%condition (p: (s32[], bf16[2,8,16], bf16[16,32])) -> pred[] {
  %p.1 = (s32[], bf16[2,8,16]{2,1,0}, bf16[16,32]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %last = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %last), direction=LT
}

ENTRY %main (x: bf16[2,8,16], w: bf16[16,32]) -> bf16[2,8,16] {
  %x.1 = bf16[2,8,16]{2,1,0} parameter(0)
  %w.1 = bf16[16,32]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %state = (s32[], bf16[2,8,16]{2,1,0}, bf16[16,32]{1,0}) tuple(%zero, %x.1, %w.1)
  %loop = (s32[], bf16[2,8,16]{2,1,0}, bf16[16,32]{1,0}) while(%state), condition=%condition, body=%body
  %kernel = f32[8] custom-call(%x.1), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"1000"}}
  %silent_kernel.7 = f32[8,16]{1,0} custom-call(%x.1), custom_call_target="tpu_custom_call", backend_config={}
  %moved = f32[8,16]{1,0} custom-call(%x.1), custom_call_target="ConcatBitcast"
  ROOT %y = bf16[2,8,16]{2,1,0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.quick
def test_loops_kernels_and_what_says_nothing():
  found = compiled_flops(LOOP)
  assert found.products == 5 * 2 * (2 * 8 * 16 * 32)
  assert found.kernels == 1000
  assert found.not_counted == {'silent_kernel': 1}


@pytest.mark.quick
@pytest.mark.parametrize(
  ('line', 'operands', 'flops'),
  [
    (
      'f32[4,6] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}',
      ('f32[4,5]', 'f32[5,6]'),
      2 * 4 * 5 * 6,
    ),
    (
      'f32[3,4,6] dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, '
      'rhs_contracting_dims={1}',
      ('f32[3,4,5]', 'f32[3,5,6]'),
      3 * 2 * 4 * 5 * 6,
    ),
    # A batch of products as a convolution: dilated and padded so that each tap meets its own row.
    (
      'f32[3,4,6] convolution(%a, %b), window={size=3 stride=2 pad=0_0 lhs_dilate=3}, '
      'dim_labels=0bf_0io->0bf',
      ('f32[3,4,5]', 'f32[3,5,6]'),
      3 * 2 * 4 * 5 * 6,
    ),
    # Four taps over eight places, padded by three: 4 x 8 pairs less the 6 that meet padding; each
    # channel by itself.
    (
      'f32[1,8,10] convolution(%a, %b), window={size=4 pad=3_0}, dim_labels=b0f_0io->b0f, '
      'feature_group_count=10',
      ('f32[1,8,10]', 'f32[4,1,10]'),
      2 * 10 * (4 * 8 - 6),
    ),
  ],
)
def test_products(line, operands, flops):
  text = f"""HloModule m

ENTRY %main (a: f32[1], b: f32[1]) -> f32[1] {{
  %a = {operands[0]} parameter(0)
  %b = {operands[1]} parameter(1)
  ROOT %c = {line}
}}
"""
  assert compiled_flops(text).products == flops


def test_a_compiled_program():
  """XLA's own count has the body of the loop once."""

  def f(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

  compiled = (
    jax.jit(f)
    .lower(
      jax.ShapeDtypeStruct((32, 64), jnp.float32), jax.ShapeDtypeStruct((9, 64, 64), jnp.float32)
    )
    .compile()
  )
  assert compiled_flops(compiled).products == 9 * 2 * 32 * 64 * 64
  assert compiled.cost_analysis()['flops'] < 2 * 2 * 32 * 64 * 64 + 32 * 64 * 9
