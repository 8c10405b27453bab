"""2^x of a tile of softmax weights, a quarter of it on the FMA units.

An SM makes 16 exponentials a cycle. At head_dim 64 a weight costs 256 operations of the matrix unit, which does 4,096 a cycle: both take
equally long, and the softmax is not hidden behind the products. At head_dim 128 it is, and the additional instructions only cost.

Software exponential: Zadouri et al., FlashAttention-4 (arXiv 2603.05451). Range reduction: Cody and Waite, Software Manual for the
Elementary Functions, 1980.
"""

# What stands in a kernel is Triton's language and not Python's; a type checker follows neither it nor launches.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# x = n + f with a whole n and |f| <= 1/2: adding 1.5 · 2^23 leaves n, rounded to the nearest, in the lowest bits. 2^f is a cubic, within
# 7.5e-5 of it (a bf16 weight is rounded by 3.9e-3 at most, fp16 by 4.9e-4), and n is added to its exponent. Below -126 the exponent would
# run out and the sign change: x is held there. So a hidden key, whose x is -inf, weighs 2^-126 and not 0 beside a sum of 1 or more.
QUARTER = gl.constexpr("""{
    .reg .f32 x, t, f, p;
    .reg .b32 n, m;
    max.f32 x, $4, 0fC2FC0000;      // -126
    add.rn.f32 t, x, 0f4B400000;    // 1.5 * 2^23
    sub.rn.f32 f, t, 0f4B400000;
    sub.rn.f32 f, x, f;
    fma.rn.f32 p, f, 0f3D61FBA4, 0f3E786F0D;
    fma.rn.f32 p, p, f, 0f3F31798D;
    fma.rn.f32 p, p, f, 0f3F7FFB49;
    mov.b32 n, t;
    shl.b32 n, n, 23;
    mov.b32 m, p;
    add.s32 $0, n, m;
    ex2.approx.ftz.f32 $1, $5;
    ex2.approx.ftz.f32 $2, $6;
    ex2.approx.ftz.f32 $3, $7;
}""")


@gluon.jit
def exp2_on_both_units(x):
    """2^x, x fp32 and at most about 0: of every four elements that a thread holds side by side, the first by the polynomial."""
    return gl.inline_asm_elementwise(QUARTER, "=r,=r,=r,=r,r,r,r,r", [x], dtype=gl.float32, is_pure=True, pack=4)
