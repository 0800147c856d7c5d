// ---- consumers ----------------------------------------------------------------------------------------------------
//
// A thread holds of a product [64, kRows] rows lane / 4 and 8 further on of its warp's 16, and of each 8 columns
// 2 (lane % 4) and the next: element 4 j + 2 i + e is row i, column 8 j + 2 (lane % 4) + e. Columns are query rows in both
// products, so what belongs to a query row (its reference, its sum) is held the same way.

// What all lanes of a block share whatever the variant; `exchange` and `reference` by warpgroup, warp and query row.
struct alignas(1024) Fixed {
    u64 full[STAGES], empty[STAGES];
    uint4 levels;                                                // magnitudes of sketch codes, see levels_of()
    Shared merge;
    u32 flag[2], largest, unused;
    u16 ratio[2][2][kTile];                                      // by warpgroup: of the shared, of the own scale
    float exchange[2][4][kRows], reference[2][4][kRows];
};

__device__ __forceinline__ void sync_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(3 + group) : "memory"); }

// What a warpgroup knows of the segment at hand.
struct Segment {
    int length, unmasked;                                        // unmasked: tokens that every query row may see
    float scale_log2;                                            // what a score is multiplied by besides its token's power
    u32 ring, full, empty, base, q_smem, probability;
    int tiles, first_token, group, warp, lane;
};

// Tokens that query row `row` of the block may see.
__device__ __forceinline__ int limit_of(const Params& p, int length, int row) {
    const int at = blockIdx.y * kRows + row;
    const int token = (at >= p.heads) + (at >= 2 * p.heads) + (at >= 3 * p.heads);
    return length - p.query_len + 1 + min(token, p.query_len - 1);
}

// Scores of a tile; `stage` is its raw rows.
__device__ __forceinline__ void scores(float (&s)[kPart], u32 stage, const TokenScales& t, u32 q_smem, u32 levels, int warp,
                                       int lane) {
    const u32 rows = stage + (warp * 16 + lane % 16) * kStride + lane / 16 * 16;
    const u32 row = stage + (warp * 16 + lane / 4) * kStride;
    const u64 q = descriptor(q_smem, 16);
    u32 raw[2][8], a[2][8] = {};
    const uint4 table = load_shared4(levels);
    load_group(0, rows, row, lane, raw[0]);
    pin(s);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
        if (g + 1 < kGroups) load_group(g + 1, rows, row, lane, raw[(g + 1) % 2]);
        if (g >= 2) {                                            // the registers of the group before the last are free
            wgmma_wait<1>();
            pin(a[g % 2]);
        }
        unpack_group(g, raw[g % 2], t, table, lane, a[g % 2]);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int step = g < kOwnGroups ? 2 * g + i : kSketchStep + 2 * (g - kOwnGroups) + i;
            if (g < kOwnGroups && step >= kOwnSteps) break;
            const u64 columns = q + ((step / 4 * kQPanelBytes + step % 4 * 32) >> 4);
            const u32* r = a[g % 2] + 4 * i;
            if (ROPE_BITS == 16 && step >= kRopeStep) wgmma_bf16(s, r[0], r[1], r[2], r[3], columns, step > 0);
            else wgmma_half(s, r[0], r[1], r[2], r[3], columns, step > 0);
        }
        wgmma_commit();
    }
    wgmma_wait<0>();
    pin(s);
    pin(a[0]);
    pin(a[1]);
}

// Takes a warpgroup's reference to the largest weighted exponent of the tile, where that is larger, and what was summed
// before with it.
__device__ __forceinline__ void raise_reference(const Params& p, Fixed& fixed, const Segment& c, const float (&s)[kPart],
                                                const TokenScales& t, int first_token, float (&o)[kBlocks][kPart],
                                                float (&total)[kRows / 4]) {
    const int column = 2 * (c.lane % 4), token = first_token + c.warp * 16 + c.lane / 4;
    float(&mine)[kRows] = fixed.reference[c.group][c.warp];
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int limit = limit_of(p, c.length, 8 * j + column + e);
            float top = negative_infinity();
#pragma unroll
            for (int i = 0; i < 2; ++i)
                if (token + 8 * i < limit) top = fmaxf(top, s[4 * j + 2 * i + e] * (t.power[i] * c.scale_log2) + t.weight_log2[i]);
            top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 4));
            top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 8));
            top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 16));
            if (c.lane < 4) fixed.exchange[c.group][c.warp][8 * j + column + e] = top;
        }
    }
    sync_group(c.group);
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int row = 8 * j + column + e;
            const float before = mine[row];
            float top = before;
