// ---- consumers ----------------------------------------------------------------------------------------------------

// One thread's share of the running softmax: the maxima of its two rows (8 apart), and its part of their sums.
struct Softmax {
    float highest[2], total[2];
};

// The query of the last kRegisterSteps steps, if any, in wgmma's layout: rows lane / 4 and lane / 4 + 8, column pairs 8 apart.
struct QueryRegisters { u32 value[kRegisterSteps ? 4 * kRegisterSteps : 1]; };

__device__ __forceinline__ void load_query_registers(const Params& p, QueryRegisters& query, int request, int first_row,
                                                     int thread) {
    if (kRegisterSteps == 0) return;
    const int lane = thread % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = blockIdx.y * kRows + first_row + (thread / 32) * 16 + lane / 4 + half * 8;
        const bool valid = row < p.query_len * p.heads;
        const int token = valid ? row / p.heads : 0, head = valid ? row - token * p.heads : 0;
        const u16* rope = p.q_rope + ((long long)request * p.query_len + token) * p.q_rope_token_stride
                        + head * p.q_rope_head_stride + (lane % 4) * 2;
#pragma unroll
        for (int i = 0; i < 2 * kRegisterSteps; ++i)
            query.value[2 * i + half] = valid ? __ldcg(reinterpret_cast<const u32*>(rope + 8 * i)) : 0u;
    }
}

// Queues the scores of a tile. Steps with both operands in shared memory use all of its bandwidth, so steps that take the
// query from registers are spread among them.
__device__ __forceinline__ void scores(float (&s)[32], u32 q_rows, const QueryRegisters& query, u32 stage) {
    const u64 q = descriptor(q_rows, 16), k = descriptor(stage, 16);
    pin(s);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
        const int before = i * kRegisterSteps / kSteps;          // steps from registers among the first i
        const bool from_registers = (i + 1) * kRegisterSteps / kSteps > before;
        const int step = from_registers ? kSteps - kRegisterSteps + before : i - before;
        const u64 keys = k + (((step / 4) * kPanelBytes + (step % 4) * 32) >> 4);
        const u32* a = query.value + 4 * before;
        if (from_registers) wgmma_rs_64(s, a[0], a[1], a[2], a[3], keys, i > 0);
        else wgmma_ss_64(s, q + (((step / 4) * kQPanelBytes + (step % 4) * 32) >> 4), keys, i > 0);
    }
    wgmma_commit();
}

__device__ __forceinline__ void add_values(float (&o)[kOut], const u32 (&probability)[16], u32 value_panels) {
    const u64 v = descriptor(value_panels, kPanelBytes);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kTile / 16; ++step)
        wgmma_rs(o, probability[4 * step], probability[4 * step + 1], probability[4 * step + 2],
                 probability[4 * step + 3], v + ((step * 16 * 128) >> 4));
    wgmma_commit();
}

// The maximum that a row subtracts may lag behind its true maximum by this many powers of two, so that only the first tiles
// rescale the accumulators; fp32 sums of values up to 2^8 lose nothing.
constexpr float kLag = 8.f;

