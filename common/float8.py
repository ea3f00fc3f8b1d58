"""Float8 caches as float16, which holds every number of both formats: e5m2 is its upper byte, e4m3 has fewer of all."""

import triton
import triton.language as tl

# In: four numbers, of columns d and d + 1 in two rows. Out: column d in both rows, column d + 1 in both.
E4M3_PAIRS = tl.constexpr("""{
    .reg .b32 t; .reg .b16 even, odd;
    prmt.b32 t, $2, 0, 0x3120; mov.b32 {even, odd}, t;
    cvt.rn.f16x2.e4m3x2 $0, even; cvt.rn.f16x2.e4m3x2 $1, odd;
}""")
E5M2_PAIRS = tl.constexpr("prmt.b32 $0, $2, 0, 0x2404; and.b32 $1, $2, 0xff00ff00;")


@triton.jit
def columns_of_pairs(pairs, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The even and the odd columns, float16 [rows, pairs] each, of float8 numbers that were loaded in pairs, as uint16.

    16-bit numbers can be read from shared memory as tensor cores want them, eight rows by eight, also transposed
    (ldmatrix); of 8-bit numbers, transposed, each is a load. PTX: by NVIDIA's instructions, three for four numbers;
    what the compiler makes of the other way has ten.
    """
    if PTX:
        ASM: tl.constexpr = E5M2_PAIRS if DTYPE == tl.float8e5 else E4M3_PAIRS
        even, odd = tl.inline_asm_elementwise(
            ASM, "=&r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        even = pairs.to(tl.uint8).to(DTYPE, bitcast=True).to(tl.float16)
        odd = (pairs >> 8).to(tl.uint8).to(DTYPE, bitcast=True).to(tl.float16)
    return even, odd


@triton.jit
def power_of_two_below(x):
    """The largest power of two that is at most x, a float32 number that is not negative; 1 for 0."""
    exponent = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7F800000
    return tl.where(exponent == 0, 1.0, exponent.to(tl.float32, bitcast=True))


@triton.jit
def descales_of(
    Descale, off_b, heads_kv, off_hk, pages, offs_n, here, seqlen_k, KEYS: tl.constexpr, PAGE: tl.constexpr
):
    """Descales of the keys offs_n, where `here`, else 0: Descale [batch, heads_kv, blocks of KEYS keys], or with pages
    of PAGE keys [pages, heads_kv, blocks].
    """
    if PAGE is None:
        head = (off_b * heads_kv + off_hk).to(tl.int64) * tl.cdiv(seqlen_k, KEYS)
        blocks = head + (offs_n.to(tl.uint32) // KEYS).to(tl.int64)  # unsigned: a shift
    else:
        IN_PAGE: tl.constexpr = (PAGE + KEYS - 1) // KEYS
        blocks = (pages.to(tl.int64) * heads_kv + off_hk) * IN_PAGE
        if IN_PAGE > 1:
            blocks += ((offs_n & (PAGE - 1)).to(tl.uint32) // KEYS).to(tl.int64)
    return tl.load(Descale + blocks, mask=here, other=0.0)
