"""Is read out of a compiled program what it copies in a device's memory?"""

from __future__ import annotations

from jax_client.estimate.hlo import copies

PROGRAM = """HloModule jit_f

%body (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  %zeros = f32[4,8,128]{2,1,0} broadcast(%zero), dimensions={}
  %filled = f32[4,8,128]{2,1,0} copy(%broadcast.1)
  %turned = bf16[4,128,8]{2,1,0:T(8,128)(2,1)} transpose(%filled), dimensions={0,2,1}
  %near = (f32[4,8,128]{2,1,0:T(8,128)S(1)}, f32[4,8,128]{2,1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%filled)
  %moved = (f32[4,8,128]{2,1,0:T(8,128)}, f32[4,8,128]{2,1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%filled)
  ROOT %small = f32[8,128]{0,1} copy(%p)
}

ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  ROOT %called = f32[8,128]{0,1} call(%p), to_apply=%body
}
"""


def test_copies_leave_out_fills_and_what_lies_in_vector_memory() -> None:
    assert copies(PROGRAM, 8192) == ["transpose bf16[4,128,8]", "copy f32[4,8,128]"]
    assert copies(PROGRAM, 4096) == ["transpose bf16[4,128,8]", "copy f32[4,8,128]", "copy f32[8,128]"]
