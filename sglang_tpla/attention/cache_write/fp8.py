"""One decode step's new FP8 cache rows in one launch: norm, projection, rotation, quantisation, paged write.

As `latent_write`, with the slice quantised straight from the float32 projection and the key in bfloat16: the bytes that
a transfer would have brought (`fp8_rows`). `write_rows` takes slices that are there already. Twins: `fp8_reference`.
"""

from __future__ import annotations

import torch

from sglang_tpla.attention.cache_write.plain import FEW_TOKENS
from sglang_tpla.attention.interface import AttentionInputError, checked_fp8_rows, checked_write
from sglang_tpla.cache_rows import fp8 as fp8_rows


def write_latent(
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    z: torch.Tensor | None,
    cos_sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    slots: torch.Tensor,
    cache: torch.Tensor,
    q_rope: torch.Tensor | None = None,
    *,
    shared: int,
    neox: bool = False,
) -> None:
    """Write ``cache[slots]`` on a GPU.

    Args:
        cache: uint8 [slots, row_bytes] or [slots, 1, row_bytes], rows at multiples of 16 bytes.
        shared: r, the slice's leading columns with the first scale.
        The others as in `latent_write.write_latent`.

    Raises:
        AttentionInputError: shapes, dtypes or a device that do not fit.
    """
    rows = checked_write(latent, k_rope, weight, z, cos_sin, positions, slots, cache, q_rope, fp8=True)
    _require_gpu(rows)
    launch(latent, k_rope, weight, eps, z, cos_sin, positions, slots, rows, q_rope, shared=shared, neox=neox)


def write_rows(
    z: torch.Tensor, k_rope: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor, *, shared: int
) -> None:
    """Quantise slices [tokens, w] and write ``cache[slots]`` on a GPU; ``k_rope`` [tokens, rope] is rotated already.

    Raises:
        AttentionInputError: shapes, dtypes or a device that do not fit.
    """
    rows = checked_fp8_rows(z, k_rope, slots, cache)
    _require_gpu(rows)
    launch(z, k_rope, None, 0.0, None, None, None, slots, rows, shared=shared, neox=False)


def _require_gpu(rows: torch.Tensor) -> None:
    if rows.device.type != "cuda":
        raise AttentionInputError(
            f"fp8_write runs on a GPU; got tensors on {rows.device}; use fp8_reference on a CPU"
        )


def launch(
    source: torch.Tensor,
    k_rope: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    z: torch.Tensor | None,
    cos_sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    slots: torch.Tensor,
    rows: torch.Tensor,
    q_rope: torch.Tensor | None = None,
    *,
    shared: int,
    neox: bool,
) -> None:
    """Both unchecked, wherever Triton runs (its interpreter takes CPU tensors); no ``weight``: no norm either."""
    import triton

    from sglang_tpla.attention.cache_write import fp8_triton as kernels
    from sglang_tpla.attention.cache_write import plain_triton as rotation

    tokens, d = source.shape
    if tokens == 0:
        return
    if rows.data_ptr() % fp8_rows.ALIGNMENT or rows.stride(0) % fp8_rows.ALIGNMENT:
        raise AttentionInputError(
            f"FP8 rows must start at 16-byte borders; got strides {rows.stride()}; pass a contiguous cache"
        )
    rope = k_rope.shape[1]
    w = d if z is None else z.shape[1]
    mode = kernels.GIVEN if weight is None else kernels.NORMED if z is None else kernels.PROJECTED
    few = tokens <= FEW_TOKENS or mode != kernels.PROJECTED
    block_tokens, block_heads = (1, 16) if few else (16, 4)
    heads = 0 if q_rope is None or cos_sin is None else q_rope.shape[1]
    query = source if q_rope is None else q_rope
    rotate = rotation.ROTATE_NOT
    if cos_sin is not None:
        rotate = rotation.ROTATE_HALVES if neox else rotation.ROTATE_PAIRS
    kernels.fp8_write_kernel[(triton.cdiv(tokens, block_tokens), 3 + triton.cdiv(heads, block_heads))](
        source,
        k_rope,
        query,
        source if weight is None else weight,
        source if z is None else z,
        source if cos_sin is None else cos_sin,
        slots if positions is None else positions,
        slots,
        rows.view(fp8_rows.FP8),
        rows.view(torch.bfloat16),
        rows.view(torch.float32),
        source.stride(0),
        k_rope.stride(0),
        query.stride(0),
        query.stride(1),
        rows.stride(0),
        tokens,
        eps,
        SHARED=shared,
        D=d,
        W=w,
        ROPE=rope,
        HEADS=heads,
        MODE=mode,
        ROTATE=rotate,
        BLOCK_TOKENS=block_tokens,
        BLOCK_SHARED=max(16, triton.next_power_of_2(max(shared, 1))),
        BLOCK_OWN=max(16, triton.next_power_of_2(max(w - shared, 1))),
        BLOCK_D=triton.next_power_of_2(d) if mode == kernels.NORMED else 32,
        BLOCK_HEADS=block_heads,
        HALF=triton.next_power_of_2(rope // 2),
        num_warps=4 if few else 8,
    )
