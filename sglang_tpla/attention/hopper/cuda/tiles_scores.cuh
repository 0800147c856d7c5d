// ---- scores -------------------------------------------------------------------------------------------------------
//
// One warpgroup computes scores. Of S [64 query rows, 64 tokens] a thread holds rows 16 warp + lane / 4 and 8 further on, and of
// each 8 tokens 2 (lane % 4) and the next: element 4 j + 2 i + e is row i, token 8 j + 2 (lane % 4) + e.

// A consumer's view of the current segment.
struct Segment {
    int length, unmasked;                                        // unmasked: tokens that every query row may see
    float scale_log2;                                            // multiplies a score, besides its token's power
    int tiles, first_token, warp, lane;
};

// Addresses in shared memory.
struct Memory {
    u32 query, probability, ring;
};

// Computes the products of a tile.
__device__ __forceinline__ void scores(float (&s)[32], const u32 (&q)[4 * QUERY_STEPS], Fixed& fixed, const Memory& memory,
                                       const Stage& at) {
    const u64 query = descriptor(memory.query, 16);
    const u64 tile = descriptor(memory.ring + at.slot * kStageBytes, 16);
    barrier_wait(shared_address(fixed.keys_full + at.slot), at.phase);
    fence_async_proxy();
    pin(s);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        if (step == kOwnStep) {
            barrier_wait(shared_address(fixed.values_full + at.slot), at.phase);
            fence_async_proxy();
        }
        const int column = step < kOwnStep ? OwnChunks::kCount / 2 + step : step - kOwnStep, of_query = step - QUERY_STEPS;
        const u64 b = tile + ((column / 4 * kPanelBytes + column % 4 * 32) >> 4);
        const u64 a = query + ((of_query / 4 * kQPanelBytes + of_query % 4 * 32) >> 4);
        const u32* r = q + 4 * step;
        if (step < QUERY_STEPS && is_bf16(step)) wgmma_rows_bf16(s, r[0], r[1], r[2], r[3], b, step > 0);
        else if (step < QUERY_STEPS) wgmma_rows_half(s, r[0], r[1], r[2], r[3], b, step > 0);
        else if (is_bf16(step)) wgmma_shared_bf16(s, a, b, step > 0);
        else wgmma_shared_half(s, a, b, step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(s);
}

// Finds the largest weighted exponent of each row of a tile. Only the first tile of a segment, and one with a score far above all
// earlier ones, need it.
__device__ __forceinline__ void find_tops(const float (&s)[32], const Eight* eights, float scale_log2, float (&top)[2]) {
    top[0] = top[1] = negative_infinity();
#pragma unroll
    for (int k = 0; k < kTile / 8; ++k) {
        const float factor = fmaxf(eights[k].power * scale_log2, 1e-37f), weight = eights[k].weight_log2;
#pragma unroll
        for (int e = 0; e < 4; ++e) top[e / 2] = fmaxf(top[e / 2], fmaf(s[4 * k + e], factor, weight));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffff, top[i], 1));
        top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffff, top[i], 2));
    }
}

// A thread's running softmax over its two query rows.
struct Rows {
    float reference[2] = {negative_infinity(), negative_infinity()}, total[2] = {0.f, 0.f};
    u32 stamp = 0;

    // Writes the probabilities of a segment's tile `j` to shared memory, relative to the rows' reference and weighted by the
    // tokens' power.
    __device__ __forceinline__ void soften(const Params& p, Fixed& fixed, const Segment& c, const Memory& memory, float (&s)[32],
                                           int j, const Stage& at, u32 used_phase) {
        const int column = 2 * (c.lane % 4), row = c.warp * 16 + c.lane / 4;
        const Eight* eights = fixed.eights[at.slot];
        const int first_token = c.first_token + j * kTile;
        if (first_token + kTile > c.unmasked) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int limit = limit_of(p, c.length, row + 8 * i) - first_token - column;
#pragma unroll
                for (int k = 0; k < kTile / 8; ++k)
#pragma unroll
                    for (int e = 0; e < 2; ++e)
                        if (8 * k + e >= limit) s[4 * k + 2 * i + e] = negative_infinity();
            }
        }
        bool fresh = j == 0;
        u32 packed[16];
        float sum[2];
