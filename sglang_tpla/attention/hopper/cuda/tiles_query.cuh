// ---- query --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ bool is_bf16(int step) { return ROPE_BITS == 16 && step < kRopeSteps; }

// A row of the query. `valid` is false beyond the last row, where the pointers are those of the first.
struct QueryRow {
    const u16 *latent, *rope;
    bool valid;

    __device__ __forceinline__ QueryRow(const Params& p, int request, int row) {
        const int global_row = blockIdx.y * kRows + row;
        valid = global_row < p.query_len * p.heads;
        const int token = valid ? global_row / p.heads : 0, head = valid ? global_row - token * p.heads : 0;
        const long long query = (long long)request * p.query_len + token;
        latent = p.q_latent + query * p.q_latent_token_stride + head * p.q_latent_head_stride;
        rope = p.q_rope + query * p.q_rope_token_stride + head * p.q_rope_head_stride;
    }
    __device__ __forceinline__ const u16* chunk(int place, int column) const {
        return (place < RopeChunks::kCount ? rope : latent) + column;
    }
};
// The first of the eight columns of q_rope or q_latent that are multiplied by chunk `place` of a cached row. Codes beyond the
// last of a sketch are multiplied by zeros.
__host__ __device__ constexpr int query_column(int place) {
    if (place < RopeChunks::kCount) return RopeChunks::column(place);
    if (place >= kKeyChunks) return OwnChunks::column(place - kKeyChunks);
    const int column = SketchChunks::column(place - RopeChunks::kCount);
    return LATENT + (column < SKETCH ? column : 0);
}
__device__ __forceinline__ bool is_of_sketch(int place) { return place >= RopeChunks::kCount && place < kKeyChunks; }
__device__ __forceinline__ bool meets_nothing(int place, int column) {
    return SKETCH % 32 && place > RopeChunks::kCount && place < kKeyChunks && column == LATENT;
}

// Returns two bfloat16 values times `factor`, in float16, or in bfloat16 if the key is bfloat16.
__device__ __forceinline__ u32 scaled(u32 pair, float factor, bool bf16) {
    const float low = __uint_as_float(pair << 16) * factor, high = __uint_as_float(pair & 0xFFFF0000u) * factor;
    return bf16 ? pack_bf16(low, high) : pack_half(low, high);
}

// Loads the segment's query multiplied by a power of two that leaves no value too large, and returns that power's inverse. The
// first steps go to the registers of the warpgroup of scores, the others to shared memory. All consumers call this function.
template <bool kScores>
__device__ __forceinline__ float load_query(const Params& p, u32 q_smem, int request, u32* shared_largest, const u8* columns,
                                            int consumer, u32 (&q)[4 * QUERY_STEPS]) {
    constexpr int kPlaces = 2 * (kSteps - QUERY_STEPS), kTogether = kConsumerThreads / kRows;
    const int row = consumer % kRows;
    const auto address = [&](int place) { return q_smem + place / 8 * kQPanelBytes + row * 128 + ((place % 8 ^ row % 8) << 4); };
    if (consumer == 0) *shared_largest = 0;
    sync_consumers();                                                  // from here no thread reads the old query
    u32 pair = 0;
    const QueryRow mine(p, request, row);
#pragma unroll 4
    for (int place = consumer / kRows; place < kPlaces; place += kTogether) {           // counted beyond the steps in registers
        const int of_all = place + 2 * QUERY_STEPS, column = columns[of_all] * 8;
        uint4 x = __ldcg(reinterpret_cast<const uint4*>(mine.chunk(of_all, column)));
        if (!mine.valid || meets_nothing(of_all, column)) x = make_uint4(0, 0, 0, 0);
        if (is_of_sketch(of_all)) x = in_order_of_levels(x);
        store_shared4(address(place), x.x, x.y, x.z, x.w);
        pair = larger_magnitudes(larger_magnitudes(larger_magnitudes(larger_magnitudes(pair, x.x), x.y), x.z), x.w);
    }
    if constexpr (kScores) {
        // wgmma's left operand: a thread has rows lane / 4 and lane / 4 + 8, and of both chunks columns 2 (lane % 4) and the next.
        const int first = consumer / 32 * 16 + consumer % 32 / 4, column = 2 * (consumer % 4);
        const QueryRow rows[2] = {QueryRow(p, request, first), QueryRow(p, request, first + 8)};
#pragma unroll
        for (int i = 0; i < 4 * QUERY_STEPS; ++i) {
            const u16* chunk = rows[i % 2].chunk(i / 2, query_column(i / 2));
            if (is_of_sketch(i / 2)) q[i] = __ldcg(chunk + column / 2) | (u32)__ldcg(chunk + column / 2 + 4) << 16;
            else q[i] = __ldcg(reinterpret_cast<const u32*>(chunk + column));
        }
#pragma unroll
        for (int i = 0; i < 4 * QUERY_STEPS; ++i) {
            if (!rows[i % 2].valid || meets_nothing(i / 2, query_column(i / 2))) q[i] = 0;
            pair = larger_magnitudes(pair, q[i]);
        }
    }
    u32 largest = largest_of_warp(pair);
    if (consumer % 32 == 0) atomicMax(shared_largest, largest);
    sync_consumers();
    largest = *reinterpret_cast<volatile u32*>(shared_largest);
    const u32 exponent = query_exponent(largest);
    const float factor = __uint_as_float(exponent << 23);
#pragma unroll 1
    for (int place = consumer / kRows; place < kPlaces; place += kTogether) {
        const bool bf16 = is_bf16(place / 2 + QUERY_STEPS);
        const uint4 x = load_shared4(address(place));
        store_shared4(address(place), scaled(x.x, factor, bf16), scaled(x.y, factor, bf16), scaled(x.z, factor, bf16),
                      scaled(x.w, factor, bf16));
    }
    if constexpr (kScores) {
#pragma unroll
        for (int i = 0; i < 4 * QUERY_STEPS; ++i) q[i] = scaled(q[i], factor, is_bf16(i / 4));
    }
    fence_async_proxy();
    sync_consumers();
    return __uint_as_float((254 - exponent) << 23);
}
