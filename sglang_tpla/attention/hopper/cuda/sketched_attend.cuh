// ---- consumers ----------------------------------------------------------------------------------------------------
//
// A thread holds of a product [64, kRows] rows lane / 4 and 8 further on of its warp's 16, and of each 8 columns
// 2 (lane % 4) and the next: element 4 j + 2 i + e is row i, column 8 j + 2 (lane % 4) + e. Columns are query rows in both
// products, so what belongs to a query row (its reference, its sum) is held the same way.

// Shared memory that every variant has. The first index is the warpgroup: of scores, except in the last array.
struct alignas(1024) Fixed {
    u64 full[STAGES], empty[STAGES], ready[2], used[2];          // ready, used: a tile's probabilities, by its warpgroup
    uint4 levels;                                                // magnitudes of sketch codes, see levels_of()
    Shared merge;
    u32 flag[2][2], stamp[2], largest, unused;
    u16 ratio[2][2][kTile];                                      // of a tile's shared, of its own scale
    float exchange[2][4][kRows];                                 // between warps
    float reference[2][4][kRows];                                // of each warp: the reference of its probabilities
    float published[2][kRows];                                   // the reference of the tile that is ready
    float applied[2][kRows];                                     // the reference of a warpgroup's values

    // A warp of values tells its rows' largest values here once no tile is under way.
    __device__ __forceinline__ float* largest_values(int group, int warp) {
        return warp == 0 ? published[group] : reference[group][warp];
    }
};

__device__ __forceinline__ void sync_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(3 + group) : "memory"); }

// A warpgroup's view of the current segment.
struct Segment {
    int length, unmasked;                                        // unmasked: tokens that every query row may see
    float scale_log2;                                            // factor of a score besides its token's power
    u32 ring, base, q_smem, probability;                         // base: tiles that went through the ring before
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
    u32 raw[3][8], a[BUFFERS][8] = {};
    const uint4 table = load_shared4(levels);
    load_group(0, rows, row, lane, raw[0]);
    load_group(1, rows, row, lane, raw[1]);
    pin(s);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
        if (g + 2 < kGroups) load_group(g + 2, rows, row, lane, raw[(g + 2) % 3]);
        if (g >= BUFFERS) {                                      // the registers of an earlier group are free
            wgmma_wait<BUFFERS - 1>();
            pin(a[g % BUFFERS]);
        }
        unpack_group(g, raw[g % 3], t, table, lane, a[g % BUFFERS]);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int step = g < kOwnGroups ? 2 * g + i : kSketchStep + 2 * (g - kOwnGroups) + i;
            if (g < kOwnGroups && step >= kOwnSteps) break;
            const u64 columns = q + ((step / 4 * kQPanelBytes + step % 4 * 32) >> 4);
            const u32* r = a[g % BUFFERS] + 4 * i;
            if (ROPE_BITS == 16 && step >= kRopeStep) wgmma_bf16(s, r[0], r[1], r[2], r[3], columns, step > 0);
            else wgmma_half(s, r[0], r[1], r[2], r[3], columns, step > 0);
        }
        wgmma_commit();
    }
    wgmma_wait<0>();
    pin(s);
#pragma unroll
    for (int i = 0; i < BUFFERS; ++i) pin(a[i]);
}

// The largest weighted exponents of a tile, for settle().
__device__ __forceinline__ void offer(const Params& p, Fixed& fixed, const Segment& c, const float (&s)[kPart],
                                      const TokenScales& t, int first_token) {
    const int column = 2 * (c.lane % 4), token = first_token + c.warp * 16 + c.lane / 4;
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
}

// Raises a warpgroup's reference to what was offered: at the start of a segment by both warpgroups, so that they agree, later
// by its own; and scales its sums.
__device__ __forceinline__ void settle(Fixed& fixed, const Segment& c, bool start, float (&total)[kRows / 4]) {
    const int column = 2 * (c.lane % 4);
    float(&mine)[kRows] = fixed.reference[c.group][c.warp];
    if (start) sync_consumers();
    else sync_group(c.group);
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int row = 8 * j + column + e;
            const float before = mine[row];
            float top = before;
#pragma unroll
            for (int warp = 0; warp < 4; ++warp) {
                top = fmaxf(top, fixed.exchange[c.group][warp][row]);
                if (start) top = fmaxf(top, fixed.exchange[1 - c.group][warp][row]);
            }
            __syncwarp();
            if (c.lane < 4) mine[row] = top;
            total[2 * j + e] *= before == negative_infinity() ? 0.f : exp2_fast(before - top);
        }
    }
    __syncwarp();
    if (start) sync_consumers();                                 // both have read what was offered
}

