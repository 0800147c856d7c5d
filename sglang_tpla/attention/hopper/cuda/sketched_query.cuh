// ---- query --------------------------------------------------------------------------------------------------------
//
// All warps but the producer's load a segment's query [kRows, SKETCH | ROPE | LATENT] into shared memory, in the order in which wgmma
// meets the codes. Most blocks run this code once and wait for each of its instructions, so the loops stay rolled. A warp takes 64
// columns (a panel) of 4 rows at a time and a lane 8 columns; only the four lanes that share 32 columns exchange values.

constexpr int kLoaders = kAllThreads / 32, kPassRows = 16;
constexpr int kPanels = (kGroups + 1) / 2, kPanelsAtOnce = kLoaders / (kPassRows / 4);
static_assert(kPanels * kQPanelBytes <= kQBytes && kRows % kPassRows == 0, "room for whole panels and passes");

__device__ __forceinline__ void sync_all() { asm volatile("bar.sync 6, %0;" ::"n"(kAllThreads) : "memory"); }

// The address of 16-byte piece `piece` of 8 of a row's panel.
__device__ __forceinline__ u32 query_piece(u32 q_smem, u32 row, u32 panel, u32 piece) {
    return q_smem + panel * kQPanelBytes + row * 128 + ((piece ^ row % 8) << 4);
}

// The loops over a warp's part: rows, and the panels of each. A lane has columns of group 2 panel + lane / 4 % 2.
__device__ __forceinline__ u32 first_row(u32 warp, u32 lane) { return warp % 4 * 4 + lane / 8; }
template <class Body> __device__ __forceinline__ void for_panels(u32 warp, const Body& body) {
#pragma unroll 1
    for (u32 panel = warp / 4; panel < kPanels; panel += kPanelsAtOnce) body(panel);
}

// Begins to copy a row's columns to shared memory; zeros where there is no such row or column.
__device__ __forceinline__ void copy_query_row(const Params& p, u32 q_smem, int request, u32 row, u32 warp, u32 lane) {
    const int at = blockIdx.y * kRows + row;
    const int token = (at >= p.heads) + (at >= 2 * p.heads) + (at >= 3 * p.heads), head = at - token * p.heads;
    const long long query = (long long)request * p.query_len + token;
    const u16* latent = p.q_latent + query * p.q_latent_token_stride + head * p.q_latent_head_stride + lane % 4 * 8;
    const u16* rope = p.q_rope + query * p.q_rope_token_stride + head * p.q_rope_head_stride + lane % 4 * 8;
    const int columns = at < p.query_len * p.heads ? -(int)(lane % 4 * 8) : -65536;
    for_panels(warp, [&](u32 panel) {
        const u32 g = 2 * panel + lane / 4 % 2;
        const bool own = g >= kOwnGroup, sketch = g < kSketchGroups;
        const int first = (g - (own ? kOwnGroup : sketch ? 0 : kSketchGroups)) * 32;
        const u16* source = (own || sketch ? latent : rope) + (first + (sketch ? LATENT : 0));
        copy16(query_piece(q_smem, row, panel, lane % 8), source, first < (own ? LATENT : sketch ? SKETCH : ROPE) + columns);
    });
}

// Multiplies a lane's columns by `factor` and stores them where wgmma reads them. ldmatrix hands out codes so that, of the 16
// columns of a step, bytes 4 i and 4 i + 1 come before 4 i + 2 and 4 i + 3; of 32 sketch codes, the first step has 8 i, 8 i + 4,
// 8 i + 1 and 8 i + 5, the second step the others. `above` has the sums that find_starts() adds up, two for each group of a row.
__device__ __forceinline__ void order_query(u32 q_smem, float* above, u32 row, u32 panel, u32 lane, float factor) {
    const u32 g = 2 * panel + lane / 4 % 2, four = lane % 4, first = lane % 8 - four;
    const uint4 columns = load_shared4(query_piece(q_smem, row, panel, lane % 8));
    const u32 words[4] = {columns.x, columns.y, columns.z, columns.w};
    float x[8], sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = __uint_as_float(words[i] << 16) * factor, x[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u) * factor;
    }
    __syncwarp();                                                // all lanes have read what others overwrite
    if (g < kSketchGroups) {
        constexpr float kLevels[4] = {level_above<BITS, 0>(), level_above<BITS, 1>(), level_above<BITS, 2>(), level_above<BITS, 3>()};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            store_shared(query_piece(q_smem, row, panel, first + i) + 4 * four, pack_half(x[i], x[i + 4]));
            sum = fmaf(x[i] + x[i + 4], kLevels[i], sum);
        }
    } else if (ROPE_BITS == 16 && g < kOwnGroup) {
        store_shared4(query_piece(q_smem, row, panel, lane % 8), pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
                      pack_bf16(x[6], x[7]));
    } else {
#pragma unroll
        for (int h = 0; h < 2; ++h)
            store_shared2(query_piece(q_smem, row, panel, first + four / 2 * 2 + h) + four % 2 * 8,
                          pack_half(x[2 * h], x[2 * h + 1]), pack_half(x[2 * h + 4], x[2 * h + 5]));
        if (kBytesAbove || kRopeAbove) sum = ((x[0] + x[1]) + (x[2] + x[3]) + ((x[4] + x[5]) + (x[6] + x[7]))) * kBytesLevel;
    }
    if (kStarts > 0) {
        sum += __shfl_xor_sync(0xffffffff, sum, 1);
        if (lane % 2 == 0) above[(4 * panel + lane % 8 / 2) * kRows + row] = sum;
    }
}

// Loads the segment's query, in float16 (its rotary part in bfloat16 where the keys' is), multiplied by a power of two that leaves no
// value too large; returns that power's inverse. All threads but the producer's call it. `largest`: a number for each warp. `came`:
// the barrier that says that the query has come, or 0.
__device__ __forceinline__ float load_query(const Params& p, u32 q_smem, float* above, int request, u32 (&largest)[kLoaders], u32 came,
                                            u32 warp, u32 lane) {
#pragma unroll 1
    for (u32 row = first_row(warp, lane); row < kRows; row += kPassRows) copy_query_row(p, q_smem, request, row, warp, lane);
    wait_for_copies();
    if (came && lane == 0) barrier_arrive(came);
    u32 pair = 0;
#pragma unroll 1
    for (u32 row = first_row(warp, lane); row < kRows; row += kPassRows)
        for_panels(warp, [&](u32 panel) {                        // what this lane has copied
            const uint4 x = load_shared4(query_piece(q_smem, row, panel, lane % 8));
            pair = larger_magnitudes(larger_magnitudes(larger_magnitudes(larger_magnitudes(pair, x.x), x.y), x.z), x.w);
        });
    const u32 mine = largest_of_warp(pair);
    if (lane == 0) largest[warp] = mine;
    sync_all();
    u32 top = 0;
#pragma unroll
    for (int i = 0; i < kLoaders; ++i) top = max(top, reinterpret_cast<volatile u32&>(largest[i]));
    const u32 exponent = query_exponent(top);
#pragma unroll 1
    for (u32 row = first_row(warp, lane); row < kRows; row += kPassRows)
        for_panels(warp, [&](u32 panel) { order_query(q_smem, above, row, panel, lane, __uint_as_float(exponent << 23)); });
    fence_async_proxy();
    sync_all();
    return __uint_as_float((254 - exponent) << 23);
}
