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


def _accumulators(count: int) -> tuple[str, str]:
    names = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return names, operands


def scores_source() -> str:
    """The source of the products of scores.

    ``wgmma_ss_64(d, a, b, accumulate)`` is d [64, 64] (+)= a [64, 16] b [64, 16]^T, both in shared memory;
    ``wgmma_rs_64(d, a0..a3, b, accumulate)`` is the same with a in registers.
    """
    names, operands = _accumulators(32)
    return f"""
__device__ __forceinline__ void wgmma_ss_64(float (&d)[32], u64 a, u64 b, int accumulate) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %34, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{{names}}}, %32, %33, p, 1, 1, 0, 0;\\n}}"
        : {operands} : "l"(a), "l"(b), "r"(accumulate));
}}
__device__ __forceinline__ void wgmma_rs_64(float (&d)[32], u32 a0, u32 a1, u32 a2, u32 a3, u64 b, int accumulate) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %37, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{{names}}}, "
        "{{%32, %33, %34, %35}}, %36, p, 1, 1, 0;\\n}}"
        : {operands} : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate));
}}
"""


def values_source(columns: int) -> str:
    """The source of ``wgmma_rs(d, a0..a3, b)``: d [64, columns] += a [64, 16] in registers times b [16, columns]."""
    count = columns // 2
    names, operands = _accumulators(count)
    return f"""
__device__ __forceinline__ void wgmma_rs(float (&d)[{count}], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.eq.b32 p, 0, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {{{names}}}, "
        "{{%{count}, %{count + 1}, %{count + 2}, %{count + 3}}}, %{count + 4}, p, 1, 1, 1;\\n}}"
        : {operands} : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}}
"""


def rows_source(columns: int) -> str:
    """The source of ``wgmma_half(d, a0..a3, b, accumulate)`` and ``wgmma_bf16``, in float16 and in bfloat16.

    Each is d [64, columns] (+)= a [64, 16] in registers times b [columns, 16]^T in shared memory.
    """
    count = columns // 2
    names, operands = _accumulators(count)
    a = ", ".join(f"%{count + i}" for i in range(4))

    def function(name: str, kind: str) -> str:
        return f"""
__device__ __forceinline__ void {name}(float (&d)[{count}], u32 a0, u32 a1, u32 a2, u32 a3, u64 b, int accumulate) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 5}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {{{names}}}, "
        "{{{a}}}, %{count + 4}, p, 1, 1, 0;\\n}}"
        : {operands} : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate));
}}
"""

    return function("wgmma_half", "f16") + function("wgmma_bf16", "bf16")


def tile_scores_source() -> str:
    """The source of the products of scores that read unpacked tiles.

    ``wgmma_rows_half(d, a0..a3, b, accumulate)`` is d [64, 64] (+)= a [64, 16] in registers times b [64, 16]^T in
    shared memory, ``wgmma_shared_half(d, a, b, accumulate)`` the same with a in shared memory; ``_bf16`` in bfloat16.
    """
    names, operands = _accumulators(32)

    def function(name: str, kind: str, left: str, parameters: str, inputs: str, turned: str) -> str:
        count = left.count("%")
        return f"""
__device__ __forceinline__ void {name}(float (&d)[32], {parameters}, u64 b, int accumulate) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{33 + count}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.{kind}.{kind} {{{names}}}, "
        "{left}, %{32 + count}, p, 1, 1, {turned};\\n}}"
        : {operands} : {inputs}, "l"(b), "r"(accumulate));
}}
"""

    text = ""
    for suffix, kind in (("half", "f16"), ("bf16", "bf16")):
        left, parameters = "{%32, %33, %34, %35}", "u32 a0, u32 a1, u32 a2, u32 a3"
        text += function(f"wgmma_rows_{suffix}", kind, left, parameters, '"r"(a0), "r"(a1), "r"(a2), "r"(a3)', "0")
        text += function(f"wgmma_shared_{suffix}", kind, "%32", "u64 a", '"l"(a)', "0, 0")
    return text


def row_values_source(columns: int) -> str:
    """The source of ``wgmma_values(d, a, b)``: d [64, columns] += a [64, 16] times b [16, columns].

    Both are float16 in shared memory. More than 192 columns take two instructions, of which the first does 128, two
    panels of b: the compiler allots an instruction no more than a block's 128 registers.
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