// Turns scores into weighted probabilities relative to the reference, in place and packed. Returns whether one is too large
// for float16.
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

// O += V^T P of a tile, by blocks of 64 columns of which each warp has 16, tokens 32 at a time. Gives the raw rows back.
template <int kGroup>
__device__ __forceinline__ void add_values(const u16 (&ratios)[2][kTile], float (&o)[kMyBlocks][kPart], u32 stage, u32 empty,
                                           u32 probability, int warp, int lane) {
    constexpr int kFirst = kGroup * kMyBlocks, kCount = kGroup == 0 ? kMyBlocks : kBlocks - kMyBlocks;
    const u32 rows = stage + lane * kStride + kFirst * 64 + warp * 16;
    const u64 weights = descriptor(probability, 16);
    u32 raw[3][4], a[BUFFERS][8] = {}, ratio[2][4];
    load_turned4(raw[0], rows);
    load_turned4(raw[1], rows + 1 / kCount * 32 * kStride + 1 % kCount * 64);
#pragma unroll
    for (int b = 0; b < kCount; ++b) pin(o[b]);
#pragma unroll
    for (int at = 0; at < 2 * kCount; ++at) {
        const int half = at / kCount, mine = at % kCount, block = kFirst + mine, next = at + 2;
        if (kTwoScales && mine == 0) {
#pragma unroll
            for (int which = 0; which < 2; ++which)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    ratio[which][i] = *reinterpret_cast<const u32*>(&ratios[which][32 * half + 8 * i + 2 * (lane % 4)]);
        }
        if (next < 2 * kCount) load_turned4(raw[next % 3], rows + next / kCount * 32 * kStride + next % kCount * 64);
        if (at >= BUFFERS) {
            wgmma_wait<BUFFERS - 1>();
            pin(a[at % BUFFERS]);
        }
        const bool shared = block * 64 + warp * 16 + lane / 4 * 2 < SHARED;
#pragma unroll
        for (int i = 0; i < 4; ++i) {                            // 8 tokens each
            const u32 codes = raw[at % 3][i] ^ 0x80808080u;
            u32 first = half_of_codes<0, 2>(codes), second = half_of_codes<1, 3>(codes);
            if (kTwoScales) {
                const u32 scale = block * 64 + 64 <= SHARED ? ratio[0][i] : block * 64 >= SHARED ? ratio[1][i]
                                : shared ? ratio[0][i] : ratio[1][i];
                first = multiply_half(first, scale), second = multiply_half(second, scale);
            }
            a[at % BUFFERS][i / 2 * 4 + i % 2 * 2] = first, a[at % BUFFERS][i / 2 * 4 + i % 2 * 2 + 1] = second;
        }
        if (at + 1 == 2 * kCount) {                              // the raw rows have been read
            __syncwarp();
            if (lane == 0) barrier_arrive(empty);
        }
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32* r = a[at % BUFFERS] + 4 * i;
            wgmma_half(o[mine], r[0], r[1], r[2], r[3], weights + ((2 * half + i) * 32 >> 4), 1);
        }
        wgmma_commit();
    }
    wgmma_wait<0>();
#pragma unroll
    for (int b = 0; b < kCount; ++b) pin(o[b]);
#pragma unroll
    for (int i = 0; i < BUFFERS; ++i) pin(a[i]);
}

