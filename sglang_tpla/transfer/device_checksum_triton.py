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
STEPS = 64  # blocks whose sums `scramble_blocks` asks for before it needs the first
REST = 2048  # more bytes than follow the last block, a power of two


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


@triton.jit
def _scrambled(value, added, key, prime):
    mixed = value + added
    return (mixed ^ ((mixed >> 47) & 0x1FFFF) ^ key) * prime


@triton.jit(do_not_specialize=["blocks", "rest_bytes"])
def scramble_blocks(
    sums,
    secret,
    start,
    lanes,
    blocks,
    rest,
    rest_found,
    rest_bytes,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    REST: tl.constexpr,
):
    """Add the blocks' sums to the lanes, one block after the other; copy what follows them. Grid: [1].

    ``start``, ``lanes``: int64 [LANES], before and after. ``rest``, ``rest_found``: uint8 [rest_bytes], at most REST.
    """
    at = tl.arange(0, REST)
    tl.store(rest_found + at, tl.load(rest + at, mask=at < rest_bytes), mask=at < rest_bytes)
    lane = tl.arange(0, LANES)
    key = tl.load(secret + 16 + lane)
    prime = tl.full([LANES], 0x9E3779B1, tl.int64)
    value = tl.load(start + lane)
    whole = blocks // STEPS * STEPS
    for first in range(0, whole, STEPS):
        for step in tl.static_range(STEPS):
            value = _scrambled(value, tl.load(sums + (first + step) * LANES + lane), key, prime)
    for block in range(whole, blocks):
        value = _scrambled(value, tl.load(sums + block * LANES + lane), key, prime)
    tl.store(lanes + lane, value)