#pragma unroll
            for (int warp = 0; warp < 4; ++warp) top = fmaxf(top, fixed.exchange[c.group][warp][row]);
            __syncwarp();
            if (c.lane < 4) mine[row] = top;
            const float factor = before == negative_infinity() ? 0.f : exp2_fast(before - top);
            total[2 * j + e] *= factor;
#pragma unroll
            for (int b = 0; b < kBlocks; ++b)
#pragma unroll
                for (int i = 0; i < 2; ++i) o[b][4 * j + 2 * i + e] *= factor;
        }
    }
    __syncwarp();
}

// Scores to weighted probabilities relative to the reference, in place and packed. Returns whether one is too large for
// float16 to hold its like.
template <bool kMasked>
__device__ __forceinline__ bool soften(const Params& p, const Fixed& fixed, const Segment& c, float (&s)[kPart],
                                       const TokenScales& t, int first_token, u32 (&packed)[kPart / 2]) {
    const int column = 2 * (c.lane % 4), token = first_token + c.warp * 16 + c.lane / 4;
    const float* reference = fixed.reference[c.group][c.warp] + column;
    const float scale[2] = {t.power[0] * c.scale_log2, t.power[1] * c.scale_log2};
    u32 largest = 0;
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
        const float2 r = *reinterpret_cast<const float2*>(reference + 8 * j);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float x = fmaf(s[4 * j + 2 * i + e], scale[i], t.weight_log2[i] - (e ? r.y : r.x));
                if (kMasked && token + 8 * i >= limit_of(p, c.length, 8 * j + column + e)) x = negative_infinity();
                s[4 * j + 2 * i + e] = exp2_fast(x);
            }
            packed[2 * j + i] = pack_half(s[4 * j + 2 * i], s[4 * j + 2 * i + 1]);
            largest = larger_half(largest, packed[2 * j + i]);
        }
    }
    return (largest & 0xFFFF) >= 0x7400 || largest >> 16 >= 0x7400;        // 2^14
}

// O += V^T P of a tile, by blocks of 64 columns of which each warp has 16, tokens 32 at a time.
__device__ __forceinline__ void add_values(Fixed& fixed, float (&o)[kBlocks][kPart], u32 stage, u32 empty, u32 probability,
                                           int group, int warp, int lane) {
    const u32 rows = stage + lane * kStride + warp * 16;
    const u64 weights = descriptor(probability, 16);
    u32 raw[2][4], a[2][8], ratio[2][4];
    load_turned4(raw[0], rows);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) pin(o[b]);
#pragma unroll
    for (int at = 0; at < 2 * kBlocks; ++at) {
        const int half = at / kBlocks, block = at % kBlocks, next = at + 1;
        if (kTwoScales && block == 0) {
#pragma unroll
            for (int which = 0; which < 2; ++which)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    ratio[which][i] = *reinterpret_cast<const u32*>(&fixed.ratio[group][which][32 * half + 8 * i + 2 * (lane % 4)]);
        }
        if (next < 2 * kBlocks) load_turned4(raw[next % 2], rows + next / kBlocks * 32 * kStride + next % kBlocks * 64);
        if (at >= 2) {
            wgmma_wait<1>();
            pin(a[at % 2]);
        }
        const bool shared = block * 64 + warp * 16 + lane / 4 * 2 < SHARED;
#pragma unroll
        for (int i = 0; i < 4; ++i) {                            // 8 tokens each
            const u32 codes = raw[at % 2][i] ^ 0x80808080u;
            u32 first = half_of_codes<0, 2>(codes), second = half_of_codes<1, 3>(codes);
            if (kTwoScales) {
                const u32 scale = block * 64 + 64 <= SHARED ? ratio[0][i] : block * 64 >= SHARED ? ratio[1][i]
                                : shared ? ratio[0][i] : ratio[1][i];
                first = multiply_half(first, scale), second = multiply_half(second, scale);
            }
            a[at % 2][i / 2 * 4 + i % 2 * 2] = first, a[at % 2][i / 2 * 4 + i % 2 * 2 + 1] = second;
        }
        if (next == 2 * kBlocks) {                               // the raw rows have been read
            __syncwarp();
            if (lane == 0) barrier_arrive(empty);
        }
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32* r = a[at % 2] + 4 * i;
            wgmma_half(o[block], r[0], r[1], r[2], r[3], weights + ((2 * half + i) * 32 >> 4), 1);
        }
        wgmma_commit();
    }
    wgmma_wait<0>();
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) pin(o[b]);
    pin(a[0]);
    pin(a[1]);
}

