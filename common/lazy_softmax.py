"""The softmax of one block of keys that looks for a new maximum only where the old one no longer does.

Any number will do for the maximum as long as exp2(score - it) neither overflows nor vanishes. So a block is worked out
with the maximum of the blocks before it, and its sum, which is needed anyway, tells whether that was good enough: no
number of a sum is larger than the sum. Where a sum passes largest_sum, its warp does the block again with the true one.

Each warp decides for itself, which Gluon cannot say: the decision is a branch inside a piece of PTX. A warp holds 16
rows in 32 threads, and a thread columns of rows r and r + 8; tensors of what it holds once for each row are [rows, 4].
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def p_shift(dtype):
    """log2 of what p is multiplied with. e4m3 holds 2^-9 to 448: below a 1 there is room for what a sink leaves of the
    others, above it for scores beyond the maximum that is known.
    """
    return 0.0 if dtype.primitive_bitwidth == 16 else 5.0


@gluon.constexpr_function
def largest_sum(dtype):
    """What a sum may reach: every p is less, and float16 or 8 bits hold that. In 16 bits it is the sum of all that a
    thread has of a row, in 8 bits of 8 numbers at a time: 8 times 2^p_shift is below 448, and a row of equal scores
    is nothing special.
    """
    return {"fp16": 2.0**15, "bf16": 2.0**15, "fp8e4nv": 448.0, "fp8e5": 2.0**15}[str(dtype)]


@gluon.constexpr_function
def softmax_ptx(groups, dtype, first):
    """PTX over `groups` groups of columns, 2 of 16 bits or 4 of 8 bits, that go into a 32-bit register together.

    Operands, each for rows r and r + 8: [groups of p, sum, maximum, what earlier sums must be multiplied with], which
    are written; [scores, column by column of the groups, maximum, scale], which are read. first: no maximum is known.
    """
    per = 32 // dtype.primitive_bitwidth
    to = {"fp16": "rn.f16", "bf16": "rn.bf16", "fp8e4nv": "rn.satfinite.e4m3", "fp8e5": "rn.satfinite.e5m2"}[str(dtype)]

    def operand(k):
        return [f"${2 * k}", f"${2 * k + 1}"]

    p = [operand(k) for k in range(groups)]
    total, m, alpha = (operand(groups + k) for k in range(3))
    scores = [operand(groups + 3 + k) for k in range(per * groups)]
    m_old, scale = operand((per + 1) * groups + 3), operand((per + 1) * groups + 4)[0]
    column = [[f"x{g}_{c}" for c in range(per)] for g in range(groups)]
    names = ", ".join(sum(column, ["base", "top", "other", "peak0", "peak1"]))
    lines = [f".reg .f32 {names};"]
    lines += [".reg .b16 low, high;", ".reg .pred far;"]

    def block(r):
        """p and its sum, with `base` as what the maximum, and the shift, add to an exponent."""
        for g in range(groups):
            for c in range(per):
                lines.append(f"fma.rn.f32 {column[g][c]}, {scores[c * groups + g][r]}, {scale}, base;")
                lines.append(f"ex2.approx.ftz.f32 {column[g][c]}, {column[g][c]};")
        for g, x in enumerate(column):
            if per == 2:
                lines.append(f"cvt.{to}x2.f32 {p[g][r]}, {x[1]}, {x[0]};")
            else:
                lines.append(f"cvt.{to}x2.f32 low, {x[1]}, {x[0]};")
                lines.append(f"cvt.{to}x2.f32 high, {x[3]}, {x[2]};")
                lines.append(f"mov.b32 {p[g][r]}, {{low, high}};")
                lines.append(f"add.f32 {x[2]}, {x[2]}, {x[3]};")
            lines.append(f"add.f32 {x[0]}, {x[0]}, {x[1]};")
            if per == 4:
                lines.append(f"add.f32 {x[0]}, {x[0]}, {x[2]};")
        sums = [x[0] for x in column]
        if per == 4:
            lines.extend(f"add.f32 {a}, {a}, {b};" for a, b in zip(sums[::2], sums[1::2], strict=True))
            sums = sums[::2]
            lines.append(f"max.NaN.f32 peak{r}, {sums[0]}, {sums[1]};")
            lines.extend(f"max.NaN.f32 peak{r}, peak{r}, {a};" for a in sums[2:])
        lines.extend(f"add.f32 {sums[0]}, {sums[0]}, {a};" for a in sums[1:])
        lines.append(f"mov.f32 {total[r]}, {sums[0]};")
        if per == 2:
            lines.append(f"mov.f32 peak{r}, {sums[0]};")

    if not first:
        for r in (0, 1):
            lines.append(f"sub.f32 base, {p_shift(dtype)}, {m_old[r]};")
            block(r)
            lines.append(f"mov.f32 {m[r]}, {m_old[r]};")
            lines.append(f"mov.f32 {alpha[r]}, 1.0;")
        lines.append("max.NaN.f32 other, peak0, peak1;")  # NaN where a row has seen no key: m_old is -inf
        lines.append(f"setp.gtu.f32 far, other, {largest_sum(dtype)};")
        lines.append("vote.sync.any.pred far, far, 0xffffffff;")
        lines.append("@!far bra DONE;")
    for r in (0, 1):
        lines.append(f"max.f32 top, {scores[0][r]}, {scores[1][r]};")
        lines.extend(f"max.f32 top, top, {x[r]};" for x in scores[2:])
        for lane in (1, 2):  # the four threads of a row
            lines.append(f"shfl.sync.bfly.b32 other, top, {lane}, 0x1f, 0xffffffff;")
            lines.append("max.f32 top, top, other;")
        lines.append(f"mul.f32 top, top, {scale};")
        lines.append(f"max.f32 {m[r]}, top, {m_old[r]};")
        lines.append(f"setp.eq.f32 far, {m[r]}, 0fff800000;")  # no key yet: exp2(-inf - 0), not NaN
        lines.append(f"selp.f32 base, 0.0, {m[r]}, far;")
        lines.append(f"sub.f32 other, {m_old[r]}, base;")
        lines.append(f"ex2.approx.ftz.f32 {alpha[r]}, other;")
        lines.append(f"sub.f32 base, {p_shift(dtype)}, base;")
        block(r)
    return "\n".join(["{", *lines, "DONE:", "}"])


@gluon.constexpr_function
def softmax_operands(groups, per):
    """Outputs are written before all inputs are read: & keeps them apart."""
    return ",".join(["=&r"] * 2 * groups + ["=&f"] * 6 + ["f"] * (2 * per * groups + 4))


@gluon.constexpr_function
def softmax_types(groups):
    return (gl.int32,) * groups + (gl.float32,) * 3


@gluon.constexpr_function
def rescale_ptx(columns):
    """Multiplies `columns` numbers each of rows r and r + 8 by the rows' alpha, unless that is 1 in the whole warp."""
    n = 2 * columns
    lines = [
        ".reg .pred one, other;",
        f"setp.neu.f32 one, ${2 * n}, 1.0;",
        f"setp.neu.f32 other, ${2 * n + 1}, 1.0;",
        "or.pred one, one, other;",
        "vote.sync.any.pred one, one, 0xffffffff;",
        *(f"mov.f32 ${k}, ${n + k};" for k in range(n)),
        "@!one bra DONE;",
        *(f"mul.f32 ${k}, ${k}, ${2 * n + k % 2};" for k in range(n)),
    ]
    return "\n".join(["{", *lines, "DONE:", "}"])


