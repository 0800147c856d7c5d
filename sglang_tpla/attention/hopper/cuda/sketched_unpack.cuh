// ---- from raw rows to wgmma's left operand ------------------------------------------------------------------------

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
// Four matrices of 8 rows of 16 bytes; lane l gives the address of row l % 8 of matrix l / 8 and gets bytes 4 (l % 4) to
// 4 (l % 4) + 3 of row l / 4 of each.
__device__ __forceinline__ void load_matrices4(u32 (&r)[8], int at, u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[at]), "=r"(r[at + 1]), "=r"(r[at + 2]), "=r"(r[at + 3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_matrices2(u32 (&r)[8], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
}
// The same, transposed: the lane gets bytes 2 (l / 4) and 2 (l / 4) + 1 of rows 2 (l % 4) and 2 (l % 4) + 1.
__device__ __forceinline__ void load_turned4(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
// Stores four matrices of 8 rows of 8 halves; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices4(u32 address, const u32* r) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
__device__ __forceinline__ void store_turned4(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// Constants that unpacking needs in registers. They come from shared memory: an immediate would take the place of permute()'s
// selector, which the compiler then moves to a register anew for every use.
struct Constants {
    uint4 levels;                                // magnitudes of sketch codes, see levels_of()
    u32 exponent;                                // 0x64646464
};

// Bytes kFirst and kSecond of four int8 codes with 128 added, as float16: 1024 + byte is 0x6400 | byte.
template <int kFirst, int kSecond> __device__ __forceinline__ u32 half_of_codes(u32 biased, u32 exponent) {
    return add_half(permute(biased, exponent, 0x4040 | kFirst | kSecond << 8), 0xE480E480u);      // - 1152
}

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

// Factors of a lane's two tokens (rows lane / 4 and 8 further on).
struct TokenScales {
    u32 shared[2], own[2];                       // kScaleCodes: relative to `power`, the same float16 twice in a register
    u32 rope[2];                                 // not kSplit: likewise (in bfloat16 where the key is)
    float power[2];                              // of the scores; kSplit: of those of 8-bit codes; kApart: of shared ones
    float own_scale[2], sketch_scale[2], rope_scale[2];          // own: kApart; rope: kSplit
    float weight_log2[2], inverse_weight[2];     // of the factor that weights the probability
    u32 shared_ratio[2], own_ratio[2];           // not ROW_VALUES: of the two 8-bit scales to it, float16
};

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// `trailer`: where the scales of the first row are; `beyond[i]`: a token behind the last, whose row is whatever lay there.
__device__ __forceinline__ TokenScales load_scales(u32 trailer, const bool (&beyond)[2]) {
    TokenScales t;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        uint2 raw = load_shared2(trailer + i * 8 * kStride);
        if (beyond[i]) raw = make_uint2(0x3F803F80u, 0x3F803F80u);
        const float shared = __uint_as_float(raw.x << 16), own = __uint_as_float(raw.x & 0xFFFF0000u);
        const float sketch = __uint_as_float(raw.y << 16), rope = __uint_as_float(raw.y & 0xFFFF0000u);
        const float largest_code = fmaxf(SHARED > 0 ? shared : 0.f, OWN > 0 ? own : 0.f);
        t.power[i] = kApart ? shared : largest_code;
        if (kScaleCodes) {
            float largest = largest_code;
            if (!kSplit && ROPE_BITS == 8) largest = fmaxf(largest, rope);
            u32 bits = (__float_as_uint(largest) & 0x7F800000u) + 0x00800000u;
            bits = min(max(bits, 0x02000000u), 0x7D000000u);
            t.power[i] = __uint_as_float(bits);
            const float inverse = __uint_as_float(0x7F000000u - bits);
            t.shared[i] = pack_half(shared * inverse, shared * inverse);
            t.own[i] = pack_half(own * inverse, own * inverse);
            t.rope[i] = ROPE_BITS == 8 ? pack_half(rope * inverse, rope * inverse) : pack_bf16(inverse, inverse);
        }
        t.own_scale[i] = own, t.sketch_scale[i] = sketch, t.rope_scale[i] = ROPE_BITS == 8 ? rope : 1.f;
        const float weight = ROW_VALUES ? t.power[i] : largest_code, inverse_weight = reciprocal(weight);
        t.weight_log2[i] = log2_fast(weight);
        t.inverse_weight[i] = beyond[i] ? 0.f : inverse_weight;
        t.shared_ratio[i] = pack_half(shared * inverse_weight, 0.f);
        t.own_ratio[i] = pack_half(own * inverse_weight, 0.f);
    }
    return t;
}

// Raw codes of group g of 32 columns for a warp's 16 tokens. `rows`: address of the lane's row (and piece) for ldmatrix;
// `row`: of the lane's own first token.
__device__ __forceinline__ void load_group(int g, u32 rows, u32 row, int lane, u32 (&raw)[8]) {
    if (g < kSketchGroups) {
        if (BITS == 4) {
            load_matrices2(raw, rows + kSketchOffset + 16 * g);
        } else {
            const int at = BITS * (lane % 4);                    // the byte of the lane's eight codes
            const int first = at / 4, second = min(first + 1, BITS - 1);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const u32 start = row + i * 8 * kStride + kSketchOffset + 4 * BITS * g;
                const u32 low = load_shared(start + 4 * first), high = load_shared(start + 4 * second);
                raw[i] = __funnelshift_r(low, high, 8 * (at % 4));
            }
        }
    } else if (g < kOwnGroup) {
        const int group = g - kSketchGroups;
        if (ROPE_BITS == 8) {
            load_matrices4(raw, 0, rows + kRopeOffset + 32 * group);
        } else {
            load_matrices4(raw, 0, rows + kRopeOffset + 64 * group);
            load_matrices4(raw, 4, rows + kRopeOffset + 64 * group + 32);
        }
    } else {
        const int group = g - kOwnGroup;
        if (2 * group + 1 < kOwnSteps) load_matrices4(raw, 0, rows + 32 * group);
        else load_matrices2(raw, rows + 32 * group);
    }
}

// Four int8 codes of both rows as a step's operand, multiplied by `scale` where `kScale`.
template <bool kScale>
__device__ __forceinline__ void unpack_codes(u32 first, u32 second, const u32 (&scale)[2], u32 exponent, u32* a) {
    first ^= 0x80808080u, second ^= 0x80808080u;
    a[0] = half_of_codes<0, 1>(first, exponent), a[1] = half_of_codes<0, 1>(second, exponent);
    a[2] = half_of_codes<2, 3>(first, exponent), a[3] = half_of_codes<2, 3>(second, exponent);
    if (!kScale) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = multiply_half(a[i], scale[i % 2]);
}

// The two steps of group g: registers 0 to 3 and 4 to 7.
__device__ __forceinline__ void unpack_group(int g, const u32 (&raw)[8], const TokenScales& t, const Constants& constants, int lane,
                                             u32 (&a)[8]) {
    if (g < kSketchGroups) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            u32 pair[4];
            levels_of(nibbles<BITS>(raw[row]), constants.levels, pair);
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i / 2 * 4 + i % 2 * 2 + row] = pair[i];
        }
    } else if (g < kOwnGroup) {
        if (ROPE_BITS == 8) {
            unpack_codes<!kSplit>(raw[0], raw[1], t.rope, constants.exponent, a);
            unpack_codes<!kSplit>(raw[2], raw[3], t.rope, constants.exponent, a + 4);
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) a[i] = kSplit ? raw[i] : multiply_bf16(raw[i], t.rope[i % 2]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int step = 2 * (g - kOwnGroup) + i;
            if (step >= kOwnSteps) break;
            const bool shared = 16 * step + 4 * (lane % 4) < SHARED;        // a compile-time constant in all steps but one
            const u32 scale[2] = {shared ? t.shared[0] : t.own[0], shared ? t.shared[1] : t.own[1]};
            unpack_codes<kScaleCodes>(raw[2 * i], raw[2 * i + 1],
                                      16 * step + 16 <= SHARED ? t.shared : 16 * step >= SHARED ? t.own : scale,
                                      constants.exponent, a + 4 * i);
        }
    }
}
