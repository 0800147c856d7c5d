// ---- scores -------------------------------------------------------------------------------------------------------
//
// Of a product [64 tokens, kRows query rows], a thread holds row lane / 4 of its warp's 16 and the row 8 after it, and of each 8
// columns 2 (lane % 4) and the next: element 4 j + 2 i + e is row i, column 8 j + 2 (lane % 4) + e. A query row's reference and
// sum are held the same way, as element 2 j + e.

// Shared memory behind the ring. The first index of an array [2] is the warpgroup of scores.
struct alignas(16) Fixed {
    u64 full[STAGES], empty[STAGES], ready[2], used[2];          // ready, used: of a tile's probabilities and values
    u64 query;                                                   // the first query is in registers
    Constants constants;
    Shared merge;
    u32 stamp[2], largest[kLoaders];                             // largest: the largest value in each warp's part of the query
    u32 votes[2][2];                                             // used alternately, a byte for each warp: see sync_any()
    u16 ratio[2][2][ROW_VALUES ? 1 : kTile];                     // of the tokens' shared and own scales to their weights
    alignas(16) float start[kStarts > 0 ? kStarts : 1][kRows];   // the numbers that sums begin with
    alignas(16) float exchange[2][4][kRows];                     // between warps: largest exponents, in the end sums
    float reference[2][4][kRows];                                // the reference of each warp's probabilities
    float published[2][kRows];                                   // the reference of the tile that is ready
    float applied[ROW_VALUES ? 1 : kRows];                       // the reference of the values; in the end their scale
    u16* target[ROW_VALUES ? 1 : kRows];                         // the addresses for the values

    // Returns the memory for a warp of values' largest value of each row, which is free once no tile is in progress.
    __device__ __forceinline__ float* largest_values(int warp) { return warp == 0 ? published[0] : reference[0][warp]; }
};

__device__ __forceinline__ void sync_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(3 + group) : "memory"); }
// Synchronizes the group and returns whether `x` holds for one of its threads. `turn` alternates from call to call, so that no warp
// overwrites votes that another has yet to read. The barrier's own reduction cannot replace the votes, because PTX does not let
// `barrier.red` and `barrier.sync` use the same barrier.
__device__ __forceinline__ bool sync_any(Fixed& fixed, int group, u32 turn, bool x) {
    volatile u32& votes = fixed.votes[group][turn];
    const bool mine = __any_sync(0xffffffff, x);
    if (threadIdx.x % 32 == 0) reinterpret_cast<volatile u8*>(&votes)[threadIdx.x / 32 % 4] = mine;
    sync_group(group);
    return votes != 0;
}

// A warpgroup's view of the current segment.
struct Segment {
    int length, unmasked;                                        // unmasked: tokens that every query row may see
    float scale_log2;                                            // a score's factor besides its token's scales
    u32 ring, base, q_smem, probability, values;                 // base: the tiles of earlier segments
    int tiles, first_token, group, warp, lane;
};

// Stage and phase of half tile `number`, counted over all segments.
struct Stage {
    u32 slot, phase;
    __device__ __forceinline__ explicit Stage(u32 number) : slot(number % STAGES), phase(number / STAGES & 1) {}
    template <u32 kCount> __device__ __forceinline__ void advance() {
        slot += kCount % STAGES, phase ^= kCount / STAGES & 1;
        if (slot >= STAGES) slot -= STAGES, phase ^= 1;
    }
};

// Returns the descriptor of a step of the query.
__device__ __forceinline__ u64 query_step(u64 q, int step) { return q + ((step / 4 * kQPanelBytes + step % 4 * 32) >> 4); }

// Sets a thread's accumulators to the numbers that the query rows' sums begin with.
__device__ __forceinline__ void begin(float (&sum)[kPart], const float (&start)[kRows], int lane) {
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
        const float2 x = *reinterpret_cast<const float2*>(start + 8 * j + 2 * (lane % 4));
        sum[4 * j] = sum[4 * j + 2] = x.x, sum[4 * j + 1] = sum[4 * j + 3] = x.y;
    }
}