__device__ __forceinline__ void attend(const Params& p, Fixed& fixed, const Segment& c, u32& sequence, float (&o)[kBlocks][kPart],
                                       float (&total)[kRows / 4]) {
    float s[kPart];
    u32 packed[kPart / 2];
    for (int j = c.group; j < c.tiles; j += 2) {
        const u32 at = c.base + j, slot = at % STAGES, stage = c.ring + slot * kStageBytes;
        const int first_token = c.first_token + j * kTile, token = first_token + c.warp * 16 + c.lane / 4;
        const bool masked = first_token + kTile > c.unmasked;
        const bool beyond[2] = {token >= c.length, token + 8 >= c.length};
        bool fresh = j == c.group;                               // the first tile sets the reference
        barrier_wait(c.full + 8 * slot, (at / STAGES) & 1);
        const TokenScales t = load_scales(stage + (c.warp * 16 + c.lane / 4) * kStride + ROW_BYTES - 8, beyond);
#pragma unroll 1
        while (true) {
            scores(s, stage, t, c.q_smem, shared_address(&fixed.levels), c.warp, c.lane);
            if (fresh) raise_reference(p, fixed, c, s, t, first_token, o, total);
            const bool over = masked ? soften<true>(p, fixed, c, s, t, first_token, packed)
                                     : soften<false>(p, fixed, c, s, t, first_token, packed);
            sync_group(c.group);                                 // the probabilities before have been used, and the flag
            ++sequence;
            if (__any_sync(0xffffffff, over) && c.lane == 0) fixed.flag[c.group] = sequence;
#pragma unroll
            for (int k = 0; k < kRows / 8; k += 2)
                store_turned4(c.probability + (8 * k + c.lane / 16 * 8 + c.lane % 8) * 128
                                  + (((2 * c.warp + (c.lane >> 3 & 1)) ^ (c.lane & 7)) << 4),
                              packed[2 * k], packed[2 * k + 1], packed[2 * k + 2], packed[2 * k + 3]);
            if (kTwoScales && c.lane % 4 == 0) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    fixed.ratio[c.group][0][c.warp * 16 + c.lane / 4 + 8 * i] = (u16)t.shared_ratio[i];
                    fixed.ratio[c.group][1][c.warp * 16 + c.lane / 4 + 8 * i] = (u16)t.own_ratio[i];
                }
            }
            fence_async_proxy();
            sync_group(c.group);
            // A score far above all before: once more, with a new reference. All four warps see the same flag.
            if (fresh || *reinterpret_cast<volatile u32*>(&fixed.flag[c.group]) != sequence) break;
            fresh = true;
        }
#pragma unroll
        for (int k = 0; k < kRows / 8; ++k)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                total[2 * k + e] += s[4 * k + e] * t.inverse_weight[0] + s[4 * k + 2 + e] * t.inverse_weight[1];
        add_values(fixed, o, stage, c.empty + 8 * slot, c.probability, c.group, c.warp, c.lane);
    }
}

// Adds up both warpgroups' sums through the query's memory; group 0 ends with blocks [0, kFirstBlocks), group 1 with the others.
// `top`, `total`: reference and sum of the query rows that this thread holds.
template <int kGroup>
__device__ __forceinline__ void join(Fixed& fixed, float (&o)[kBlocks][kPart], float (&top)[kRows / 4], float (&total)[kRows / 4],
                                     float* buffer, int warp, int lane) {
    const int column = 2 * (lane % 4);
    float mine[kRows / 4], other[kRows / 4];
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
        float sum = total[i];
        sum += __shfl_xor_sync(0xffffffff, sum, 4);
        sum += __shfl_xor_sync(0xffffffff, sum, 8);
        sum += __shfl_xor_sync(0xffffffff, sum, 16);
        if (lane < 4) fixed.exchange[kGroup][warp][i / 2 * 8 + column + i % 2] = sum;
    }
    sync_consumers();                                            // all scores done: the query may go
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
        const int row = i / 2 * 8 + column + i % 2;
        const float ours = fixed.reference[kGroup][warp][row], theirs = fixed.reference[1 - kGroup][warp][row];
        top[i] = fmaxf(ours, theirs);
        const bool nothing = top[i] == negative_infinity();
        mine[i] = nothing ? 0.f : exp2_fast(ours - top[i]);
        other[i] = nothing ? 0.f : exp2_fast(theirs - top[i]);
        float sum[2] = {0.f, 0.f};
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[0] += fixed.exchange[0][k][row], sum[1] += fixed.exchange[1][k][row];
        total[i] = sum[0] * (kGroup == 0 ? mine[i] : other[i]) + sum[1] * (kGroup == 0 ? other[i] : mine[i]);
    }
    float* cell = buffer + warp * 32 + lane;