@gluon.constexpr_function
def rescale_operands(columns):
    return ",".join(["=&f"] * 2 * columns + ["f"] * (2 * columns + 2))


@gluon.constexpr_function
def rescale_types(columns):
    return (gl.float32,) * columns


@gluon.jit
def slices(x):
    """[rows, n, 4] as n tensors [rows, 4], which are the same registers."""
    if x.shape[1] == 1:
        return (x.reshape([x.shape[0], 4]),)
    else:
        a, b = gl.split(x.reshape([x.shape[0], 2, x.shape[1] // 2, 4]).permute((0, 2, 3, 1)))
        return slices(a) + slices(b)


@gluon.jit
def together(parts, first: gl.constexpr, n: gl.constexpr):
    """The inverse, of n of the parts."""
    if n == 1:
        return parts[first].reshape([parts[first].shape[0], 1, 4])
    else:
        both = gl.join(together(parts, first, n // 2), together(parts, first + n // 2, n // 2))
        return both.permute((0, 3, 1, 2)).reshape([both.shape[0], n, 4])


@gluon.jit
def columns_of(x, PER: gl.constexpr):
    """Scores [rows, keys], of which a thread holds PER columns next to each other, as tensors [rows, 4]."""
    x = x.reshape([x.shape[0], x.shape[1] // (4 * PER), 4, PER])
    if PER == 2:
        x0, x1 = gl.split(x)
        return slices(x0) + slices(x1)
    else:
        x02, x13 = gl.split(x.reshape([x.shape[0], x.shape[1], 4, 2, 2]))
        x0, x2 = gl.split(x02)
        x1, x3 = gl.split(x13)
        return slices(x0) + slices(x1) + slices(x2) + slices(x3)


@gluon.jit
def lazy_softmax(qk, m_i, scale_log2, DTYPE: gl.constexpr, FIRST: gl.constexpr):
    """One block of scores [rows, keys]: p, its sums, the maximum, and what earlier sums and outputs must be multiplied
    with.

    p comes as int32 [rows, groups, 4], 2 columns of 16 or 4 of 8 bits in each (`operand` takes it), times 2^p_shift;
    the others as float32 [rows, 4], a sum for each of the four threads of a row. m_i: the maximum so far, times
    scale_log2; -inf where a row has seen no key, and anywhere if FIRST.
    """
    PER: gl.constexpr = 32 // DTYPE.primitive_bitwidth
    GROUPS: gl.constexpr = qk.shape[1] // (4 * PER)
    columns = columns_of(qk, PER)
    LAYOUT: gl.constexpr = columns[0].type.layout
    scale = gl.full([qk.shape[0], 4], scale_log2, gl.float32, LAYOUT)
    out = gl.inline_asm_elementwise(
        softmax_ptx(GROUPS, DTYPE, FIRST), softmax_operands(GROUPS, PER),
        columns + (gl.convert_layout(m_i, LAYOUT), scale), softmax_types(GROUPS), True, 2,
    )  # fmt: skip
    return together(out, 0, GROUPS), out[GROUPS], out[GROUPS + 1], out[GROUPS + 2]


@gluon.jit
def operand(p, LAYOUT: gl.constexpr, DTYPE: gl.constexpr):
    """p of lazy_softmax as the first operand of PV, [rows, keys]: the same registers again."""
    PER: gl.constexpr = 32 // DTYPE.primitive_bitwidth
    if PER == 2:
        p = gl.convert_layout(gl.join(p, p).reshape([p.shape[0], p.shape[1] * 8]), LAYOUT, assert_trivial=True)
        return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [p], gl.int16, True, 2).to(DTYPE, bitcast=True)
    else:
        p = gl.join(gl.join(p, p), gl.join(p, p)).reshape([p.shape[0], p.shape[1] * 16])
        p = gl.convert_layout(p, LAYOUT, assert_trivial=True)
        return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r,r,r", [p], gl.int8, True, 4).to(DTYPE, bitcast=True)


@gluon.jit
def rescaled(acc, alpha):
    """acc [rows, head_dim] times alpha [rows, 4] of its rows; a warp whose maxima all stayed goes around it."""
    N: gl.constexpr = acc.shape[1] // 4
    columns = columns_of(acc, 2)
    out = gl.inline_asm_elementwise(
        rescale_ptx(N), rescale_operands(N), columns + (gl.convert_layout(alpha, columns[0].type.layout),),
        rescale_types(N), True, 2,
    )  # fmt: skip
    both = gl.join(together(out, 0, N // 2), together(out, N // 2, N // 2))
    return gl.convert_layout(both.reshape([acc.shape[0], acc.shape[1]]), acc.type.layout, assert_trivial=True)
