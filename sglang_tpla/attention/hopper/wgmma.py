"""CUDA source of the wgmma instructions that the decode kernels use, written out for a given width.

wgmma (sm_90a) multiplies a 64-row operand by an N-column operand for a whole warpgroup; each of its 128 threads holds
N/2 fp32 accumulators. Inline assembly must name every accumulator, so this text is generated.
"""

from __future__ import annotations

PRELUDE = """
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
#define MODE_TOKENS 0
#define MODE_ROWS 1
#define MODE_WIDTH 2
"""


def _function(
    name: str, columns: int, kind: str, *, a_in_registers: bool, accumulate: bool = True, b_turned: str = "0"
) -> str:
    """Return the source of d [64, columns] (+)= a [64, 16] times b, in ``kind`` bf16 or f16.

    Args:
        a_in_registers: a comes as a0..a3; otherwise a is in shared memory, like b.
        accumulate: the function's last parameter says whether to add; otherwise the function always adds.
        b_turned: "0" if b is [columns, 16] and is used transposed, "1" if b is [16, columns].
    """
    count = columns // 2
    names = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    if a_in_registers:
        parameters, inputs = "u32 a0, u32 a1, u32 a2, u32 a3", '"r"(a0), "r"(a1), "r"(a2), "r"(a3)'
        left, turned, after = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}", b_turned, count + 4
    else:
        parameters, inputs, left, turned, after = "u64 a", '"l"(a)', f"%{count}", f"0, {b_turned}", count + 1
    parameters, inputs = f"{parameters}, u64 b", f'{inputs}, "l"(b)'
    adds = "eq.b32 p, 0, 0"
    if accumulate:
        parameters, inputs, adds = (
            f"{parameters}, int accumulate",
            f'{inputs}, "r"(accumulate)',
            f"ne.b32 p, %{after + 1}, 0",
        )
    return f"""
__device__ __forceinline__ void {name}(float (&d)[{count}], {parameters}) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.{adds};\\n"
        "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {{{names}}}, "
        "{left}, %{after}, p, 1, 1, {turned};\\n}}"
        : {operands} : {inputs});
}}
"""


def scores_source() -> str:
    """Return the source of the products of scores.

    ``wgmma_ss_64(d, a, b, accumulate)`` is d [64, 64] (+)= a [64, 16] b [64, 16]^T, both in shared memory;
    ``wgmma_rs_64(d, a0..a3, b, accumulate)`` is the same with a in registers.
    """
    shared = _function("wgmma_ss_64", 64, "bf16", a_in_registers=False)
    return shared + _function("wgmma_rs_64", 64, "bf16", a_in_registers=True)


def values_source(columns: int) -> str:
    """Return the source of ``wgmma_rs(d, a0..a3, b)``.

    The function computes d [64, columns] += a [64, 16] in registers times b [16, columns].
    """
    return _function("wgmma_rs", columns, "bf16", a_in_registers=True, accumulate=False, b_turned="1")


def rows_source(columns: int) -> str:
    """Return the source of ``wgmma_half(d, a0..a3, b, accumulate)`` and ``wgmma_bf16``, in float16 and in bfloat16.

    Each is d [64, columns] (+)= a [64, 16] in registers times b [columns, 16]^T in shared memory.
    """
    half = _function("wgmma_half", columns, "f16", a_in_registers=True)
    return half + _function("wgmma_bf16", columns, "bf16", a_in_registers=True)


def tile_scores_source() -> str:
    """Return the source of the products of scores that read unpacked tiles.

    ``wgmma_rows_half(d, a0..a3, b, accumulate)`` is d [64, 64] (+)= a [64, 16] in registers times b [64, 16]^T in
    shared memory, ``wgmma_shared_half(d, a, b, accumulate)`` the same with a in shared memory; ``_bf16`` in bfloat16.
    """
    return "".join(
        _function(f"wgmma_{where}_{suffix}", 64, kind, a_in_registers=where == "rows")
        for suffix, kind in (("half", "f16"), ("bf16", "bf16"))
        for where in ("rows", "shared")
    )


def row_values_source(columns: int) -> str:
    """Return the source of ``wgmma_values(d, a, b)``: d [64, columns] += a [64, 16] times b [16, columns].

    Both operands are float16 in shared memory. More than 192 columns take two instructions, of which the first covers
    128 columns (two panels of b): the compiler allots one instruction no more than the block's 128 registers a thread.
    """
    parts = [(0, columns)] if columns <= 192 else [(0, 128), (128, columns - 128)]
    lines = []
    for first, width in parts:
        count = width // 2
        names = "{" + ", ".join(f"%{i}" for i in range(count)) + "}"
        operands = ", ".join(f'"+f"(d[{first // 2 + i}])' for i in range(count))
        name = f"wgmma.mma_async.sync.aligned.m64n{width}k16.f32.f16.f16"
        lines.append(f"""    asm volatile("{{\\n.reg .pred p;\\nsetp.eq.b32 p, 0, 0;\\n"
        "{name} {names}, %{count}, %{count + 1}, p, 1, 1, 0, 1;\\n}}"
        : {operands} : "l"(a), "l"(b + {first // 64 * 8192 // 16}));
""")
    head = f"__device__ __forceinline__ void wgmma_values(float (&d)[{columns // 2}], u64 a, u64 b) {{\n"
    return head + "".join(lines) + "}\n"
