// ---- consumers ----------------------------------------------------------------------------------------------------

// One thread's share of the running softmax: two rows (8 apart), their maxima and its own part of their sums.
struct Softmax {
    float highest[2], total[2];
};

__device__ __forceinline__ void scores(float (&s)[32], u32 q_rows, u32 stage) {
    const u64 q = descriptor(q_rows, 16), k = descriptor(stage, 16);
    pin(s);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
        wgmma_ss_64(s, q + (((step / 4) * kQPanelBytes + (step % 4) * 32) >> 4),
                    k + (((step / 4) * kPanelBytes + (step % 4) * 32) >> 4), step > 0);
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

// Turns scores into unnormalised probabilities in place; returns by what each row's older sums must be multiplied.
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
        top = fmaxf(top, state.highest[half]);
        const float shift = top == negative_infinity() ? 0.f : top * scale_log2;
        factor[half] = exp2_fast(state.highest[half] * scale_log2 - shift);
        state.highest[half] = top;
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

// MODE_TOKENS: the warpgroups add up their sums through the query's shared memory, which is free by then. Each ends with
// half of the columns: accumulators [kGroup * kOut / 2, (kGroup + 1) * kOut / 2).
template <int kGroup> __device__ __forceinline__ void join(float (&o)[kOut], Softmax& state, float* buffer, int thread) {
    constexpr int kQuarter = kOut / 4;
    float* theirs = buffer + (1 - kGroup) * (kQuarter + 4) * 128 + thread;
    float* ours = buffer + kGroup * (kQuarter + 4) * 128 + thread;
    float mine[2], other[2];
    sync_consumers();                                            // all scores done: the query may go
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

// Writes accumulators [kFirst, kFirst + kCount) of a segment: straight to the output when it is the whole request, else
// as a partial result with its log-sum-exp.
template <int kFirst, int kCount>
__device__ __forceinline__ void store(const Params& p, const float (&o)[kOut], const Softmax& state, int request, int split,
                                      bool whole, int first_row, int first_column, bool owns_row, int thread) {
    const int lane = thread % 32, rows = p.query_len * p.heads;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = blockIdx.y * kRows + first_row + (thread / 32) * 16 + lane / 4 + half * 8;
        const float inverse = state.total[half] > 0.f ? 1.f / state.total[half] : 0.f;
        if (row >= rows) continue;
        const int token = row / p.heads, head = row - token * p.heads;
        u16* out = p.out + ((long long)request * p.query_len + token) * p.out_token_stride + head * p.out_head_stride;
        float* partial = p.partial_out + ((long long)split * rows + row) * LATENT;
#pragma unroll
        for (int i = kFirst; i < kFirst + kCount; i += 4) {
            const int column = first_column + i * 2 + (lane % 4) * 2;
            // In MODE_WIDTH the warpgroups' columns may overlap by a panel: the first one writes it.
            if (column >= LATENT || (MODE == MODE_WIDTH && !owns_row && column < kOutPanels * 64)) continue;
            const float x = o[i + 2 * half] * inverse, y = o[i + 2 * half + 1] * inverse;
            if (whole) *reinterpret_cast<u32*>(out + column) = pack_bf16(x, y);
            else *reinterpret_cast<float2*>(partial + column) = make_float2(x, y);
        }
        if (!whole && owns_row && lane % 4 == 0)
            p.partial_lse[(long long)split * rows + row] =
                state.total[half] > 0.f ? state.highest[half] + log2_fast(state.total[half]) : negative_infinity();
    }
}