// Adds up the parts of load_query() to the numbers that sums begin with if their codes keep a power of two. Both warpgroups of
// scores call this function.
__device__ __forceinline__ void find_starts(Fixed& fixed, const float* parts, int consumer) {
    if (consumer < kStarts * kRows) {
        const int kind = consumer / kRows, row = consumer % kRows;
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < kGroupsAtOnce; ++i) sum += parts[(kind * kGroupsAtOnce + i) * kRows + row];
        fixed.start[kind][row] = sum;
    }
    sync_consumers();
}

// Computes the exponents of a warp's 16 tokens, whose raw rows begin at `tokens`: scores times scale_log2, plus the logarithm of
// the probabilities' weight. With ROW_VALUES the warp also stores the tokens' unpacked 8-bit columns, once `used` says that those
// of the warpgroup's tile before are not needed any more: row r of a panel is token r, and the 16 columns of a step have the
// order of wgmma's left operand.
__device__ __forceinline__ void scores(const Fixed& fixed, float (&s)[kPart], u32 tokens, const TokenScales& t, const Segment& c,
                                       u32 used, u32 used_phase) {
    const u32 rows = tokens + c.lane % 16 * kStride + c.lane / 16 * 16, row = tokens + c.lane / 4 * kStride;
    const u32 target = c.values + (c.warp * 16 + c.lane % 16) * 128, chunk = (c.lane / 16 ^ c.lane % 8) << 4;
    const u64 q = descriptor(c.q_smem, 16);
    const Constants constants = fixed.constants.loaded();
    u32 raw[3][8], a[2][8] = {};
    float sketch[kPart] = {}, rope[kPart] = {}, own[kPart] = {};  // rope: kSplit; own: kApart
    load_group(0, rows, row, c.lane, raw[0]);
    load_group(1, rows, row, c.lane, raw[1]);
    if constexpr (kSketchAbove) begin(sketch, fixed.start[kSketchStart], c.lane);
    if constexpr (kRopeAbove) begin(rope, fixed.start[kRopeStart], c.lane);
    if constexpr (kBytesAbove) begin(s, fixed.start[kBytesStart], c.lane);
    if constexpr (kBytesAbove && kApart) begin(own, fixed.start[kOwnStart], c.lane);
    pin(s);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
        if (g + 2 < kGroups) load_group(g + 2, rows, row, c.lane, raw[(g + 2) % 3]);
        if (g >= 2) {                                            // the registers of an earlier group are free
            wgmma_wait<1>();
            pin(a[g % 2]);
        }
        unpack_group(g, raw[g % 3], t, constants, c.lane, a[g % 2]);
        if (ROW_VALUES && g == kOwnGroup) barrier_wait(used, used_phase);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int step = 2 * g + i;
            if (step >= kSteps) break;
            const u64 columns = query_step(q, step);
            const u32* r = a[g % 2] + 4 * i;
            const bool of_rope = step >= kRopeStep && step < kOwnStep, first = step == kRopeStep || step == kOwnStep;
            if (step < kRopeStep) wgmma_half(sketch, r[0], r[1], r[2], r[3], columns, kSketchAbove || step > 0);
            else if (kApart && step >= kOwnStep + SHARED / 16)
                wgmma_half(own, r[0], r[1], r[2], r[3], columns, kBytesAbove || step > kOwnStep + SHARED / 16);
            else if (of_rope && kSplit && ROPE_BITS == 16) wgmma_bf16(rope, r[0], r[1], r[2], r[3], columns, !first);
            else if (of_rope && kSplit) wgmma_half(rope, r[0], r[1], r[2], r[3], columns, kRopeAbove || !first);
            else if (of_rope && ROPE_BITS == 16) wgmma_bf16(s, r[0], r[1], r[2], r[3], columns, !first);
            else wgmma_half(s, r[0], r[1], r[2], r[3], columns, kBytesAbove || (kSplit ? !first : step > kRopeStep));
            if (ROW_VALUES && step >= kOwnStep)
                store_matrices4(target + (step - kOwnStep) / 4 * kPanelBytes + (chunk ^ (step - kOwnStep) % 4 << 5), r);
        }
        wgmma_commit();
    }
    wgmma_wait<0>();
    pin(s);
