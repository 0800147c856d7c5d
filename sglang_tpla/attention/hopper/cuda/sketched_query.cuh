// ---- query --------------------------------------------------------------------------------------------------------
//
// Every warp except the producer's loads its part of a segment's query, [kRows, SKETCH | ROPE | LATENT], and stores it to shared
// memory in the order of the unpacked codes. A warp loads 8 rows of a group of 32 columns at a time, and a lane 8 columns of a
// row. The columns stay in registers until the scale of the whole query is known. Rolled loops that keep the columns in shared
// memory are less code but take 1,500 cycles longer.

constexpr int kLoaders = kAllThreads / 32;
constexpr int kRowBlocks = kRows / 8, kPasses = kRowBlocks > 6 ? 2 : 1, kBlocksAtOnce = kRowBlocks / kPasses;
constexpr int kGroupsAtOnce = kLoaders / kBlocksAtOnce, kLoads = (kGroups + kGroupsAtOnce - 1) / kGroupsAtOnce * kPasses;
static_assert(kLoaders % kBlocksAtOnce == 0, "a warp keeps its rows");

__device__ __forceinline__ void sync_all() { asm volatile("bar.sync 6, %0;" ::"n"(kAllThreads) : "memory"); }

// Returns the address of 16-byte piece `i` of 4 of a row's group `g`: half i % 2 of step 2 g + i / 2.
__device__ __forceinline__ u32 query_piece(u32 q_smem, u32 row, u32 g, u32 i) {
    return q_smem + g / 2 * kQPanelBytes + row * 128 + ((g % 2 * 4 + i ^ row % 8) << 4);
}

// Loads the lane's eight columns of group g of its row.
__device__ __forceinline__ uint4 query_columns(const u16* latent, const u16* rope, bool there, u32 g) {
    const bool own = g >= kOwnGroup, sketch = g < kSketchGroups;
    const int column = (g - (own ? kOwnGroup : sketch ? 0 : kSketchGroups)) * 32 + threadIdx.x % 4 * 8;
    if (!there || g >= kGroups || column >= (own ? LATENT : sketch ? SKETCH : ROPE)) return make_uint4(0, 0, 0, 0);
    const u16* source = (own || sketch ? latent : rope) + (column + (sketch ? LATENT : 0));
    return __ldcg(reinterpret_cast<const uint4*>(source));
}

// Multiplies a lane's columns by `factor`, stores them where wgmma reads them, and adds their share of the numbers that the row's
// sums of scores begin with to `start`. The order is that of the unpacked codes: the first 8 columns of a step are bytes 4 i and
// 4 i + 1 of its 16, the last 8 are bytes 4 i + 2 and 4 i + 3. Of 32 sketch codes, the first step has 8 i, 8 i + 4, 8 i + 1 and
// 8 i + 5, the second step the others.
__device__ __forceinline__ void store_query_columns(u32 q_smem, float (&start)[kStarts + 1], u32 row, u32 g, u32 lane,
                                                    const uint4& columns, float factor) {
    const bool own = g >= kOwnGroup, sketch = g < kSketchGroups;
    const u32 words[4] = {columns.x, columns.y, columns.z, columns.w};
    const u32 four = lane % 4;
    float x[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = __uint_as_float(words[i] << 16) * factor, x[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u) * factor;
    }
    if (sketch) {
        constexpr float kLevels[4] = {level_above<BITS, 0>(), level_above<BITS, 1>(), level_above<BITS, 2>(),
                                      level_above<BITS, 3>()};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            store_shared(query_piece(q_smem, row, g, i) + 4 * four, pack_half(x[i], x[i + 4]));
            start[kSketchStart] = fmaf(x[i] + x[i + 4], kLevels[i], start[kSketchStart]);
        }
    } else if (ROPE_BITS == 16 && !own) {
        store_shared4(query_piece(q_smem, row, g, four), pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
                      pack_bf16(x[6], x[7]));
    } else {
#pragma unroll
        for (int h = 0; h < 2; ++h)
            store_shared2(query_piece(q_smem, row, g, four / 2 * 2 + h) + four % 2 * 8, pack_half(x[2 * h], x[2 * h + 1]),
                          pack_half(x[2 * h + 4], x[2 * h + 5]));
        const float sum = ((x[0] + x[1]) + (x[2] + x[3]) + ((x[4] + x[5]) + (x[6] + x[7]))) * kBytesLevel;
        const bool apart = kApart && 32 * (g - kOwnGroup) + 8 * four >= SHARED;
        if (!own) start[kRopeStart] += kRopeAbove ? sum : 0.f;
        else if (apart) start[kOwnStart] += kBytesAbove ? sum : 0.f;
        else start[kBytesStart] += kBytesAbove ? sum : 0.f;
    }
}

