"""The Triton kernels behind `device_checksum`. Import it only where Triton is to run: on a GPU, or in its interpreter.

All arithmetic is that of 64-bit words modulo 2^64; Triton's are signed here, which changes shifts to the right alone.
"""

from __future__ import annotations

# mypy: ignore-errors
# Triton's own language: its types are not Python's.
import triton
import triton.language as tl

STRIPES, LANES = 16, 8
BLOCKS = 16  # of one program of `sum_blocks`
STEPS = 32  # blocks whose sums `scramble_blocks` asks for before it needs the first


@triton.jit(do_not_specialize=["blocks"])
def sum_blocks(words, secret, sums, blocks, STRIPES: tl.constexpr, LANES: tl.constexpr, BLOCKS: tl.constexpr):
    """What each block adds to the lanes. Grid: [blocks / BLOCKS].

    ``words``: int64 [blocks, STRIPES, LANES]. ``secret``: int64 [24]. ``sums``: int64 [blocks, LANES].
    """
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    stripe, lane = tl.arange(0, STRIPES), tl.arange(0, LANES)
    there = block < blocks
    row = block.to(tl.int64)[:, None, None] * (STRIPES * LANES) + stripe[None, :, None] * LANES
    value = tl.load(words + row + lane[None, None, :], mask=there[:, None, None], other=0)
    neighbour = tl.load(words + row + (lane ^ 1)[None, None, :], mask=there[:, None, None], other=0)
    key = value ^ tl.load(secret + stripe[:, None] + lane[None, :])[None, :, :]
    low = tl.full([1, 1, 1], 0xFFFFFFFF, tl.int64)
    added = tl.sum(neighbour + (key & low) * ((key >> 32) & low), axis=1)
    tl.store(sums + block.to(tl.int64)[:, None] * LANES + lane[None, :], added, mask=there[:, None])


@triton.jit(do_not_specialize=["blocks"])
def scramble_blocks(sums, secret, lanes, blocks, LANES: tl.constexpr, STEPS: tl.constexpr):
    """Add the blocks' sums to the lanes, one block after the other. Grid: [1].

    ``lanes``: int64 [LANES], changed.
    """
    lane = tl.arange(0, LANES)
    key = tl.load(secret + 16 + lane)
    prime = tl.full([LANES], 0x9E3779B1, tl.int64)
    value = tl.load(lanes + lane)
    for start in range(0, blocks, STEPS):
        for step in tl.static_range(STEPS):
            there = start + step < blocks
            added = tl.load(sums + (start + step) * LANES + lane, mask=there, other=0)
            mixed = value + added
            mixed = (mixed ^ ((mixed >> 47) & 0x1FFFF) ^ key) * prime
            value = tl.where(there, mixed, value)
    tl.store(lanes + lane, value)