#pragma unroll
    for (int round = 0; round < 2; ++round) {                    // round 0: group 1 gives its share of the first blocks
        const int begin = round == 0 ? 0 : kFirstBlocks, end = round == 0 ? kFirstBlocks : kBlocks;
        if (begin == end) break;
        if (round == 1) sync_consumers();
        if (kGroup != round)
#pragma unroll
            for (int b = begin; b < end; ++b)
#pragma unroll
                for (int i = 0; i < kPart; ++i) cell[((b - begin) * kPart + i) * 128] = o[b][i];
        sync_consumers();
        if (kGroup == round)
#pragma unroll
            for (int b = begin; b < end; ++b)
#pragma unroll
                for (int i = 0; i < kPart; ++i) {
                    const int row = i / 4 * 2 + i % 2;
                    o[b][i] = o[b][i] * mine[row] + cell[((b - begin) * kPart + i) * 128] * other[row];
                }
    }
}

// The first of the two columns that value pair k of item `piece` of a partial result holds.
__device__ __forceinline__ int item_column(int piece, int k) { return piece * 8 + k * 2; }

// Writes a group's blocks of a segment: to the output where it is the whole request, else as a partial result, in which each
// row is scaled by its largest value of these blocks.
template <int kGroup>
__device__ __forceinline__ void store(const Params& p, Fixed& fixed, const float (&o)[kBlocks][kPart], const float (&top)[kRows / 4],
                                      const float (&total)[kRows / 4], int request, int split, bool whole, int warp, int lane) {
    constexpr int kBegin = kGroup == 0 ? 0 : kFirstBlocks, kEnd = kGroup == 0 ? kFirstBlocks : kBlocks;
    if (kBegin == kEnd) return;
    const int rows = p.query_len * p.heads, first_column = warp * 16 + lane / 4 * 2;
    float scale[kRows / 4];
    if (whole) {
#pragma unroll
        for (int i = 0; i < kRows / 4; ++i) scale[i] = total[i] > 0.f ? 1.f / total[i] : 0.f;
    } else {
#pragma unroll
        for (int i = 0; i < kRows / 4; ++i) {
            float largest = 0.f;
#pragma unroll
            for (int b = kBegin; b < kEnd; ++b)
                if (b * 64 + first_column < LATENT)
                    largest = fmaxf(largest, fmaxf(fabsf(o[b][i / 2 * 4 + i % 2]), fabsf(o[b][i / 2 * 4 + 2 + i % 2])));
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 4));
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 8));
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 16));
            if (lane < 4) fixed.reference[kGroup][warp][i / 2 * 8 + 2 * lane + i % 2] = largest;
        }
        sync_group(kGroup);
#pragma unroll
        for (int i = 0; i < kRows / 4; ++i) {
            const int row = i / 2 * 8 + 2 * (lane % 4) + i % 2, global_row = blockIdx.y * kRows + row;
            float largest = 0.f;
#pragma unroll
            for (int k = 0; k < 4; ++k) largest = fmaxf(largest, fixed.reference[kGroup][k][row]);
            scale[i] = largest > 1e-37f ? 1.f / largest : 0.f;
            if (warp == 0 && lane < 4 && global_row < rows) {
                float* sums = p.partial_sums + 3ll * split * rows + global_row;
                if (kGroup == 0) sums[0] = total[i] > 0.f ? top[i] + log2_fast(total[i]) : negative_infinity();
                sums[(1 + kGroup) * rows] = total[i] > 0.f ? largest / total[i] : 0.f;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
        const int row = blockIdx.y * kRows + i / 2 * 8 + 2 * (lane % 4) + i % 2;
        if (row >= rows) continue;
        const int token = row / p.heads, head = row - token * p.heads;
        u16* target = whole
            ? p.out + ((long long)request * p.query_len + token) * p.out_token_stride + head * p.out_head_stride
            : p.partial_out + ((long long)split * rows + row) * LATENT;
#pragma unroll
        for (int b = kBegin; b < kEnd; ++b) {
            const int column = b * 64 + first_column;
            if (column >= LATENT) continue;
            const float low = o[b][i / 2 * 4 + i % 2] * scale[i], high = o[b][i / 2 * 4 + 2 + i % 2] * scale[i];
            *reinterpret_cast<u32*>(target + column) = whole ? pack_bf16(low, high) : pack_half(low, high);
        }
    }
}