#pragma unroll 1
        while (true) {
            if (fresh) {
                float top[2];
                find_tops(s, eights, c.scale_log2, top);
                ++stamp;
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float now = fmaxf(reference[i], top[i]);
                    total[i] *= reference[i] == negative_infinity() ? 0.f : exp2_fast(reference[i] - now);
                    reference[i] = now;
                }
            }
            const float base[2] = {reference[0] == negative_infinity() ? 0.f : reference[0],
                                   reference[1] == negative_infinity() ? 0.f : reference[1]};
            u32 largest = 0;
            sum[0] = sum[1] = 0.f;
#pragma unroll
            for (int k = 0; k < kTile / 8; ++k) {
                const float4 eight = *reinterpret_cast<const float4*>(eights + k);       // power, logarithm, inverse
                const float factor = fmaxf(eight.x * c.scale_log2, 1e-37f);              // not 0, so that masked scores stay masked
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float x = exp2_fast(fmaf(s[4 * k + 2 * i], factor, eight.y - base[i]));
                    const float y = exp2_fast(fmaf(s[4 * k + 2 * i + 1], factor, eight.y - base[i]));
                    sum[i] = fmaf(x + y, eight.z, sum[i]);
                    packed[2 * k + i] = pack_half(x, y);
                    largest = larger_half(largest, packed[2 * k + i]);
                }
            }
            // A score far above all earlier ones takes a second try with a new reference.
            const bool over = (largest & 0xFFFF) >= 0x7400 || largest >> 16 >= 0x7400;          // 2^14
            if (fresh || !__any_sync(0xffffffff, over)) break;
            fresh = true;
        }
        total[0] += sum[0], total[1] += sum[1];
        barrier_wait(shared_address(&fixed.used), used_phase);
        const int my_row = c.warp * 16 + c.lane % 16;
        const u32 target = memory.probability + my_row * 128;
#pragma unroll
        for (int k = 0; k < kTile / 8; k += 2)
            store_matrices4(target + (((k + c.lane / 16) ^ (my_row & 7)) << 4), packed + 2 * k);
        if (fresh && c.lane % 4 == 0) {
#pragma unroll
            for (int i = 0; i < 2; ++i) fixed.published[row + 8 * i] = reference[i];
        }
        if (c.lane == 0) fixed.stamp[c.warp] = stamp;
    }
};

// Computes the probabilities of all tiles of a segment. `done` counts tiles.
__device__ __forceinline__ void attend(const Params& p, Fixed& fixed, const Segment& c, const Memory& memory,
                                       const u32 (&q)[4 * QUERY_STEPS], Stage& at, u32& done) {
    const int row = c.warp * 16 + c.lane / 4;
    Rows r;
#pragma unroll 1
    for (int j = 0; j < c.tiles; ++j) {
        float s[32];
        scores(s, q, fixed, memory, at);
        if (c.lane == 0) barrier_arrive(shared_address(fixed.keys_empty + at.slot));
        r.soften(p, fixed, c, memory, s, j, at, (done++ & 1) ^ 1);
        fence_async_proxy();
        __syncwarp();
        if (c.lane == 0) {
            barrier_arrive(shared_address(&fixed.ready));
            barrier_arrive(shared_address(fixed.values_empty + at.slot));
        }
        at.next();
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        r.total[i] += __shfl_xor_sync(0xffffffff, r.total[i], 1);
        r.total[i] += __shfl_xor_sync(0xffffffff, r.total[i], 2);
        if (c.lane % 4 == 0) fixed.total[row + 8 * i] = r.total[i];
    }
}