// Turns scores into unnormalised probabilities in place, and returns the factor for each row's older sums.
__device__ __forceinline__ void soften(float (&s)[32], Softmax& state, float (&factor)[2], float scale_log2, int first_token,
                                       const int (&limit)[2], bool masked, int lane) {
    if (masked) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const int token = first_token + (i / 4) * 8 + (lane % 4) * 2 + (i & 1);
            if (token >= limit[(i >> 1) & 1]) s[i] = negative_infinity();
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float top = s[2 * half];
#pragma unroll
        for (int i = 0; i < 32; i += 4) top = fmaxf(top, fmaxf(s[i + 2 * half], s[i + 2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
        const bool raise = (top - state.highest[half]) * scale_log2 > kLag;
        factor[half] = raise ? exp2_fast((state.highest[half] - top) * scale_log2) : 1.f;
        if (raise) state.highest[half] = top;
        const float shift = state.highest[half] == negative_infinity() ? 0.f : state.highest[half] * scale_log2;
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < 32; i += 4) {
            s[i + 2 * half] = exp2_fast(s[i + 2 * half] * scale_log2 - shift);
            s[i + 2 * half + 1] = exp2_fast(s[i + 2 * half + 1] * scale_log2 - shift);
            sum += s[i + 2 * half] + s[i + 2 * half + 1];
        }
        state.total[half] = state.total[half] * factor[half] + sum;
    }
}

__device__ __forceinline__ void rescale(float (&o)[kOut], const float (&factor)[2]) {
    if (__any_sync(0xffffffff, factor[0] != 1.f || factor[1] != 1.f)) {
#pragma unroll
        for (int i = 0; i < kOut; ++i) o[i] *= factor[(i >> 1) & 1];
    }
}

__device__ __forceinline__ void pack_probability(u32 (&packed)[16], const float (&s)[32]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) packed[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
}

// The tiles of a segment, and the ring that brings them.
struct Stretch {
    u32 ring, full, empty, base;                                 // base: tiles that have gone through the ring before
    int tiles, first_token, unmasked;                            // unmasked: tokens that every row may see
};

// MODE_TOKENS and MODE_WIDTH: a warpgroup computes scores, softmax and values one after the other; the other warpgroup fills
// the gaps.
__device__ __forceinline__ void attend(u32 q_rows, const QueryRegisters& query, const Stretch& t, const int (&limit)[2],
                                       float scale_log2, float (&o)[kOut], Softmax& state, int group, int first_panel, int lane) {
    constexpr int kStep = MODE == MODE_TOKENS ? 2 : 1;
    float s[32], factor[2];
    u32 probability[16];
    for (int j = MODE == MODE_TOKENS ? group : 0; j < t.tiles; j += kStep) {
        const u32 at = t.base + j, stage = at % STAGES;
        barrier_wait(t.full + 8 * stage, (at / STAGES) & 1);
        fence_async_proxy();
        scores(s, q_rows, query, t.ring + stage * kStageBytes);
        wgmma_wait<0>();
        pin(s);
        const int first_token = t.first_token + j * kTile;
        soften(s, state, factor, scale_log2, first_token, limit, first_token + kTile > t.unmasked, lane);
        rescale(o, factor);
        pack_probability(probability, s);
        pin(o);
        add_values(o, probability, t.ring + stage * kStageBytes + first_panel * kPanelBytes);
        wgmma_wait<0>();
        pin(o);
        pin(probability);
        if (lane == 0) barrier_arrive(t.empty + 8 * stage);
    }
}

// MODE_TOKENS: the warpgroups add up their sums through the query's shared memory, which is free by then. Each warpgroup ends
// with half of the columns: accumulators [kGroup * kOut / 2, (kGroup + 1) * kOut / 2).
template <int kGroup> __device__ __forceinline__ void join(float (&o)[kOut], Softmax& state, float* buffer, int thread) {
    constexpr int kQuarter = kOut / 4;
    float* theirs = buffer + (1 - kGroup) * (kQuarter + 4) * 128 + thread;
    float* ours = buffer + kGroup * (kQuarter + 4) * 128 + thread;
    float mine[2], other[2];
    sync_consumers();                                            // all scores are done: the query may be overwritten
#pragma unroll
    for (int i = 0; i < 2; ++i) ours[(kQuarter + i) * 128] = state.highest[i], ours[(kQuarter + 2 + i) * 128] = state.total[i];
#pragma unroll
    for (int round = 0; round < 2; ++round) {
        if (round == 1) sync_consumers();
#pragma unroll
        for (int i = 0; i < kQuarter; ++i) ours[i * 128] = o[(1 - kGroup) * (kOut / 2) + round * kQuarter + i];
        sync_consumers();
        if (round == 0) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float highest = theirs[(kQuarter + i) * 128], top = fmaxf(state.highest[i], highest);
                const bool nothing = top == negative_infinity();
                mine[i] = nothing ? 0.f : exp2_fast(state.highest[i] - top);
                other[i] = nothing ? 0.f : exp2_fast(highest - top);
                state.highest[i] = top;
                state.total[i] = state.total[i] * mine[i] + theirs[(kQuarter + 2 + i) * 128] * other[i];
            }
        }
#pragma unroll
        for (int i = 0; i < kQuarter; ++i) {
            const int at = kGroup * (kOut / 2) + round * kQuarter + i, half = (at >> 1) & 1;
            o[at] = o[at] * mine[half] + theirs[i * 128] * other[half];
        }
    }
}

