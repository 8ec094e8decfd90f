"""The predicted time of programs written by hand, whose times can be computed by hand."""

import dataclasses
import types
from typing import Any

import numpy as np
import pytest

from jaxformer.hardware import CHIPS
from jaxformer.planning.collectives import Collective
from jaxformer.planning.hlo import Frame, Program
from jaxformer.planning.hlo_bytes import bytes_moved, hbm_bytes
from jaxformer.planning.kernel_time import SHARES, kernel_time
from jaxformer.planning.links import HOP_SECONDS, Links
from jaxformer.planning.step_clock import Timed, time_program
from jaxformer.planning.step_profile import profile_of

V5E = CHIPS['v5e']
HBM = V5E.bytes_per_second
MIB = 2**20


def mesh(*shape: int) -> Any:
  """Stands in for a mesh over the devices of a slice, in the order of their coordinates."""
  devices = np.empty(shape, dtype=object)
  for place in np.ndindex(*shape):
    coords = (*place, *(0,) * (3 - len(place)))
    devices[place] = types.SimpleNamespace(coords=coords, slice_index=0)
  return types.SimpleNamespace(devices=devices, size=devices.size)


def entry(*lines: str, before: str = '') -> str:
  body = '\n'.join(f'  {line}' for line in lines)
  main = f'ENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n'
  return f'HloModule step, is_scheduled=true\n{before}\n{main}'


def seconds(text: str, *shape: int) -> dict[str, float]:
  """Name of each timed instruction -> seconds."""
  return {row.name: row.seconds for row in time_program(text, mesh(*shape or (4,)), V5E)}


PRODUCT = """
%inside (a: bf16[1024,1024], b: bf16[1024,1024]) -> bf16[1024,1024] {
  %a = bf16[1024,1024]{1,0} parameter(0)
  %b = bf16[1024,1024]{1,0} parameter(1)
  ROOT %c = bf16[1024,1024]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}
"""
A = '%a = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)'
LONG = '%long = bf16[1024,1024]{1,0:T(8,128)(2,1)} fusion(%a, %a), kind=kOutput, calls=%inside, '
LONG += 'backend_config={"window_config":{"estimated_cycles":"1500000"}}'
MOVED = 2 * MIB  # of one array


def test_a_product_takes_the_cycles_of_the_compiler_or_its_traffic():
  short = LONG.replace('1500000', '15').replace('%long', '%short')
  found = seconds(entry(A, LONG, short, before=PRODUCT))
  assert found['long'] == pytest.approx(1e-3)  # 1.5e6 cycles at 1.5 GHz
  assert found['short'] == pytest.approx(3 * MOVED / HBM)


def test_arrays_in_on_chip_memory_cost_nothing_and_others_their_tiles():
  assert hbm_bytes('bf16[8,128]{1,0:T(8,128)(2,1)}') == 2048
  assert hbm_bytes('bf16[8,128]{1,0:T(8,128)(2,1)S(1)}') == 0
  assert hbm_bytes('f32[3,4,64]{2,1,0:T(8,128)}') == 3 * 8 * 128 * 4
  assert hbm_bytes('f32[64,4]{0,1:T(4,128)}') == 128 * 4 * 4  # the minor dimension is the first
  assert hbm_bytes('(s32[], bf16[16]{0:T(1024)})') == 4 + 2048


def test_what_is_no_product_takes_its_traffic_whatever_the_compiler_estimates():
  add = '%sum = bf16[1024,1024]{1,0} add(%a, %a), backend_config={"estimated_cycles":"99999999"}'
  assert seconds(entry(A, add))['sum'] == pytest.approx(3 * MOVED / HBM)


def test_a_fusion_reads_the_slice_of_an_operand_and_writes_the_update():
  sliced = """
%part (a: f32[64,1024], i: s32[]) -> f32[1,1024] {
  %a = f32[64,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %s = f32[1,1024]{1,0} dynamic-slice(%a, %i, %z), dynamic_slice_sizes={1,1024}
}
%put (a: f32[64,1024], u: f32[1,1024], i: s32[]) -> f32[64,1024] {
  %a = f32[64,1024]{1,0} parameter(0)
  %u = f32[1,1024]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  ROOT %d = f32[64,1024]{1,0} dynamic-update-slice(%a, %u, %i, %z)
}
"""
  program = Program(
    entry(
      '%a = f32[64,1024]{1,0} parameter(0)',
      '%i = s32[]{:S(6)} parameter(1)',
      '%s = f32[1,1024]{1,0} fusion(%a, %i), kind=kLoop, calls=%part',
      '%d = f32[64,1024]{1,0} fusion(%a, %s, %i), kind=kLoop, calls=%put',
      before=sliced,
    )
  )
  lines = program.computations[program.entry]
  assert bytes_moved(program, lines['s']) == 2 * 4096
  assert bytes_moved(program, lines['d']) == 2 * 4096