#pragma unroll
    for (int i = 0; i < 2; ++i) pin(a[i]);
    if (SKETCH > 0) pin(sketch);
    if (kSplit) pin(rope);
    if (kApart) pin(own);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float scale = t.power[i] * c.scale_log2;
        const float of_own = t.own_scale[i] * c.scale_log2;
        const float of_sketch = t.sketch_scale[i] * c.scale_log2, of_rope = t.rope_scale[i] * c.scale_log2;
#pragma unroll
        for (int k = 2 * i; k < kPart; k += 4)
#pragma unroll
            for (int e = k; e < k + 2; ++e) {
                s[e] = fmaf(s[e], scale, t.weight_log2[i]);
                if (kApart) s[e] = fmaf(own[e], of_own, s[e]);
                if (SKETCH > 0) s[e] = fmaf(sketch[e], of_sketch, s[e]);
                if (kSplit) s[e] = fmaf(rope[e], of_rope, s[e]);
            }
    }
}

// Sets the exponents of tokens that a query row may not see to minus infinity.
__device__ __forceinline__ void mask(const Params& p, const Segment& c, float (&s)[kPart], int token) {
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int limit = limit_of(p, c.length, 8 * j + 2 * (c.lane % 4) + e);
#pragma unroll
            for (int i = 0; i < 2; ++i)
                if (token + 8 * i >= limit) s[4 * j + 2 * i + e] = negative_infinity();
        }
    }
}

// Offers a tile's largest exponents to settle().
__device__ __forceinline__ void offer(Fixed& fixed, const Segment& c, const float (&s)[kPart]) {
    const int column = 2 * (c.lane % 4);
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            float top = fmaxf(s[4 * j + e], s[4 * j + 2 + e]);
            top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 4));
            top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 8));
            top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 16));
            if (c.lane < 4) fixed.exchange[c.group][c.warp][8 * j + column + e] = top;
        }
    }
}

// Raises a warpgroup's reference to the exponents that were offered, and scales its sums. At the start of a segment both warpgroups
// use the offers of both, so that they agree; later each uses its own. The reference of a row that sees no token yet is finite,
// because a score of minus infinity must lie infinitely far below it.
__device__ __forceinline__ void settle(Fixed& fixed, const Segment& c, bool start, float (&total)[kRows / 4]) {
    float(&mine)[kRows] = fixed.reference[c.group][c.warp];
    float2 before[kRows / 8];
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) before[j] = *reinterpret_cast<const float2*>(mine + 8 * j + 2 * (c.lane % 4));
    if (start) sync_consumers();
    else sync_group(c.group);
#pragma unroll 1
    for (int row = c.lane; row < kRows; row += 32) {
        float top = fmaxf(mine[row], -1e30f);
#pragma unroll
        for (int warp = 0; warp < 4; ++warp) {
            top = fmaxf(top, fixed.exchange[c.group][warp][row]);
            if (start) top = fmaxf(top, fixed.exchange[1 - c.group][warp][row]);
        }
        mine[row] = top;
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
        const float2 now = *reinterpret_cast<const float2*>(mine + 8 * j + 2 * (c.lane % 4));
        total[2 * j] *= exp2_fast(before[j].x - now.x), total[2 * j + 1] *= exp2_fast(before[j].y - now.y);
    }
    if (start) sync_consumers();                                 // both have read the offers
}

