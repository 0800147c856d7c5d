"""The small kernels of a stock MLA decode step for `layer_rank`, one launch each, as in SGLang.

SGLang's own kernels need its compiled extension; these move the same bytes in the same number of launches.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _norm(x, weight, out, x_stride, out_stride, eps, N: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    value = tl.load(x + row * x_stride + column, mask=column < N, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / N + eps) * scale
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=column < N)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """Norm ``x`` [rows, n] into ``out``; rows may be strided."""
    n = x.shape[1]
    block = triton.next_power_of_2(n)
    _norm[(x.shape[0],)](x, weight, out, x.stride(0), out.stride(0), eps, N=n, BLOCK=block, num_warps=4)


@triton.jit
def _rotate(query, key, cos_sin, positions, q_token, q_head, k_token, HEADS: tl.constexpr, HALF: tl.constexpr):
    token, head, pair = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, HALF)
    turn = cos_sin + tl.load(positions + token).to(tl.int64) * 2 * HALF + pair
    cos, sin = tl.load(turn), tl.load(turn + HALF)
    base = query + token * q_token + head * q_head if head < HEADS else key + token * k_token
    x = tl.load(base + 2 * pair).to(tl.float32)
    y = tl.load(base + 2 * pair + 1).to(tl.float32)
    tl.store(base + 2 * pair, (x * cos - y * sin).to(query.dtype.element_ty))
    tl.store(base + 2 * pair + 1, (y * cos + x * sin).to(query.dtype.element_ty))


def rotate(query: torch.Tensor, key: torch.Tensor | None, cos_sin: torch.Tensor, positions: torch.Tensor) -> None:
    """Rotate neighbours of query [tokens, heads, rope] and, if given, key [tokens, rope], in place."""
    tokens, heads, rope = query.shape
    some = query if key is None else key
    _rotate[(tokens, heads + (key is not None))](
        query, some, cos_sin, positions, query.stride(0), query.stride(1), some.stride(0),
        HEADS=heads, HALF=rope // 2, num_warps=1,
    )  # fmt: skip


@triton.jit
def _write(
    latent, key, slots, cache, l_stride, k_stride, c_stride, D: tl.constexpr, ROPE: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    row = cache + tl.load(slots + token).to(tl.int64) * c_stride
    column, pair = tl.arange(0, BLOCK), tl.arange(0, ROPE)
    there = column < D
    tl.store(row + column, tl.load(latent + token * l_stride + column, mask=there), mask=there)
    tl.store(row + D + pair, tl.load(key + token * k_stride + pair))


def write_rows(latent: torch.Tensor, key: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor) -> None:
    """Write cache[slots] = [latent | key], as SGLang's ``set_mla_kv_buffer``; the key's width is a power of two."""
    width = latent.shape[1]
    _write[(latent.shape[0],)](
        latent, key, slots, cache, latent.stride(0), key.stride(0), cache.stride(0),
        D=width, ROPE=key.shape[1], BLOCK=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip


@triton.jit
def _quantise(
    x, out, scales, x_stride, out_stride, s_row, s_group, N: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    inside = tl.arange(0, BLOCK)
    column = group * GROUP + inside
    here = (inside < GROUP) & (column < N)
    value = tl.load(x + row * x_stride + column, mask=here, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), 0), 1e-10) / 448.0
    tl.store(out + row * out_stride + column, (value / scale).to(tl.float8e4nv), mask=here)
    tl.store(scales + row * s_row + group * s_group, scale)


def quantise(x: torch.Tensor, out: torch.Tensor, scales: torch.Tensor, group: int) -> None:
    """Quantise ``x`` [rows, n] to e4m3, with a scale for every ``group`` values of a row."""
    n = x.shape[1]
    block = triton.next_power_of_2(min(group, n))
    _quantise[(x.shape[0], triton.cdiv(n, group))](
        x, out, scales, x.stride(0), out.stride(0), scales.stride(0), scales.stride(1),
        N=n, GROUP=group, BLOCK=block, num_warps=1 if block <= 256 else 8,
    )  # fmt: skip


@triton.jit
def _merge(parts, lse, out, HEADS: tl.constexpr, W: tl.constexpr, RANKS: tl.constexpr):
    place, column = tl.program_id(0).to(tl.int64), tl.arange(0, W)
    places = tl.num_programs(0).to(tl.int64)
    top = -float("inf")
    for rank in tl.static_range(RANKS):
        top = tl.maximum(top, tl.load(lse + rank * places + place))
    total, value = 0.0, tl.zeros([W], tl.float32)
    for rank in tl.static_range(RANKS):
        share = tl.exp2(tl.load(lse + rank * places + place) - top)
        total += share
        value += share * tl.load(parts + (rank * places + place) * W + column).to(tl.float32)
    tl.store(out + place * W + column, (value / total).to(out.dtype.element_ty))


def merge(parts: torch.Tensor, lse: torch.Tensor, out: torch.Tensor) -> None:
    """Merge outputs [ranks, tokens, heads, w] with base-2 log-sum-exps [ranks, tokens, heads] into one."""
    ranks, tokens, heads, w = parts.shape
    _merge[(tokens * heads,)](parts, lse, out, HEADS=heads, W=w, RANKS=ranks, num_warps=4)
