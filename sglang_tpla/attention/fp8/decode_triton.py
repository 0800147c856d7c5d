"""The Triton kernels behind `fp8.decode`. Import this file only where Triton runs: on a GPU, or in its interpreter.

A program takes one stretch of one request's tokens and a tile of its query rows (tokens x heads):

    score = (q_s v_s) scale_s + (q_o v_o) scale_o + q^R k^R,    acc_s += (p scale_s) v_s,    acc_o += (p scale_o) v_o

Index s stands for the shared columns, o for a group's own columns. A row's two scales go into scores and probabilities,
so that e4m3 values enter the products as they are: every e4m3 number is a float16 number, and one instruction converts
two of them, where bfloat16 takes three. Two factors keep the other operands in float16's range: queries are multiplied
by a power of two that brings their largest magnitude near 2^`QUERY_LARGEST_LOG2`, and p scale is divided by the largest
scale so far. Each part's columns fill at most two blocks: the largest power of two, and the rest. `fp8_merge_kernel`
joins the stretches in their order.
"""

from __future__ import annotations

# mypy: ignore-errors
# Triton's own language: its types are not Python's.
import triton
import triton.language as tl

QUERY_LARGEST_LOG2 = tl.constexpr(12)


@triton.jit
def stretch_of(lengths, length, batch, row_blocks, splits, target, BLOCK_N: tl.constexpr):
    """The tokens of a stretch: an equal share for ``target`` programs, but at most ``splits`` stretches a request."""
    total = tl.zeros([128], tl.int32)
    for first in range(0, batch, 128):
        at = first + tl.arange(0, 128)
        total += tl.load(lengths + at, mask=at < batch, other=0)
    share = tl.cdiv(tl.sum(total, 0) * row_blocks, target)
    share = tl.maximum(share, tl.cdiv(length, splits))
    return tl.maximum(tl.cdiv(share, BLOCK_N), 1) * BLOCK_N


