// ---- from codes to float16 ----------------------------------------------------------------------------------------

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
__device__ __forceinline__ u32 multiply_add_half(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
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
__device__ __forceinline__ void store_shared(u32 address, u32 x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
__device__ __forceinline__ void store_shared2(u32 address, u32 a, u32 b) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}
__device__ __forceinline__ void store_shared4(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
// Stores four matrices of 8 rows of 8 halves; lane l passes the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices4(u32 address, const u32* r) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
// Returns the larger magnitude of each half of a pair, as bits: magnitudes of 16-bit floats have the order of their bits.
__device__ __forceinline__ u32 larger_magnitudes(u32 largest, u32 pair) {
    asm("max.u16x2 %0, %0, %1;" : "+r"(largest) : "r"(pair & 0x7FFF7FFFu));
    return largest;
}
__device__ __forceinline__ u32 largest_of_warp(u32 pair) { return __reduce_max_sync(0xffffffff, max(pair & 0xFFFFu, pair >> 16)); }

// A code becomes float16 when it is put into the mantissa of a power of two: with its lowest bit at bit s of a half whose other
// bits are those of 2^(10 - s), code c makes the number 2^(10 - s) + c.
__host__ __device__ constexpr u32 power_above(int s) { return (25 - s) << 10; }
__host__ __device__ constexpr u32 twice(u32 half) { return half | half << 16; }

// The bit of a half where sketch codes i and i + 4 of eight are placed, for i = 0 to 3. Bit 0 would leave no bit for the half in
// a level, which lies half way between two codes.
constexpr int kCodeBits[3][4] = {{1, 3, 5, 7}, {1, 4, 7, 1}, {1, 5, 1, 5}};
template <int kBits, int i> constexpr int code_bit() { return kCodeBits[kBits - 2][i]; }

// The halves to add to pair i, and to bytes.
template <int kBits, int i> constexpr u32 minus_levels() {
    return twice(0x8000 | power_above(code_bit<kBits, i>()) | ((1 << kBits) - 1) << (code_bit<kBits, i>() - 1));
}
constexpr u32 kMinusBytes = 0xE480E480u;                         // - 1152

// The same values as floats.
template <int kBits, int i> constexpr float level_above() { return -((1 << 10 - code_bit<kBits, i>()) + ((1 << kBits) - 1) / 2.f); }
constexpr float kBytesLevel = -1152.f;

// The constants that unpacking needs in registers, loaded from shared memory. If they were immediates, they would displace
// permute()'s selector or a mask, which the compiler would then move to a register for every use.
struct Constants {
    uint4 powers;                                // of the four pairs of eight sketch codes
    u32 power;                                   // of bytes

    template <int kBits> static __device__ __forceinline__ Constants of() {
        return {make_uint4(twice(power_above(code_bit<kBits, 0>())), twice(power_above(code_bit<kBits, 1>())),
                           twice(power_above(code_bit<kBits, 2>())), twice(power_above(code_bit<kBits, 3>()))), 0x64646464u};
    }
    __device__ __forceinline__ Constants loaded() const {
        return {load_shared4(shared_address(&powers)), load_shared(shared_address(&power))};
    }
};

// Returns bytes kFirst and kSecond of four codes (stored plus 128) as float16; 1024 + byte is 0x6400 | byte. With kAbove the
// result is 1152 above the code.
template <int kFirst, int kSecond, bool kAbove = false> __device__ __forceinline__ u32 half_of_bytes(u32 bytes, u32 power) {
    const u32 pair = permute(bytes, power, 0x4040 | kFirst | kSecond << 8);
    return kAbove ? pair : add_half(pair, kMinusBytes);
}

// Returns the same codes times `scale`. `bias`, -1152 scale, is exact: a scale of bytes has seven significant bits, 1152 has four.
template <int kFirst, int kSecond> __device__ __forceinline__ u32 scaled_bytes(u32 bytes, u32 scale, u32 bias, u32 power) {
    return multiply_add_half(half_of_bytes<kFirst, kSecond, true>(bytes, power), scale, bias);
}
__device__ __forceinline__ u32 bias_of(u32 scale) { return multiply_half(scale, kMinusBytes); }

// Returns pair i of the sketch codes in x as levels, c - (2^kBits - 1) / 2. With kAbove the levels lack minus_levels().
template <int kBits, int i, bool kAbove> __device__ __forceinline__ u32 level_pair(u32 x, u32 power) {
    const u32 pair = (x & twice(((1 << kBits) - 1) << code_bit<kBits, i>())) | power;
    return kAbove ? pair : add_half(pair, minus_levels<kBits, i>());
}

// Unpacks eight sketch codes of kBits bits, from the low bits of x up, to levels in float16: pair i has codes i and i + 4.
template <int kBits, bool kAbove = false> __device__ __forceinline__ void levels_of(u32 x, const uint4& powers, u32 (&pair)[4]) {
    // Move codes 4 to 7 to the upper half; those of 4 bits are there already.
    if (kBits == 3) x = (x << 4 & 0xFFFF0000u) | (x & 0x0000FFFFu);
    if (kBits == 2) x = (x << 8 & 0xFFFF0000u) | (x & 0x0000FFFFu);
    const u32 first = x << 1, last = kBits == 4 ? x >> 7 : kBits == 3 ? x >> 8 : first;
    pair[0] = level_pair<kBits, 0, kAbove>(first, powers.x);
    pair[1] = level_pair<kBits, 1, kAbove>(first, powers.y);
    pair[2] = level_pair<kBits, 2, kAbove>(kBits == 4 ? last : first, powers.z);
    pair[3] = level_pair<kBits, 3, kAbove>(last, powers.w);
}

// Returns eight columns of a query in levels_of()'s order of codes.
__device__ __forceinline__ uint4 in_order_of_levels(uint4 x) {
    return make_uint4(permute(x.x, x.z, 0x5410), permute(x.x, x.z, 0x7632), permute(x.y, x.w, 0x5410), permute(x.y, x.w, 0x7632));
}