// A warpgroup of scores: every second tile of the segment. `tries` counts its tries at tiles, `done` its tiles.
__device__ __forceinline__ void attend(const Params& p, Fixed& fixed, const Segment& c, u32& tries, u32& done,
                                       float (&total)[kRows / 4]) {
    float s[kPart];
    u32 packed[kPart / 2];
    const u32 full = shared_address(fixed.full), ready = shared_address(fixed.ready + c.group);
    const u32 used = shared_address(fixed.used + c.group);
    if (c.group >= c.tiles) {                                    // no tile: the other warpgroup alone sets the reference
        for (int row = c.lane; row < kRows; row += 32) fixed.exchange[c.group][c.warp][row] = negative_infinity();
        settle(fixed, c, true, total);
    }
    for (int j = c.group; j < c.tiles; j += 2, ++done) {
        const u32 at = c.base + j, slot = at % STAGES, stage = c.ring + slot * kStageBytes;
        const int first_token = c.first_token + j * kTile, token = first_token + c.warp * 16 + c.lane / 4;
        const bool masked = first_token + kTile > c.unmasked;
        const bool beyond[2] = {token >= c.length, token + 8 >= c.length};
        bool fresh = j == c.group;                               // the first tile sets the reference
        barrier_wait(full + 8 * slot, (at / STAGES) & 1);
        const TokenScales t = load_scales(stage + (c.warp * 16 + c.lane / 4) * kStride + ROW_BYTES - 8, beyond);
#pragma unroll 1
        while (true) {
            scores(s, stage, t, c.q_smem, shared_address(&fixed.levels), c.warp, c.lane);
            if (fresh) {
                offer(p, fixed, c, s, t, first_token);
                settle(fixed, c, j == c.group, total);
            }
            const bool over = masked ? soften<true>(p, fixed, c, s, t, first_token, packed)
                                     : soften<false>(p, fixed, c, s, t, first_token, packed);
            barrier_wait(used, (done & 1) ^ 1);                  // the probabilities before have been used
            ++tries;
            if (__any_sync(0xffffffff, over) && c.lane == 0) fixed.flag[c.group][tries & 1] = tries;
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
            if (fresh && c.warp == 0) {
                for (int row = c.lane; row < kRows; row += 32) fixed.published[c.group][row] = fixed.reference[c.group][0][row];
                if (c.lane == 0) fixed.stamp[c.group] = j == c.group ? 0 : 2 * tries + c.group;
            }
            fence_async_proxy();
            sync_group(c.group);
            // A score far above all before asks for a second try with a new reference. All four warps see the same flag.
            if (fresh || *reinterpret_cast<volatile u32*>(&fixed.flag[c.group][tries & 1]) != tries) break;
            fresh = true;
        }
        if (c.warp == 0 && c.lane == 0) barrier_arrive(ready);
#pragma unroll
        for (int k = 0; k < kRows / 8; ++k)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                total[2 * k + e] += s[4 * k + e] * t.inverse_weight[0] + s[4 * k + 2 + e] * t.inverse_weight[1];
    }
    const int column = 2 * (c.lane % 4);
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
        float sum = total[i];
        sum += __shfl_xor_sync(0xffffffff, sum, 4);
        sum += __shfl_xor_sync(0xffffffff, sum, 8);
        sum += __shfl_xor_sync(0xffffffff, sum, 16);
        total[i] = sum;
    }
    sync_group(c.group);                                         // what was offered last has been read
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i)
        if (c.lane < 4) fixed.exchange[c.group][c.warp][i / 2 * 8 + column + i % 2] = total[i];
}

// A warpgroup of values: its columns of every tile. `done`: tiles of each warpgroup of scores before.
template <int kGroup>
__device__ __forceinline__ void gather_values(Fixed& fixed, const Segment& c, u32 (&done)[2], float (&o)[kMyBlocks][kPart]) {
    const u32 empty = shared_address(fixed.empty), ready = shared_address(fixed.ready), used = shared_address(fixed.used);
    const int column = 2 * (c.lane % 4);
    u32 stamp = 0xffffffffu;                                     // of no tile: the first tile sets the values' reference
    for (int row = c.warp * 32 + c.lane; row < kRows; row += 128) fixed.applied[kGroup][row] = negative_infinity();
    for (int j = 0; j < c.tiles; ++j) {
        const int from = j & 1;
        const u32 slot = (c.base + j) % STAGES;
        barrier_wait(ready + 8 * from, (from ? done[1] : done[0]) & 1);
        if (from) ++done[1];
        else ++done[0];
        const u32 now = *reinterpret_cast<volatile u32*>(&fixed.stamp[from]);
        if (now != stamp) {
            stamp = now;
            sync_group(2 + kGroup);                              // `applied` is written
#pragma unroll
            for (int i = 0; i < kRows / 4; ++i) {
                const int row = i / 2 * 8 + column + i % 2;
                const float before = fixed.applied[kGroup][row], top = fixed.published[from][row];
                const float factor = before == negative_infinity() ? 0.f : exp2_fast(before - top);
#pragma unroll
                for (int b = 0; b < kMyBlocks; ++b)
#pragma unroll
                    for (int k = 0; k < 2; ++k) o[b][i / 2 * 4 + 2 * k + i % 2] *= factor;
            }
            sync_group(2 + kGroup);                              // it has been read
            for (int row = c.warp * 32 + c.lane; row < kRows; row += 128)
                fixed.applied[kGroup][row] = fixed.published[from][row];
        }
        add_values<kGroup>(fixed.ratio[from], o, c.ring + slot * kStageBytes, empty + 8 * slot,
                           c.probability + from * kProbabilityBytes, c.warp, c.lane);
        if (c.lane == 0) barrier_arrive(used + 8 * from);
    }
}