def test_a_transfer_is_hidden_as_far_as_products_leave_the_memory_unused():
  start = '%go = (bf16[1024,1024]{1,0S(1)}, bf16[1024,1024]{1,0}, u32[]) copy-start(%a)'
  start = start.replace('1,0S(1)', '1,0:T(8,128)(2,1)S(1)').replace('{1,0}', '{1,0:T(8,128)(2,1)}')
  done = '%end = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} copy-done(%go)'
  whole = MOVED / HBM
  assert seconds(entry(A, start, done))['end'] == pytest.approx(whole)
  assert seconds(entry(A, start, LONG, done, before=PRODUCT))['end'] == 0
  busy = '%sum = bf16[1024,1024]{1,0:T(8,128)(2,1)} add(%a, %a)'
  assert seconds(entry(A, start, busy, done))['end'] == pytest.approx(whole)


GATHER = 'replica_groups={{0,1,2,3}}, dimensions={0}'
START = '%go = (bf16[256,1024]{1,0}, bf16[1024,1024]{1,0}) all-gather-start(%a), channel_id=1, '
START += GATHER
DONE = '%end = bf16[1024,1024]{1,0} all-gather-done(%go)'


def test_a_collective_is_hidden_behind_what_stands_between_start_and_done():
  whole = MOVED * 3 / 4 / (V5E.interconnect_bytes_per_second / 4)  # one link of a line of 4
  text = entry(A, START, DONE)
  assert seconds(text)['end'] == pytest.approx(whole)
  [row] = time_program(entry(A, START, LONG, DONE, before=PRODUCT), mesh(4), V5E)[1:]
  assert (row.seconds, row.hidden) == (0, pytest.approx(whole))
  short = LONG.replace('1500000', '15000')
  [row] = time_program(entry(A, START, short, DONE, before=PRODUCT), mesh(4), V5E)[1:]
  assert (row.seconds, row.hidden) == (pytest.approx(whole - 1e-5), pytest.approx(1e-5))
  both = entry('%all = bf16[1024,1024]{1,0} all-gather(%a), channel_id=1, ' + GATHER)
  assert seconds(both)['all'] == pytest.approx(whole)


def test_collectives_that_are_fused_with_products_are_known_by_their_channel():
  fused = """
%begin (a: bf16[256,1024]) -> bf16[1024,1024] {
  %a = bf16[256,1024]{1,0} parameter(0)
  %g = bf16[1024,1024]{1,0} all-gather(%a), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %c = bf16[1024,1024]{1,0} custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
%finish (a: bf16[1024,1024]) -> bf16[1024,1024] {
  %a = bf16[1024,1024]{1,0} parameter(0)
  %g = bf16[1024,1024]{1,0} all-gather(%a), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %c = bf16[1024,1024]{1,0} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}
"""
  go = '%x = bf16[1024,1024]{1,0} fusion(%a), kind=kCustom, calls=%begin'
  end = '%y = bf16[1024,1024]{1,0} fusion(%x), kind=kCustom, calls=%finish'
  [product, waited] = time_program(entry(A, go, LONG, end, before=PRODUCT + fused), mesh(4), V5E)
  assert (product.kind, waited.kind, waited.seconds) == ('product', 'communication', 0)
  assert waited.hidden > 0


