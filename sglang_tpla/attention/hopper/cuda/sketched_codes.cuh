// ---- from codes to float16 ----------------------------------------------------------------------------------------

// Bit 3 of a selector's nibble asks for the byte's sign instead, which __byte_perm does not promise.
__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
    u32 c;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(c) : "r"(a), "r"(b), "r"(selector));
    return c;
}
__device__ __forceinline__ u32 add_half(u32 a, u32 b) {
    u32 c;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
__device__ __forceinline__ u32 multiply_half(u32 a, u32 b) {
    u32 c;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
__device__ __forceinline__ u32 multiply_bf16(u32 a, u32 b) {
    u32 c;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
__device__ __forceinline__ u32 larger_half(u32 a, u32 b) {
    u32 c;
    asm("max.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
__device__ __forceinline__ u32 load_shared(u32 address) {
    u32 x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return x;
}
__device__ __forceinline__ uint2 load_shared2(u32 address) {
    uint2 x;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address) : "memory");
    return x;
}
__device__ __forceinline__ uint4 load_shared4(u32 address) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
    return x;
}
__device__ __forceinline__ void store_shared4(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
// Stores four matrices of 8 rows of 8 halves; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices4(u32 address, const u32* r) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
// The larger of `largest` and the bits of the magnitudes of a pair of 16-bit floating-point numbers.
__device__ __forceinline__ u32 largest_of(u32 largest, u32 pair) { return max(largest, max(pair & 0x7FFFu, pair >> 16 & 0x7FFFu)); }

// Constants that unpacking needs in registers. They come from shared memory: an immediate would take the place of permute()'s
// selector, which the compiler then moves to a register anew for every use.
struct Constants {
    uint4 levels;                                // magnitudes of sketch codes, see levels_of()
    u32 exponent;                                // 0x64646464
};

// Eight sketch codes of kBits bits, low bits of x first, as nibbles [sign, magnitude index].
template <int kBits> __device__ __forceinline__ u32 nibbles(u32 x) {
    if (kBits == 4) return x;
    if (kBits == 3) {
        x = (x & 0xFFF) | (x & 0xFFF000) << 4;
        x = (x & 0x003F003F) | (x & 0x0FC00FC0) << 2;
        x = (x & 0x07070707) | (x & 0x38383838) << 1;
        return (x & 0x33333333) | (x & 0x44444444) << 1;
    }
    x = (x & 0xFF) | (x & 0xFF00) << 8;
    x = (x & 0x000F000F) | (x & 0x00F000F0) << 4;
    x = (x & 0x03030303) | (x & 0x0C0C0C0C) << 2;
    return (x & 0x11111111) | (x & 0x22222222) << 2;
}

// Eight such nibbles as their levels in float16, in pairs: magnitudes' low and high bytes come out of tables of eight bytes,
// `table`: low bytes, high bytes.
__device__ __forceinline__ void levels_of(u32 x, const uint4& table, u32 (&pair)[4]) {
    const u32 index = x & 0x77777777u, even = x << 4;            // even: signs of codes 0, 2, 4, 6 end their bytes
    u32 low[2], high[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const u32 four = i ? index >> 16 : index;
        low[i] = permute(table.x, table.y, four);
        high[i] = permute(table.z, table.w, four);
        const u32 signs = permute(even, x, i ? 0xFBEA : 0xD9C8);  // each sign bit over a byte of its own
        high[i] ^= signs & 0x80808080u;
        pair[2 * i] = permute(low[i], high[i], 0x5140);
        pair[2 * i + 1] = permute(low[i], high[i], 0x7362);
    }
}