@triton.jit
def load_query(query, live, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load columns FIRST ... FIRST + WIDTH - 1 of the query rows, [ROWS, BLOCK]."""
    column = tl.arange(0, BLOCK)
    inside = live[:, None] & (column < WIDTH)[None, :]
    return tl.load(query[:, None] + FIRST + column[None, :], mask=inside, other=0.0)


@triton.jit
def largest_of(query):
    """The largest magnitude of each query row."""
    return tl.max(tl.abs(query.to(tl.float32)), 1)


@triton.jit
def lifted(query, factor, COMPUTE: tl.constexpr):
    """Multiply query rows by their factors, for the products with cached values."""
    return (query.to(tl.float32) * factor[:, None]).to(COMPUTE)


@triton.jit
def load_values(
    values, row, here, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr
):
    """Load the same columns of cache rows, [BLOCK_N, BLOCK]."""
    column = tl.arange(0, BLOCK)
    inside = here[:, None] if WIDTH == BLOCK else here[:, None] & (column < WIDTH)[None, :]
    code = tl.load(values + row[:, None] + FIRST + column[None, :], mask=inside, other=0)
    if tl.float16 != COMPUTE:
        return code.to(tl.float8e4nv, bitcast=True).to(COMPUTE)
    # Triton would move a plain cast behind shared memory, where products gather operands byte by byte. An "impure"
    # conversion stays in front, so matrix loads gather its results.
    return tl.inline_asm_elementwise(
        "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high; }",
        "=r,=r,r",
        [code],
        dtype=tl.float16,
        is_pure=False,
        pack=4,
    )


@triton.jit
def store_block(out, accumulated, live, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    tl.store(
        out[:, None] + FIRST + column[None, :],
        accumulated.to(out.dtype.element_ty),
        mask=live[:, None] & (column < WIDTH)[None, :],
    )


@triton.jit(do_not_specialize=["batch", "splits", "target"])
def fp8_decode_kernel(
    q_latent,  # [batch * QUERY_LEN, HEADS, W]
    q_rope,  # [batch * QUERY_LEN, HEADS, ROPE]
    values,  # the cache's bytes
    keys,  # the same as bfloat16
    scales,  # the same as float32
    indices,  # page numbers
    starts,  # [batch]
    lengths,  # [batch]
    partial_out,  # [batch, splits, QUERY_LEN * HEADS, W] float32
    partial_lse,  # [batch, splits, QUERY_LEN * HEADS] float32, in base 2
    q_latent_token_stride,
    q_latent_head_stride,
    q_rope_token_stride,
    q_rope_head_stride,
    batch,
    splits,
    target,
    scale_log2,
    HEADS: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    S0: tl.constexpr,  # widths of the blocks: shared, shared, own, own; 0: there is none
    S1: tl.constexpr,
    O0: tl.constexpr,
    O1: tl.constexpr,
    S0_BLOCK: tl.constexpr,
    S1_BLOCK: tl.constexpr,
    O0_BLOCK: tl.constexpr,
    O1_BLOCK: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COMPUTE: tl.constexpr,  # float16, or bfloat16; float32 in the interpreter
    KEYS: tl.constexpr,  # bfloat16; float32 in the interpreter, which knows no products of bfloat16
):
    W: tl.constexpr = S0 + S1 + O0 + O1
    ALL_ROWS: tl.constexpr = QUERY_LEN * HEADS
    row_block, split, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + request)
    stretch = stretch_of(lengths, length, batch, tl.num_programs(0), splits, target, BLOCK_N)
    begin = split * stretch
    if begin >= length:
        return
    end = tl.minimum(begin + stretch, length)

    row = row_block * ROWS + tl.arange(0, ROWS)
    live = row < ALL_ROWS
    token = (request * QUERY_LEN + row // HEADS).to(tl.int64)
    head = row % HEADS
    seen = length - QUERY_LEN + 1 + row // HEADS  # how many tokens a query row sees
    latent = q_latent + token * q_latent_token_stride + head * q_latent_head_stride
    rope = q_rope + token * q_rope_token_stride + head * q_rope_head_stride
    q_r = load_query(rope, live, 0, ROPE, ROPE_BLOCK).to(KEYS)
    magnitude = tl.zeros([ROWS], tl.float32)
    if S0:
        q_s0 = load_query(latent, live, 0, S0, S0_BLOCK)
        magnitude = tl.maximum(magnitude, largest_of(q_s0))
        acc_s0 = tl.zeros([ROWS, S0_BLOCK], tl.float32)
    if S1:
        q_s1 = load_query(latent, live, S0, S1, S1_BLOCK)
        magnitude = tl.maximum(magnitude, largest_of(q_s1))
        acc_s1 = tl.zeros([ROWS, S1_BLOCK], tl.float32)
    if O0:
        q_o0 = load_query(latent, live, S0 + S1, O0, O0_BLOCK)
        magnitude = tl.maximum(magnitude, largest_of(q_o0))
        acc_o0 = tl.zeros([ROWS, O0_BLOCK], tl.float32)
    if O1:
        q_o1 = load_query(latent, live, S0 + S1 + O0, O1, O1_BLOCK)
        magnitude = tl.maximum(magnitude, largest_of(q_o1))
        acc_o1 = tl.zeros([ROWS, O1_BLOCK], tl.float32)
    lift = tl.where(magnitude > 0, tl.exp2(QUERY_LARGEST_LOG2 - tl.ceil(tl.log2(magnitude))), 1.0)
    lowered = 1.0 / lift
    if S0:
        q_s0 = lifted(q_s0, lift, COMPUTE)
    if S1:
        q_s1 = lifted(q_s1, lift, COMPUTE)
    if O0:
        q_o0 = lifted(q_o0, lift, COMPUTE)
    if O1:
        q_o1 = lifted(q_o1, lift, COMPUTE)
    unit_s = tl.full([], 0.0, tl.float32)  # the largest scale so far is the unit of accumulated values
    unit_o = tl.full([], 0.0, tl.float32)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)

    first_index = indices + tl.load(starts + request)
    rope_column = tl.arange(0, ROPE_BLOCK)
    for at in range(begin, end, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        here = n < end
        page = tl.load(first_index + n // PAGE, mask=here, other=0).to(tl.int64)
        cached = (page * PAGE + n % PAGE) * ROW_BYTES
        key_mask = here[:, None] if ROPE == ROPE_BLOCK else here[:, None] & (rope_column < ROPE)[None, :]
        key = tl.load(keys + (cached // 2 + W // 2)[:, None] + rope_column[None, :], mask=key_mask, other=0.0)
        score = tl.dot(q_r, tl.trans(key.to(KEYS)))
        scale_at = scales + cached // 4 + (W + 2 * ROPE) // 4
        if S0:
            scale_s = tl.load(scale_at, mask=here, other=0.0)
            v_s0 = load_values(values, cached, here, 0, S0, S0_BLOCK, COMPUTE)
            part = tl.dot(q_s0, tl.trans(v_s0))
            if S1:
                v_s1 = load_values(values, cached, here, S0, S1, S1_BLOCK, COMPUTE)
                part = tl.dot(q_s1, tl.trans(v_s1), part)
            score += (part * lowered[:, None]) * scale_s[None, :]
        if O0:
            scale_o = tl.load(scale_at + 1, mask=here, other=0.0)
            v_o0 = load_values(values, cached, here, S0 + S1, O0, O0_BLOCK, COMPUTE)
            part = tl.dot(q_o0, tl.trans(v_o0))
            if O1:
                v_o1 = load_values(values, cached, here, S0 + S1 + O0, O1, O1_BLOCK, COMPUTE)
                part = tl.dot(q_o1, tl.trans(v_o1), part)
            score += (part * lowered[:, None]) * scale_o[None, :]
        visible = here[None, :] & (n[None, :] < seen[:, None])
        score = tl.where(visible, score * scale_log2, float("-inf"))
        higher = tl.maximum(largest, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        probability = tl.exp2(score - base[:, None])
        fading = tl.exp2(largest - base)
        largest = higher
        total = total * fading + tl.sum(probability, 1)
        if S0:
            unit = tl.maximum(unit_s, tl.max(scale_s, 0))
            weighted = (probability * (scale_s / unit)[None, :]).to(COMPUTE)
            kept = (fading * (unit_s / unit))[:, None]
            unit_s = unit
            acc_s0 = tl.dot(weighted, v_s0, acc_s0 * kept)
            if S1:
                acc_s1 = tl.dot(weighted, v_s1, acc_s1 * kept)
        if O0:
            unit = tl.maximum(unit_o, tl.max(scale_o, 0))
            weighted = (probability * (scale_o / unit)[None, :]).to(COMPUTE)
            kept = (fading * (unit_o / unit))[:, None]
            unit_o = unit
            acc_o0 = tl.dot(weighted, v_o0, acc_o0 * kept)
            if O1:
                acc_o1 = tl.dot(weighted, v_o1, acc_o1 * kept)

    inverse = tl.where(total > 0, 1.0 / total, 0.0)[:, None]
    place = ((request * splits + split) * ALL_ROWS + row).to(tl.int64)
    tl.store(partial_lse + place, tl.where(total > 0, largest + tl.log2(total), float("-inf")), mask=live)
    out = partial_out + place * W
    if S0:
        store_block(out, acc_s0 * (inverse * unit_s), live, 0, S0, S0_BLOCK)
    if S1:
        store_block(out, acc_s1 * (inverse * unit_s), live, S0, S1, S1_BLOCK)
    if O0:
        store_block(out, acc_o0 * (inverse * unit_o), live, S0 + S1, O0, O0_BLOCK)
    if O1:
        store_block(out, acc_o1 * (inverse * unit_o), live, S0 + S1 + O0, O1, O1_BLOCK)


@triton.jit(do_not_specialize=["batch", "splits", "target"])
def fp8_merge_kernel(
    partial_out,  # [batch, splits, QUERY_LEN * HEADS, W] float32
    partial_lse,
    lengths,
    out,  # [batch * QUERY_LEN, HEADS, W]
    out_token_stride,
    out_head_stride,
    batch,
    row_blocks,
    splits,
    target,
    HEADS: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    W: tl.constexpr,
    W_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Merge one query row: add up its stretches' outputs, weighted by their sums, in the stretches' order."""
    ALL_ROWS: tl.constexpr = QUERY_LEN * HEADS
    row, request = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + request)
    stretch = stretch_of(lengths, length, batch, row_blocks, splits, target, BLOCK_N)
    column = tl.arange(0, W_BLOCK)
    inside = column < W
    accumulated = tl.zeros([W_BLOCK], tl.float32)
    largest = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for split in range(tl.cdiv(length, stretch)):
        place = ((request * splits + split) * ALL_ROWS + row).to(tl.int64)
        lse = tl.load(partial_lse + place)
        value = tl.load(partial_out + place * W + column, mask=inside, other=0.0)
        higher = tl.maximum(largest, lse)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        fading, weight = tl.exp2(largest - base), tl.exp2(lse - base)
        accumulated = accumulated * fading + value * weight
        total = total * fading + weight
        largest = higher
    accumulated = accumulated * tl.where(total > 0, 1.0 / total, 0.0)
    token = (request * QUERY_LEN + row // HEADS).to(tl.int64)
    target_row = out + token * out_token_stride + (row % HEADS) * out_head_stride
    tl.store(target_row + column, accumulated.to(out.dtype.element_ty), mask=inside)
