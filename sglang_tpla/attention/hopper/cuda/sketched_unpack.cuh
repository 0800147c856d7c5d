// ---- from raw rows to wgmma's left operand ------------------------------------------------------------------------

// Loads four matrices of 8 rows of 16 bytes; lane l passes the address of row l % 8 of matrix l / 8 and gets bytes 4 (l % 4) to
// 4 (l % 4) + 3 of row l / 4 of each.
__device__ __forceinline__ void load_matrices4(u32 (&r)[8], int at, u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[at]), "=r"(r[at + 1]), "=r"(r[at + 2]), "=r"(r[at + 3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_matrices2(u32 (&r)[8], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
}
// Loads the same matrices transposed: lane l gets bytes 2 (l / 4) and 2 (l / 4) + 1 of rows 2 (l % 4) and 2 (l % 4) + 1.
__device__ __forceinline__ void load_turned4(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void store_turned4(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// The factors of a lane's two tokens, rows lane / 4 and lane / 4 + 8.
struct TokenScales {
    u32 shared[2], own[2];                       // kScaleCodes: relative to `power`, the same float16 twice in a register
    u32 rope[2];                                 // not kSplit: likewise (in bfloat16 if the key is)
    float power[2];                              // of sum `s`: bytes, key; kSplit: bytes; kApart: shared bytes
    float own_scale[2], sketch_scale[2], rope_scale[2];          // own: kApart; rope: kSplit
    float weight_log2[2], inverse_weight[2];     // of the factor that weights the token's probability
    u32 shared_ratio[2], own_ratio[2];           // not ROW_VALUES: of the scales of bytes to that factor, float16
};

// Loads the scales of a lane's two tokens. `trailer` is the address of the first row's scales; `beyond[i]` says that token i lies
// behind the last one, so that its row holds arbitrary bytes.
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
        float weight = largest_code, inverse_weight = reciprocal(weight);
        if (kScaleCodes || kTwoScales) {
            float largest = largest_code;
            if (!kSplit && ROPE_BITS == 8) largest = fmaxf(largest, rope);
            u32 bits = (__float_as_uint(largest) & 0x7F800000u) + 0x00800000u;
            bits = min(max(bits, 0x02000000u), 0x7D000000u);
            weight = __uint_as_float(bits), inverse_weight = __uint_as_float(0x7F000000u - bits);
        }
        if (kScaleCodes) {
            t.power[i] = weight;
            t.shared[i] = pack_half(shared * inverse_weight, shared * inverse_weight);
            t.own[i] = pack_half(own * inverse_weight, own * inverse_weight);
            t.rope[i] = ROPE_BITS == 8 ? pack_half(rope * inverse_weight, rope * inverse_weight)
                                       : pack_bf16(inverse_weight, inverse_weight);
        }
        t.own_scale[i] = own, t.sketch_scale[i] = sketch, t.rope_scale[i] = ROPE_BITS == 8 ? rope : 1.f;
        t.weight_log2[i] = log2_fast(weight);
        t.inverse_weight[i] = beyond[i] ? 0.f : inverse_weight;
        t.shared_ratio[i] = pack_half(shared * inverse_weight, 0.f);
        t.own_ratio[i] = pack_half(own * inverse_weight, 0.f);
    }
    return t;
}

// Loads the raw codes of group g of 32 columns for a warp's 16 tokens. `rows` is the address of the lane's row (and piece) for
// ldmatrix, `row` that of the lane's first token.
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

// Unpacks four bytes of both rows to a step's operand, multiplied by `scale` if `kScale`.
template <bool kScale, bool kAbove>
__device__ __forceinline__ void unpack_bytes(u32 first, u32 second, const u32 (&scale)[2], u32 power, u32* a) {
    if (kScale) {
        const u32 bias[2] = {bias_of(scale[0]), bias_of(scale[1])};
        a[0] = scaled_bytes<0, 1>(first, scale[0], bias[0], power), a[1] = scaled_bytes<0, 1>(second, scale[1], bias[1], power);
        a[2] = scaled_bytes<2, 3>(first, scale[0], bias[0], power), a[3] = scaled_bytes<2, 3>(second, scale[1], bias[1], power);
    } else {
        a[0] = half_of_bytes<0, 1, kAbove>(first, power), a[1] = half_of_bytes<0, 1, kAbove>(second, power);
        a[2] = half_of_bytes<2, 3, kAbove>(first, power), a[3] = half_of_bytes<2, 3, kAbove>(second, power);
    }
}

// Unpacks group g to the operands of its two steps: registers 0 to 3 and 4 to 7.
__device__ __forceinline__ void unpack_group(int g, const u32 (&raw)[8], const TokenScales& t, const Constants& constants, int lane,
                                             u32 (&a)[8]) {
    if (g < kSketchGroups) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            u32 pair[4];
            levels_of<BITS, kSketchAbove>(raw[row], constants.powers, pair);
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i / 2 * 4 + i % 2 * 2 + row] = pair[i];
        }
    } else if (g < kOwnGroup) {
        if (ROPE_BITS == 8) {
            unpack_bytes<!kSplit, kRopeAbove>(raw[0], raw[1], t.rope, constants.power, a);
            unpack_bytes<!kSplit, kRopeAbove>(raw[2], raw[3], t.rope, constants.power, a + 4);
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
            unpack_bytes<kScaleCodes, kBytesAbove>(raw[2 * i], raw[2 * i + 1],
                                      16 * step + 16 <= SHARED ? t.shared : 16 * step >= SHARED ? t.own : scale,
                                      constants.power, a + 4 * i);
        }
    }
}