def test_loops_repeat_and_the_longest_branch_counts():
  loop = """
%body (s: (s32[], bf16[1024,1024])) -> (s32[], bf16[1024,1024]) {
  %s = (s32[], bf16[1024,1024]{1,0}) parameter(0)
  %a = bf16[1024,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=1
  LONG
}
%test (s: (s32[], bf16[1024,1024])) -> pred[] {
  %s = (s32[], bf16[1024,1024]{1,0}) parameter(0)
}
%cheap (a: bf16[1024,1024]) -> bf16[1024,1024] {
  ROOT %a = bf16[1024,1024]{1,0} parameter(0)
}
%costly (a: bf16[1024,1024]) -> bf16[1024,1024] {
  %a = bf16[1024,1024]{1,0} parameter(0)
  LONG
}
""".replace('LONG', LONG)
  run = '%w = (s32[], bf16[1024,1024]{1,0}) while(%t), condition=%test, body=%body, '
  run += 'backend_config={"known_trip_count":{"n":"5"}}'
  choose = (
    '%c = bf16[1024,1024]{1,0} conditional(%i, %a, %a), branch_computations={%cheap, %costly}'
  )
  rows = time_program(entry(A, run, before=PRODUCT + loop), mesh(4), V5E)
  assert [(r.times, r.seconds) for r in rows] == [(5, pytest.approx(5e-3))]
  rows = time_program(entry(A, choose, before=PRODUCT + loop), mesh(4), V5E)
  assert sum(r.seconds for r in rows) == pytest.approx(1e-3)


def collective(kind: str, bytes: int, devices: str) -> Collective:
  return Collective(kind, (), bytes, 1, '', devices)


def test_collectives_use_the_links_of_the_dimensions_that_they_span():
  each = V5E.interconnect_bytes_per_second / 4
  row = '[4,4]<=[16]'  # along the last dimension
  open_line = Links(mesh(4, 4), V5E)
  assert open_line.seconds(collective('all-gather', 2**30, row)) == pytest.approx(
    2**30 * 3 / 4 / each
  )
  assert open_line.seconds(collective('all-reduce', 2**30, row)) == pytest.approx(
    2 * 2**30 * 3 / 4 / each
  )
  # The result of a reduce-scatter is one part of what is summed.
  assert open_line.seconds(collective('reduce-scatter', 2**28, row)) == pytest.approx(
    2**30 * 3 / 4 / each
  )
  plane = open_line.seconds(collective('all-gather', 2**30, '[1,16]<=[16]'))
  assert plane == pytest.approx(2**30 * 15 / 16 / (2 * each))  # two dimensions
  assert open_line.seconds(collective('all-to-all', 2**30, row)) == pytest.approx(2**30 / each)
  ring = Links(mesh(16, 16), V5E)  # as long as the torus of a v5e: it closes
  rows = collective('all-gather', 2**30, '[16,16]<=[256]')
  assert ring.seconds(rows) == pytest.approx(2**30 * 15 / 16 / (2 * each))
  exchange = collective('all-to-all', 2**30, '[16,16]<=[256]')
  assert ring.seconds(exchange) == pytest.approx(16 / 8 * 2**30 / each)


def test_no_collective_is_shorter_than_its_hops_and_one_device_sends_nothing():
  links = Links(mesh(4), V5E)
  assert links.seconds(collective('all-gather', 8, '[1,4]<=[4]')) == 4 * HOP_SECONDS
  assert links.seconds(collective('all-gather', 8, '{{0},{1},{2},{3}}')) == 0


def test_collectives_between_slices_take_the_network():
  both = mesh(2, 4)
  for device, slice_index in zip(both.devices.flat, [0] * 4 + [1] * 4, strict=True):
    device.slice_index = slice_index
    device.coords = (0, device.coords[1], 0)
  across = collective('all-reduce', 2**30, '[4,2]<=[2,4]T(1,0)')
  network = 2 * 2**30 / 2 / V5E.network_bytes_per_second
  assert Links(both, V5E).seconds(across) == pytest.approx(network)


SPLASH = """%splash_mha_fwd.1 = bf16[2,32,4096,128]{3,2,1,0S(1)} custom-call(%m, %q, %q, %q), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={

"xprof_metadata":"{\\"block_q\\": 1024, \\"use_fused_bwd_kernel\\": true}"
}}, metadata={op_name="jit(step)/jvp()/Attention/splash" stack_frame_id=2}""".replace(
  '0S(1)', '0:T(8,128)(2,1)S(1)'
)