// Loads the segment's query as float16 (the rotary part as bfloat16 if the keys are bfloat16), multiplied by a power of two that
// keeps every value in range. Returns the inverse of the power. All threads except the producer's call this function. `parts`
// receives the numbers that find_starts() adds up, and `largest` one number per warp. `came` is the barrier to arrive at when the
// query is in registers, or 0.
__device__ __forceinline__ float load_query(const Params& p, u32 q_smem, float* parts, int request, u32 (&largest)[kLoaders],
                                            u32 came, u32 warp, u32 lane) {
    __builtin_assume(warp < kLoaders);
    const u32 first_row = warp % kBlocksAtOnce * 8 + lane / 4, first_group = warp / kBlocksAtOnce;
    uint4 columns[kLoads];
    u32 pair = 0;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
        const int at = blockIdx.y * kRows + first_row + pass * kBlocksAtOnce * 8;
        const int token = (at >= p.heads) + (at >= 2 * p.heads) + (at >= 3 * p.heads), head = at - token * p.heads;
        const long long query = (long long)request * p.query_len + token;
        const u16* latent = p.q_latent + query * p.q_latent_token_stride + head * p.q_latent_head_stride;
        const u16* rope = p.q_rope + query * p.q_rope_token_stride + head * p.q_rope_head_stride;
#pragma unroll
        for (int i = pass; i < kLoads; i += kPasses)
            columns[i] = query_columns(latent, rope, at < p.query_len * p.heads, first_group + i / kPasses * kGroupsAtOnce);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        pair = larger_magnitudes(larger_magnitudes(pair, columns[i].x), columns[i].y);
        pair = larger_magnitudes(larger_magnitudes(pair, columns[i].z), columns[i].w);
    }
    const u32 mine = largest_of_warp(pair);
    if (lane == 0) {
        if (came) barrier_arrive(came);
        largest[warp] = mine;
    }
    sync_all();
    u32 top = 0;
#pragma unroll
    for (int i = 0; i < kLoaders; ++i) top = max(top, reinterpret_cast<volatile u32&>(largest[i]));
    const u32 exponent = query_exponent(top);
    const float factor = __uint_as_float(exponent << 23);
    float start[kPasses][kStarts + 1] = {};                      // + 1 because kStarts may be 0
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        const u32 g = first_group + i / kPasses * kGroupsAtOnce, row = first_row + i % kPasses * kBlocksAtOnce * 8;
        if (g < kGroups) store_query_columns(q_smem, start[i % kPasses], row, g, lane, columns[i], factor);
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
        for (int kind = 0; kind < kStarts; ++kind) {
            float sum = start[pass][kind];
            sum += __shfl_xor_sync(0xffffffff, sum, 1);
            sum += __shfl_xor_sync(0xffffffff, sum, 2);
            if (lane % 4 == 0) parts[(kind * kGroupsAtOnce + first_group) * kRows + first_row + pass * kBlocksAtOnce * 8] = sum;
        }
    }
    fence_async_proxy();
    sync_all();
    return __uint_as_float((254 - exponent) << 23);
}
