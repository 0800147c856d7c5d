"""Write one decode step's new FP8 rows in one launch: norm, projection, rotation, quantisation, paged write.

The kernel quantises the slice straight from the float32 projection and keeps the key in bfloat16: these are the bytes
that a transfer would have brought (`cache_rows.fp8`). `plain` describes the other steps.
"""

import torch

from sglang_tpla.attention.cache_write.inputs import CacheWrite
from sglang_tpla.attention.cache_write.plain import FEW_TOKENS, operands, strides
from sglang_tpla.attention.interface import AttentionInputError
from sglang_tpla.cache_rows import fp8 as fp8_rows


def launch(new: CacheWrite) -> None:
    """Write FP8 rows wherever Triton runs: on a GPU, or in its interpreter.

    Raises:
        AttentionInputError: rows that do not begin at multiples of 16 bytes.
    """
    import triton

    from sglang_tpla.attention.cache_write import fp8_triton as kernels
    from sglang_tpla.attention.cache_write.plain_triton import NORMED, PROJECTED, mode, rotation

    assert new.fp8_shared is not None
    rows, shared = new.rows, new.fp8_shared
    tokens, d = new.latent.shape
    if tokens == 0:
        return
    if rows.data_ptr() % fp8_rows.ALIGNMENT or rows.stride(0) % fp8_rows.ALIGNMENT:
        raise AttentionInputError(
            f"FP8 rows must start at 16-byte borders; got strides {rows.stride()}; pass a contiguous cache"
        )
    few = tokens <= FEW_TOKENS or mode(new) != PROJECTED
    block_tokens, block_heads = (1, 16) if few else (16, 4)
    kernels.fp8_write_kernel[(triton.cdiv(tokens, block_tokens), 3 + triton.cdiv(new.heads, block_heads))](
        *operands(new),
        rows.view(fp8_rows.FP8),
        rows.view(torch.bfloat16),
        rows.view(torch.float32),
        *strides(new),
        tokens,
        new.eps,
        SHARED=shared,
        D=d,
        W=new.width,
        ROPE=new.rope_dim,
        HEADS=new.heads,
        MODE=mode(new),
        ROTATE=rotation(new),
        BLOCK_TOKENS=block_tokens,
        BLOCK_SHARED=max(16, triton.next_power_of_2(max(shared, 1))),
        BLOCK_OWN=max(16, triton.next_power_of_2(max(new.width - shared, 1))),
        BLOCK_D=triton.next_power_of_2(d) if mode(new) == NORMED else 32,
        BLOCK_HEADS=block_heads,
        HALF=triton.next_power_of_2(new.rope_dim // 2),
        num_warps=4 if few else 8,
    )