def test_splash_attention_counts_the_blocks_that_a_causal_mask_leaves():
  text = entry(
    '%m = s8[1,4,4]{2,1,0:S(1)} parameter(0)',
    '%q = bf16[2,32,4096,128]{3,2,1,0:T(8,128)(2,1)} parameter(1)',
    SPLASH,
  )
  program = Program(text)
  kernel = program.computations[program.entry]['splash_mha_fwd.1']
  products = 2 * 2 * 2 * 32 * 4096 * 4096 * 128
  found = kernel_time(kernel, V5E)
  assert found.flops == products * 10 / 16  # of 4 x 4 blocks
  rate = V5E.peak() * SHARES['splash_mha_fwd']['v5e']
  assert found.seconds == pytest.approx(found.flops / rate)
  [row] = time_program(text, mesh(4), V5E)
  # what follows the blank line within its attributes belongs to it
  assert row.operation == 'jit(step)/jvp()/Attention/splash'


def test_a_kernel_is_known_where_the_compiler_lengthens_its_name():
  text = entry(
    '%q = bf16[8,64]{1,0} parameter(0)',
    '%transpose_jvp_selective_scan_backward__.1 = bf16[8,64]{1,0} custom-call(%q), '
    'custom_call_target="tpu_custom_call", '
    'backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000000000"}}}',
  )
  found = seconds(text)['transpose_jvp_selective_scan_backward__.1']
  assert found == pytest.approx(1e9 / V5E.peak() / SHARES['selective_scan_backward']['v5e'])


FRAMES = """
FileNames
1 "/home/me/jaxformer/ops/linear.py"
2 "/home/me/my_layer.py"

FunctionNames
1 "linear"
2 "Mixer.__call__"

FileLocations
1 {file_name_id=2 function_name_id=2 line=7 end_line=7 column=1 end_column=9}
2 {file_name_id=1 function_name_id=1 line=25 end_line=25 column=1 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=PARENT1}
2 {file_location_id=2 parent_frame_id=PARENT2}
"""


@pytest.mark.parametrize('parents', [('1', '2'), ('0', '1')])  # of one version too high
def test_instructions_know_the_lines_that_made_them(parents):
  tables = FRAMES.replace('PARENT1', parents[0]).replace('PARENT2', parents[1])
  sum_ = '%s = f32[8]{0} add(%a, %a), metadata={op_name="jit(step)/add" stack_frame_id=2}'
  program = Program(entry('%a = f32[8]{0} parameter(0)', sum_, before=tables))
  assert program.frames(program.computations[program.entry]['s']) == (
    Frame('/home/me/jaxformer/ops/linear.py', 25, 'linear'),
    Frame('/home/me/my_layer.py', 7, 'Mixer.__call__'),
  )


def timed(operation: str, kind: str = 'product', seconds: float = 1.0) -> Timed:
  return Timed(kind, seconds, 0.5, 2, 10.0, 20.0, 'name', operation, (Frame('/me/a.py', 3, 'f'),))


def test_time_is_attributed_to_phases_layers_and_lines():
  rows = [
    timed('jit(step)/jvp()/while/body/closed_call/Mixer/dot', seconds=1),
    timed('jit(step)/transpose(jvp())/while/body/checkpoint/Mixer/dot', seconds=2),
    timed('jit(step)/transpose(jvp())/checkpoint/rematted_computation/Mixer/dot', seconds=3),
    timed('jit(step)/transpose(jvp(Head))/dot', seconds=4),
    timed('jit(step)/Optimizer/mul', 'memory', seconds=5),
    timed('jit(step)/jvp()/while/body/Mixer/gather', 'communication', seconds=6),
    timed('', 'memory', seconds=7),
  ]
  found = profile_of(rows, {'Mixer'})
  assert found.seconds == 28
  assert found.flops == 70
  phases = ('forward', 'backward', 'recompute', 'loss', 'optimizer', 'communication', 'other')
  assert found.by_phase == dict(zip(phases, range(1, 8), strict=True))
  mixer = {'forward': 1, 'backward': 2, 'recompute': 3, 'communication': 6}
  assert found.by_layer['Mixer'] == mixer
  assert found.by_layer['Head'] == {'loss': 4}
  assert found.hidden_communication == 0.5
  assert found.sources[0].place == '/me/a.py:3'
  twice = profile_of([rows[0], dataclasses.replace(rows[0], seconds=9.0)], {'Mixer'}).sources
  assert [(s.operation, s.seconds, s.times) for s in twice] == [('Mixer/dot', 10, 4)]