// Writes accumulators [kFirst, kFirst + kCount) of a segment, which is the whole request, to the output.
template <int kFirst, int kCount>
__device__ __forceinline__ void store_out(const Params& p, const float (&o)[kOut], const Softmax& state, int request,
                                          int first_row, int first_column, int group, int thread) {
    const int lane = thread % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = blockIdx.y * kRows + first_row + (thread / 32) * 16 + lane / 4 + half * 8;
        if (row >= p.query_len * p.heads) continue;
        const float inverse = state.total[half] > 0.f ? 1.f / state.total[half] : 0.f;
        const int token = row / p.heads, head = row - token * p.heads;
        u16* out = p.out + ((long long)request * p.query_len + token) * p.out_token_stride + head * p.out_head_stride;
#pragma unroll
        for (int i = kFirst; i < kFirst + kCount; i += 4) {
            const int column = first_column + i * 2 + (lane % 4) * 2;
            // In MODE_WIDTH the columns of the warpgroups may overlap by a panel: the first warpgroup writes it.
            if (column >= LATENT || (MODE == MODE_WIDTH && group == 1 && column < kScaleColumn)) continue;
            *reinterpret_cast<u32*>(out + column) = pack_bf16(o[i + 2 * half] * inverse, o[i + 2 * half + 1] * inverse);
        }
    }
}

// The first of the two columns that value pair k of item `piece` of a partial result holds; see store_partial().
__device__ __forceinline__ int item_column(int piece, int k) { return piece / 4 * 32 + piece % 4 * 2 + k * 8; }

// Writes the same accumulators as a partial result. Float16 takes half the bytes of float32 and loses nothing: each row (of
// this warpgroup) is scaled by its largest value, so it keeps 11 bits where the output has 8. In memory the 8 values of a lane
// are adjacent: of each 32 columns, the lane has 2 * (lane % 4) and the next, and those 8, 16 and 24 further on. Sums are
// stored row by row, so that a warp fills whole sectors: a partly written sector is first read back from device memory.
template <int kFirst, int kCount>
__device__ __forceinline__ void store_partial(const Params& p, const float (&o)[kOut], const Softmax& state, int split,
                                              int first_row, int first_column, int group, int thread) {
    const int lane = thread % 32, rows = p.query_len * p.heads;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = blockIdx.y * kRows + first_row + (thread / 32) * 16 + lane / 4 + half * 8;
        float largest = 0.f;
#pragma unroll
        for (int i = kFirst; i < kFirst + kCount; i += 4)
            if (first_column + i / 16 * 32 < LATENT)
                largest = fmaxf(largest, fmaxf(fabsf(o[i + 2 * half]), fabsf(o[i + 2 * half + 1])));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 2));
        if (row >= rows) continue;
        const float to_one = largest > 1e-37f ? 1.f / largest : 0.f;
        uint4* partial = reinterpret_cast<uint4*>(p.partial_out + ((long long)split * rows + row) * LATENT);
#pragma unroll
        for (int i = kFirst; i < kFirst + kCount; i += 16) {
            const int column = first_column + i * 2;
            if (column >= LATENT || (MODE == MODE_WIDTH && group == 1 && column < kScaleColumn)) continue;
            u32 packed[4];
#pragma unroll
            for (int k = 0; k < 4; ++k)
                packed[k] = pack_half(o[i + 4 * k + 2 * half] * to_one, o[i + 4 * k + 2 * half + 1] * to_one);
            partial[column / 8 + lane % 4] = make_uint4(packed[0], packed[1], packed[2], packed[3]);
        }
        if (lane % 4) continue;
        float* sums = p.partial_sums + 3ll * split * rows + row;
        const float total = state.total[half];
        if (MODE == MODE_ROWS || group == 0)
            sums[0] = total > 0.f ? state.highest[half] + log2_fast(total) : negative_infinity();
        sums[(MODE == MODE_ROWS || group == 0 ? 1 : 2) * rows] = total > 0.f ? largest / total : 0.f;
    }
}

template <int kFirst, int kCount>
__device__ __forceinline__ void store(const Params& p, const float (&o)[kOut], const Softmax& state, int request, int split,
                                      bool whole, int first_row, int first_column, int group, int thread) {
    if (whole) store_out<kFirst, kCount>(p, o, state, request, first_row, first_column, group, thread);
    else store_partial<kFirst, kCount>(p, o, state, split, first_row, first_column, group, thread);
}