// Turns exponents into packed, weighted probabilities relative to the reference, and adds up the probabilities without weights.
// Returns whether a weighted one is too large for float16.
__device__ __forceinline__ bool soften(const Fixed& fixed, const Segment& c, const float (&s)[kPart], const TokenScales& t,
                                       u32 (&packed)[kPart / 2], float (&total)[kRows / 4]) {
    const float* reference = fixed.reference[c.group][c.warp] + 2 * (c.lane % 4);
    u32 largest = 0;
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
        const float2 r = *reinterpret_cast<const float2*>(reference + 8 * j);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float x[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                x[e] = exp2_fast(s[4 * j + 2 * i + e] - (e ? r.y : r.x));
                total[2 * j + e] = fmaf(x[e], t.inverse_weight[i], total[2 * j + e]);
            }
            packed[2 * j + i] = pack_half(x[0], x[1]);
            largest = larger_half(largest, packed[2 * j + i]);
        }
    }
    return (largest & 0xFFFF) >= 0x7400 || largest >> 16 >= 0x7400;        // 2^14
}

// Computes every second tile of a segment in a warpgroup of scores. `tries` counts its tries at tiles, `done` its tiles.
__device__ __forceinline__ void attend(const Params& p, Fixed& fixed, const Segment& c, u32& tries, u32& done,
                                       float (&total)[kRows / 4]) {
    float s[kPart];
    u32 packed[kPart / 2];
    const u32 full = shared_address(fixed.full), empty = shared_address(fixed.empty);
    const u32 ready = shared_address(fixed.ready + c.group), used = shared_address(fixed.used + c.group);
    if (c.group >= c.tiles) {                                    // no tile: the other warpgroup alone sets the reference
        for (int row = c.lane; row < kRows; row += 32) fixed.exchange[c.group][c.warp][row] = negative_infinity();
        settle(fixed, c, true, total);
    }
    Stage stage(2 * (c.base + c.group) + c.warp / 2);
    for (int j = c.group; j < c.tiles; j += 2, ++done, stage.advance<4>()) {
        const u32 tokens = c.ring + stage.slot * kStageBytes + c.warp % 2 * 16 * kStride;
        const int first_token = c.first_token + j * kTile, token = first_token + c.warp * 16 + c.lane / 4;
        const bool beyond[2] = {token >= c.length, token + 8 >= c.length};
        bool fresh = j == c.group;                               // the first tile sets the reference
        barrier_wait(full + 8 * stage.slot, stage.phase);
        const TokenScales t = load_scales(tokens + c.lane / 4 * kStride + ROW_BYTES - 8, beyond);
        scores(fixed, s, tokens, t, c, used, (done & 1) ^ 1);
        if (ROW_VALUES) {                                        // the raw rows have been read
            __syncwarp();
            if (c.lane == 0) barrier_arrive(empty + 8 * stage.slot);
        }
        if (first_token + kTile > c.unmasked) mask(p, c, s, token);
#pragma unroll 1
        while (true) {
            if (fresh) {
                offer(fixed, c, s);
                settle(fixed, c, j == c.group, total);
            }
            float before[kRows / 4];
#pragma unroll
            for (int i = 0; i < kRows / 4; ++i) before[i] = total[i];
            const bool over = soften(fixed, c, s, t, packed, total);
            if (!ROW_VALUES) barrier_wait(used, (done & 1) ^ 1);  // the last tile's probabilities have been used
            ++tries;
#pragma unroll
            for (int k = 0; k < kRows / 8; k += 2)
                store_turned4(c.probability + (8 * k + c.lane / 16 * 8 + c.lane % 8) * 128
                                  + (((2 * c.warp + (c.lane >> 3 & 1)) ^ (c.lane & 7)) << 4),
                              packed[2 * k], packed[2 * k + 1], packed[2 * k + 2], packed[2 * k + 3]);
            if (!ROW_VALUES && kTwoScales && c.lane % 4 == 0) {
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
            // A score far above all earlier ones needs a second try with a new reference.
            if (!sync_any(fixed, c.group, tries & 1, over) || fresh) break;
            fresh = true;
#pragma unroll
            for (int i = 0; i < kRows / 4; ++i) total[i] = before[i];
        }
        if (c.warp == 0 && c.lane == 0) barrier_arrive(ready);
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
    sync_group(c.group);                                         // the last offers have been read
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i)
        if (c.lane < 4) fixed.exchange[c.group][c.warp][i / 2 * 8 + column + i % 2] = total[i];
}