// The first of the two columns that value pair k of item `piece` of a partial result holds.
__device__ __forceinline__ int item_column(int piece, int k) { return piece * 8 + k * 2; }

// Writes a warpgroup's columns of a segment: to the output where it is the whole request, else as a partial result, in which
// each row is scaled by its largest value of these columns.
template <int kGroup>
__device__ __forceinline__ void store(const Params& p, Fixed& fixed, const float (&o)[kMyBlocks][kPart], int request, int split,
                                      bool whole, int warp, int lane) {
    constexpr int kFirst = kGroup * kMyBlocks, kCount = kGroup == 0 ? kMyBlocks : kBlocks - kMyBlocks;
    const int rows = p.query_len * p.heads, first_column = kFirst * 64 + warp * 16 + lane / 4 * 2;
    float scale[kRows / 4];
    if (!whole) {
        float largest[kRows / 4];
#pragma unroll
        for (int i = 0; i < kRows / 4; ++i) {
            float x = 0.f;
#pragma unroll
            for (int b = 0; b < kCount; ++b)
                if (b * 64 + first_column < LATENT)
                    x = fmaxf(x, fmaxf(fabsf(o[b][i / 2 * 4 + i % 2]), fabsf(o[b][i / 2 * 4 + 2 + i % 2])));
            x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 4));
            x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 8));
            largest[i] = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 16));
        }
#pragma unroll
        for (int i = 0; i < kRows / 4; ++i)
            if (lane < 4) fixed.largest_values(kGroup, warp)[i / 2 * 8 + 2 * lane + i % 2] = largest[i];
        sync_group(2 + kGroup);
    }
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
        const int row = i / 2 * 8 + 2 * (lane % 4) + i % 2, global_row = blockIdx.y * kRows + row;
        const float top = fixed.applied[kGroup][row];
        float total = 0.f;
#pragma unroll
        for (int g = 0; g < 2; ++g) {
            float sum = 0.f;
#pragma unroll
            for (int k = 0; k < 4; ++k) sum += fixed.exchange[g][k][row];
            const float reference = fixed.reference[g][0][row];
            total += sum * (reference == negative_infinity() ? 0.f : exp2_fast(reference - top));
        }
        if (whole) {
            scale[i] = total > 0.f ? 1.f / total : 0.f;
            continue;
        }
        float largest = 0.f;
#pragma unroll
        for (int k = 0; k < 4; ++k) largest = fmaxf(largest, fixed.largest_values(kGroup, k)[row]);
        scale[i] = largest > 1e-37f ? 1.f / largest : 0.f;
        if (warp == 0 && lane < 4 && global_row < rows) {
            float* sums = p.partial_sums + 3ll * split * rows + global_row;
            if (kGroup == 0) sums[0] = total > 0.f ? top + log2_fast(total) : negative_infinity();
            sums[(1 + kGroup) * rows] = total > 0.f ? largest / total : 0.f;
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
        for (int b = 0; b < kCount; ++b) {
            const int at = b * 64 + first_column;
            if (at >= LATENT) continue;
            const float low = o[b][i / 2 * 4 + i % 2] * scale[i], high = o[b][i / 2 * 4 + 2 + i % 2] * scale[i];
            *reinterpret_cast<u32*>(target + at) = whole ? pack_bf16(low, high) : pack_half(low, high);
        }
    }
}
