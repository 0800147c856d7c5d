// Paged latent decode attention for Hopper (sm_90a).
//
// One query row is one (query token, head); a row's key is [latent | rope], its value the latent part:
//     p = softmax(scale * (q_latent . z + q_rope . k_rope)),  out = p z           (TPLA, arXiv 2508.15881, eq. 10)
//
// A block is three warpgroups: warpgroup 0 gathers cache rows with cp.async into a ring of tiles (64 tokens each,
// panels of 64 columns in the 128-byte swizzle that wgmma reads); warpgroups 1 and 2 compute. How those two share
// the work is the compile-time MODE:
//     MODE_TOKENS  up to 64 rows: they take alternate tiles and add up through shared memory at the end;
//     MODE_ROWS    up to 128 rows: each has 64 rows of every tile;
//     MODE_WIDTH   latent wider than 256: each has half of the value columns and computes all scores.
// The grid is persistent: block x runs part x of the plan (see plan.py), so its size never depends on the lengths.
// A request that lies in several parts is merged at the end by the blocks that hold it: each waits until all have
// stored their partial results, then adds up its share of the rows, in the order of the splits. All blocks must be
// resident at once for that, so the grid never has more blocks than the GPU has multiprocessors.
//
// Compiled with -DLATENT -DROPE -DMODE -DSTAGES (hopper_decode.py); wgmma_ss_64 and wgmma_rs come from wgmma.py.

constexpr int kTile = 64;                                   // tokens a tile
constexpr int kWidth = LATENT + ROPE;                       // columns of a cache row
constexpr int kPanels = (kWidth + 63) / 64;
constexpr int kValuePanels = (LATENT + 63) / 64;
constexpr int kRows = MODE == MODE_ROWS ? 128 : 64;         // query rows a block
constexpr int kOutPanels = MODE == MODE_WIDTH ? (kValuePanels + 1) / 2 : kValuePanels;
constexpr int kOut = kOutPanels * 32;                       // fp32 accumulators a thread
constexpr int kPanelBytes = kTile * 128;
constexpr int kQPanelBytes = kRows * 128;
constexpr int kStageBytes = kPanels * kPanelBytes;
constexpr int kQBytes = kPanels * kQPanelBytes;
constexpr int kSteps = kWidth / 16;                         // wgmma steps of the scores
constexpr int kProducerThreads = 128;
constexpr int kChunkTiles = 8;                              // tiles whose slots are looked up together
constexpr int kSlotBytes = 2 * kChunkTiles * kTile * 4;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kWidth % 32 == 0 && LATENT % 32 == 0, "widths are multiples of 32");
static_assert(kOutPanels == OUT_COLUMNS / 64, "wgmma_rs was generated for another width");

struct Params {
    const u16* q_latent;       // [batch * query_len, heads, LATENT]
    const u16* q_rope;         // [batch * query_len, heads, ROPE]
    const u16* kv;             // [slots, LATENT + ROPE]
    u16* out;                  // [batch * query_len, heads, LATENT]
    float* partial_out;        // [splits, query_len * heads, LATENT]
    float* partial_lse;        // [splits, query_len * heads], base 2
    const int* lengths;        // [batch]
    const int* page_indices;
    const int* page_starts;    // [batch]
    const int* part_begin;     // [parts + 1, 8]: request, tile, segments of that request before this part; its length, its
                               // entry of page_starts (spares a round trip to memory at the start); 3 unused
    const int* split_start;    // [batch + 1]
    u32* arrived;              // [row blocks, batch]: partial results stored since the plan was made
    long long q_latent_token_stride, q_latent_head_stride, q_rope_token_stride, q_rope_head_stride;
    long long out_token_stride, out_head_stride, kv_stride;
    int heads, query_len, page_bits, batch;
    float scale_log2;
};

// ---- small PTX wrappers ------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

__device__ __forceinline__ void barrier_init(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\nbra again;\nover:\n}" ::"r"(barrier), "r"(parity) : "memory");
}
// Arrives on `barrier` once all earlier cp.async of this thread have landed.
__device__ __forceinline__ void barrier_arrive_when_copied(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// 16 bytes from global to shared memory; zeros when `valid` is false (nothing is read then).
__device__ __forceinline__ void copy16(u32 target, const void* source, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                 "r"(valid ? 16 : 0) : "memory");
}
// cp.async writes through the generic proxy, wgmma reads through the async proxy.
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving reads of accumulators across wgmma_wait.
template <int kCount> __device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
__device__ __forceinline__ void sync_consumers() { asm volatile("bar.sync 1, 256;" ::: "memory"); }
__device__ __forceinline__ void sync_producers() { asm volatile("bar.sync 2, 128;" ::: "memory"); }

// wgmma descriptor of a swizzled panel: 8-row groups are 1,024 bytes apart (stride offset); for the transposed
// operand, `leading_bytes` is the distance of the next 64 columns.
__device__ __forceinline__ u64 descriptor(u32 address, u32 leading_bytes) {
    return (u64)((address & 0x3FFFF) >> 4) | ((u64)(leading_bytes >> 4) << 16) | ((u64)(1024 >> 4) << 32) | (1ull << 62);
}
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

// ---- the part of a block ------------------------------------------------------------------------------------------

__device__ __forceinline__ int4 part_row(const Params& p, int part) {
    return reinterpret_cast<const int4*>(p.part_begin)[2 * part];
}

// Walks the (request, tile range) segments of part blockIdx.x; every role walks the same list.
struct Segments {
    const Params& p;
    int request, last_request, last_tile, first_tile, before, length, start;

    __device__ __forceinline__ explicit Segments(const Params& params) : p(params) {
        const int4 begin = part_row(p, blockIdx.x), end = part_row(p, blockIdx.x + 1);
        request = begin.x, first_tile = begin.y, before = begin.z, last_request = end.x, last_tile = end.y, length = begin.w;
        start = p.part_begin[8 * blockIdx.x + 4];
    }
    __device__ __forceinline__ bool more() const {
        return request < last_request || (request == last_request && first_tile < last_tile);
    }
    __device__ __forceinline__ int end_tile() const {
        return request == last_request ? last_tile : (length + kTile - 1) / kTile;
    }
    __device__ __forceinline__ void next() {
        ++request, first_tile = 0, before = 0;
        if (more()) length = p.lengths[request], start = p.page_starts[request];
    }
};

// ---- producer -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void load_query(const Params& p, u32 q_smem, int request, int thread) {
    const int rows = p.query_len * p.heads, column = thread % 8;
#pragma unroll 1
    for (int row = thread / 8; row < kRows; row += kProducerThreads / 8) {
        const int global_row = blockIdx.y * kRows + row;
        const bool valid = global_row < rows;
        const int token = valid ? global_row / p.heads : 0, head = valid ? global_row - token * p.heads : 0;
        const long long query = (long long)request * p.query_len + token;
        const u16* latent = p.q_latent + query * p.q_latent_token_stride + head * p.q_latent_head_stride;
        const u16* rope = p.q_rope + query * p.q_rope_token_stride + head * p.q_rope_head_stride;
        const u32 target = q_smem + row * 128 + ((column ^ (row & 7)) << 4);
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
            const int first = panel * 64 + column * 8;
            if (first < kWidth)
                copy16(target + panel * kQPanelBytes, first < LATENT ? latent + first : rope + (first - LATENT), valid);
        }
    }
}

constexpr int kRowsPerThread = kTile / (kProducerThreads / 8);             // cache rows a thread copies of a tile
constexpr int kSlotsPerThread = kChunkTiles * kTile / kProducerThreads;    // slots a thread looks up of a chunk

// Slots of a chunk's tokens, one thread every 128th; -1 beyond the end of the request.
__device__ __forceinline__ void load_slots(const Params& p, int start, int length, int tile, int thread,
                                           int (&slots)[kSlotsPerThread]) {
    const int mask = (1 << p.page_bits) - 1;
#pragma unroll
    for (int i = 0; i < kSlotsPerThread; ++i) {
        const int token = tile * kTile + thread + i * kProducerThreads;
        slots[i] = -1;
        if (token < length) slots[i] = (__ldg(p.page_indices + start + (token >> p.page_bits)) << p.page_bits) | (token & mask);
    }
}

__device__ __forceinline__ void load_tile(const Params& p, u32 stage, int thread, const int* slots) {
    const int column = thread % 8;
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
        const int row = thread / 8 + i * (kProducerThreads / 8), slot = slots[row];
        const bool valid = slot >= 0;
        const u16* source = p.kv + (long long)(valid ? slot : 0) * p.kv_stride + column * 8;
        const u32 target = stage + row * 128 + ((column ^ (row & 7)) << 4);
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel)
            if (panel * 64 + 64 <= kWidth || panel * 64 + column * 8 < kWidth)
                copy16(target + panel * kPanelBytes, source + panel * 64, valid);
    }
}

__device__ __forceinline__ void produce(const Params& p, u32 q_smem, int* slot_buffer, u32 ring, u32 full, u32 empty,
                                        u32 q_full, u32 q_empty, int thread) {
    u32 stage = 0, phase = 0, q_phase = 0, chunk = 0;
    for (Segments s(p); s.more(); s.next()) {
        const int length = s.length, start = s.start, end = s.end_tile();
        if (s.first_tile >= end) continue;
        int ahead[kSlotsPerThread];                              // slots of the next chunk, on their way
        load_slots(p, start, length, s.first_tile, thread, ahead);
        barrier_wait(q_empty, q_phase ^ 1);
        q_phase ^= 1;
        load_query(p, q_smem, s.request, thread);
        barrier_arrive_when_copied(q_full);
        for (int first = s.first_tile; first < end; first += kChunkTiles, chunk ^= 1) {
            int* slots = slot_buffer + chunk * (kChunkTiles * kTile);
#pragma unroll
            for (int i = 0; i < kSlotsPerThread; ++i) slots[thread + i * kProducerThreads] = ahead[i];
            sync_producers();
            load_slots(p, start, length, first + kChunkTiles, thread, ahead);
            for (int tile = first; tile < min(first + kChunkTiles, end); ++tile) {
                barrier_wait(empty + 8 * stage, phase ^ 1);
                load_tile(p, ring + stage * kStageBytes, thread, slots + (tile - first) * kTile);
                barrier_arrive_when_copied(full + 8 * stage);
                if (++stage == STAGES) stage = 0, phase ^= 1;
            }
        }
    }
}

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

// ---- merge --------------------------------------------------------------------------------------------------------

// The request whose merge this block has a share in: at most one, that of the part's last segment.
struct Shared {
    int request, share, shares;
    u32 target;                // value of `arrived` when all partial results are stored
};

// Tells that this block's partial result of `request` is stored. Called by all consumers.
__device__ __forceinline__ u32 announce(const Params& p, int request, int splits, int consumer) {
    __threadfence();
    sync_consumers();
    if (consumer != 0) return 0;
    const u32 before = atomicAdd(p.arrived + blockIdx.y * p.batch + request, 1u);
    return (before / splits + 1) * splits;                       // the counter runs on over the layers of a step
}

// A sum over splits on its way: values scaled to 2^-top, and the sum of weights.
struct Sum {
    float4 value;
    float top, total;

    __device__ __forceinline__ void rescale_to(float new_top) {
        const float factor = top == negative_infinity() ? 0.f : exp2_fast(top - new_top);
        value.x *= factor, value.y *= factor, value.z *= factor, value.w *= factor;
        total *= factor, top = new_top;
    }
    __device__ __forceinline__ void add(const float4& x, float x_top, float weight) {   // top >= x_top
        const float factor = x_top == negative_infinity() ? 0.f : exp2_fast(x_top - top);
        value.x += factor * x.x, value.y += factor * x.y, value.z += factor * x.z, value.w += factor * x.w;
        total += factor * weight;
    }
};

// Adds up items [begin, end), four columns of a row each, in the order of the splits. With `together` (many splits, few
// items) eight warps share an item's splits. Per step a thread has kItems * kBatch loads in flight.
template <int kItems, int kBatch>
__device__ __forceinline__ void merge_items(const Params& p, int request, int first, int splits, int begin, int end,
                                            bool together, Sum* sums, int consumer) {
    constexpr int kItemsPerRow = LATENT / 4;
    const int rows = p.query_len * p.heads, first_row = blockIdx.y * kRows, warp = consumer / 32, lane = consumer % 32;
    const int step = together ? 8 : 1, offset = together ? warp : 0, stride = together ? 32 : 256;
    for (int base = begin + (together ? lane : consumer); base - (together ? lane : consumer) < end; base += stride * kItems) {
        Sum sum[kItems];
#pragma unroll
        for (int q = 0; q < kItems; ++q) sum[q] = {make_float4(0.f, 0.f, 0.f, 0.f), negative_infinity(), 0.f};
        for (int i = offset; i < splits; i += step * kBatch) {
            float4 x[kItems][kBatch];
            float lse[kItems][kBatch];
#pragma unroll
            for (int q = 0; q < kItems; ++q) {
                const int item = base + q * stride, row = first_row + item / kItemsPerRow, column = item % kItemsPerRow * 4;
#pragma unroll
                for (int j = 0; j < kBatch; ++j) {
                    const long long at = (long long)(first + i + j * step) * rows + row;
                    x[q][j] = make_float4(0.f, 0.f, 0.f, 0.f), lse[q][j] = negative_infinity();
                    if (item < end && i + j * step < splits) {
                        lse[q][j] = __ldcg(p.partial_lse + at);
                        x[q][j] = __ldcg(reinterpret_cast<const float4*>(p.partial_out + at * LATENT + column));
                    }
                }
            }
#pragma unroll
            for (int q = 0; q < kItems; ++q) {
                float top = sum[q].top;
#pragma unroll
                for (int j = 0; j < kBatch; ++j) top = fmaxf(top, lse[q][j]);
                sum[q].rescale_to(top);
#pragma unroll
                for (int j = 0; j < kBatch; ++j) sum[q].add(x[q][j], lse[q][j], 1.f);
            }
        }
        if (together) {
            sums[consumer] = sum[0];
            sync_consumers();
            if (warp == 0) {
#pragma unroll
                for (int i = 1; i < 8; ++i) {
                    const Sum other = sums[i * 32 + lane];
                    sum[0].rescale_to(fmaxf(sum[0].top, other.top));
                    sum[0].add(other.value, other.top, other.total);
                }
            }
            sync_consumers();
        }
#pragma unroll
        for (int q = 0; q < kItems; ++q) {
            const int item = base + q * stride, row = first_row + item / kItemsPerRow, column = item % kItemsPerRow * 4;
            if (item >= end || (together && warp > 0)) continue;
            const int token = row / p.heads, head = row - token * p.heads;
            const float inverse = sum[q].total > 0.f ? 1.f / sum[q].total : 0.f;
            const float4 v = sum[q].value;
            u16* out = p.out + ((long long)request * p.query_len + token) * p.out_token_stride + head * p.out_head_stride;
            *reinterpret_cast<uint2*>(out + column) =
                make_uint2(pack_bf16(v.x * inverse, v.y * inverse), pack_bf16(v.z * inverse, v.w * inverse));
        }
    }
}

// Waits until all partial results of the request are stored, and adds up this block's share of its rows.
__device__ __forceinline__ void merge(const Params& p, const Shared shared, float* buffer, int consumer) {
    const int first = p.split_start[shared.request], splits = p.split_start[shared.request + 1] - first;
    const int items = min(kRows, p.query_len * p.heads - (int)blockIdx.y * kRows) * (LATENT / 4);
    const int begin = items * shared.share / shared.shares, end = items * (shared.share + 1) / shared.shares;
    if (consumer % 32 == 0) {
        const u32* arrived = p.arrived + blockIdx.y * p.batch + shared.request;
        u32 now;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrived) : "memory");
        } while ((int)(now - shared.target) < 0);
    }
    __syncwarp();
    Sum* sums = reinterpret_cast<Sum*>(buffer);
    if (splits <= 4) merge_items<4, 4>(p, shared.request, first, splits, begin, end, false, sums, consumer);
    else if (splits <= 8) merge_items<2, 8>(p, shared.request, first, splits, begin, end, false, sums, consumer);
    else merge_items<1, 12>(p, shared.request, first, splits, begin, end, splits > 32, sums, consumer);
}

// An empty request's output.
__device__ __forceinline__ void store_zeros(const Params& p, int request, int consumer) {
    const int rows = p.query_len * p.heads;
    for (int i = consumer; i < kRows * (LATENT / 8); i += 256) {
        const int row = blockIdx.y * kRows + i / (LATENT / 8), token = row / p.heads, head = row - token * p.heads;
        u16* out = p.out + ((long long)request * p.query_len + token) * p.out_token_stride + head * p.out_head_stride;
        if (row < rows) *reinterpret_cast<uint4*>(out + (i % (LATENT / 8)) * 8) = make_uint4(0, 0, 0, 0);
    }
}

__device__ __forceinline__ void consume(const Params& p, u32 q_smem, float* q_buffer, u32 ring, u32 full, u32 empty,
                                        u32 q_full, u32 q_empty, int group, int thread) {
    [[maybe_unused]] constexpr int kStep = MODE == MODE_TOKENS ? 2 : 1;
    const int lane = thread % 32;
    const int first_row = MODE == MODE_ROWS ? group * 64 : 0;
    const int first_panel = MODE == MODE_WIDTH && group == 1 ? kValuePanels - kOutPanels : 0;
    const u32 q_rows = q_smem + first_row * 128;
    const int consumer = group * 128 + thread;
    u32 base = 0, q_phase = 0;                                   // tiles of earlier segments; parity of the query
    __shared__ Shared shared;
    if (consumer == 0) shared.request = -1;
    for (Segments seg(p); seg.more(); seg.next()) {
        const int length = seg.length, tiles = seg.end_tile() - seg.first_tile;
        if (tiles <= 0) {
            if (length <= 0) store_zeros(p, seg.request, consumer);
            continue;
        }
        const int first_split = p.split_start[seg.request];
        const int splits = p.split_start[seg.request + 1] - first_split;
        const bool whole = splits == 1;
        int limit[2];                                            // tokens that each of the two rows may see
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = blockIdx.y * kRows + first_row + (thread / 32) * 16 + lane / 4 + half * 8;
            limit[half] = length - p.query_len + 1 + min(row / p.heads, p.query_len - 1);
        }
        const int unmasked = length - p.query_len + 1;           // tokens that every row may see
        float o[kOut], s[32], factor[2];
        u32 probability[16];
        Softmax state = {{negative_infinity(), negative_infinity()}, {0.f, 0.f}};
#pragma unroll
        for (int i = 0; i < kOut; ++i) o[i] = 0.f;
        barrier_wait(q_full, q_phase);
        q_phase ^= 1;
        fence_async_proxy();
#if PIPELINED
        // The next tile's scores are computed while this tile's softmax waits for its values: one more stage is held.
        u32 held = base % STAGES;
        barrier_wait(full + 8 * held, (base / STAGES) & 1);
        fence_async_proxy();
        scores(s, q_rows, ring + held * kStageBytes);
        wgmma_wait<0>();
        pin(s);
        soften(s, state, factor, p.scale_log2, seg.first_tile * kTile, limit, (seg.first_tile + 1) * kTile > unmasked, lane);
        pack_probability(probability, s);
        for (int j = 1; j < tiles; ++j) {
            const u32 at = base + j, stage = at % STAGES;
            barrier_wait(full + 8 * stage, (at / STAGES) & 1);
            fence_async_proxy();
            scores(s, q_rows, ring + stage * kStageBytes);
            pin(o);
            add_values(o, probability, ring + held * kStageBytes + first_panel * kPanelBytes);
            wgmma_wait<1>();
            pin(s);
            const int first_token = (seg.first_tile + j) * kTile;
            soften(s, state, factor, p.scale_log2, first_token, limit, first_token + kTile > unmasked, lane);
            wgmma_wait<0>();
            pin(o);
            if (lane == 0) barrier_arrive(empty + 8 * held);
            rescale(o, factor);
            pack_probability(probability, s);
            held = stage;
        }
        pin(o);
        add_values(o, probability, ring + held * kStageBytes + first_panel * kPanelBytes);
        wgmma_wait<0>();
        pin(o);
        if (lane == 0) barrier_arrive(empty + 8 * held);
#else
        for (int j = MODE == MODE_TOKENS ? group : 0; j < tiles; j += kStep) {
            const u32 at = base + j, stage = at % STAGES;
            barrier_wait(full + 8 * stage, (at / STAGES) & 1);
            fence_async_proxy();
            scores(s, q_rows, ring + stage * kStageBytes);
            wgmma_wait<0>();
            pin(s);
            const int first_token = (seg.first_tile + j) * kTile;
            soften(s, state, factor, p.scale_log2, first_token, limit, first_token + kTile > unmasked, lane);
            rescale(o, factor);
            pack_probability(probability, s);
            pin(o);
            add_values(o, probability, ring + stage * kStageBytes + first_panel * kPanelBytes);
            wgmma_wait<0>();
            pin(o);
            if (lane == 0) barrier_arrive(empty + 8 * stage);
        }
#endif
        base += tiles;
        // From here maxima are in base-2 units, as the log-sum-exp is.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            state.highest[half] *= p.scale_log2;
            state.total[half] += __shfl_xor_sync(0xffffffff, state.total[half], 1);
            state.total[half] += __shfl_xor_sync(0xffffffff, state.total[half], 2);
        }
        const int split = first_split + seg.before;
        if (MODE != MODE_TOKENS) {
            if (lane == 0) barrier_arrive(q_empty);
            store<0, kOut>(p, o, state, seg.request, split, whole, first_row, first_panel * 64, MODE == MODE_ROWS || group == 0, thread);
        } else if (group == 0) {
            join<0>(o, state, q_buffer, thread);
            if (lane == 0) barrier_arrive(q_empty);
            store<0, kOut / 2>(p, o, state, seg.request, split, whole, 0, 0, true, thread);
        } else {
            join<1>(o, state, q_buffer, thread);
            if (lane == 0) barrier_arrive(q_empty);
            store<kOut / 2, kOut / 2>(p, o, state, seg.request, split, whole, 0, 0, false, thread);
        }
        if (!whole) {
            const u32 target = announce(p, seg.request, splits, consumer);
            // The last of a request's parts, when it goes on to another request, leaves the merge to the others.
            const int4 last = part_row(p, blockIdx.x - seg.before + splits);
            const bool goes_on = last.x > seg.request + 1 || last.y > 0;
            if (consumer == 0 && !(goes_on && seg.before == splits - 1))
                shared = {seg.request, seg.before, splits - (goes_on ? 1 : 0), target};
        }
    }
    sync_consumers();                                            // the query's memory is free, `shared` is written
    if (shared.request >= 0) merge(p, shared, q_buffer, consumer);
}

extern "C" __global__ void __launch_bounds__(384, 1) latent_decode(const __grid_constant__ Params p) {
    extern __shared__ char raw[];
    const u32 q_smem = (shared_address(raw) + 1023) & ~1023u;    // the swizzle repeats every 1,024 bytes
    float* q_buffer = reinterpret_cast<float*>(raw + (q_smem - shared_address(raw)));
    const u32 ring = q_smem + kQBytes, full = ring + STAGES * kStageBytes + kSlotBytes;
    int* slot_buffer = reinterpret_cast<int*>(raw + (full - kSlotBytes - shared_address(raw)));
    const u32 empty = full + 8 * STAGES, q_full = empty + 8 * STAGES, q_empty = q_full + 8;
    const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(full + 8 * i, kProducerThreads);
            barrier_init(empty + 8 * i, MODE == MODE_TOKENS ? 4 : 8);
        }
        barrier_init(q_full, kProducerThreads);
        barrier_init(q_empty, 8);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    // The next kernel of the stream may start to set up; this one reads nothing before its predecessor has ended.
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    if (group == 0) {
        // The block starts with 3 x 168 registers a lane; a warpgroup that asks for more than is free waits forever.
        static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168, "registers of the three warpgroups");
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
        produce(p, q_smem, slot_buffer, ring, full, empty, q_full, q_empty, thread);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
        consume(p, q_smem, q_buffer, ring, full, empty, q_full, q_empty, group - 1, thread);
    }
}

// ---- plan ---------------------------------------------------------------------------------------------------------

struct PlanBuffers {
    const int *lengths, *page_starts;
    int *part_begin, *split_start;
    int batch, parts;

    __device__ __forceinline__ int tiles(int request) const { return (lengths[request] + kTile - 1) / kTile; }
    __device__ __forceinline__ void store_part(int part, int request, int tile, int before) const {
        const bool real = request < batch;
        int4* row = reinterpret_cast<int4*>(part_begin) + 2 * part;
        row[0] = make_int4(request, tile, before, real ? lengths[request] : 0);
        row[1] = make_int4(real ? page_starts[request] : 0, 0, 0, 0);
    }
};

// Lays the requests into parts of `capacity`, see plan.py, its twin. With `keep` stores the plan (the lanes of the warp share
// the work then); returns whether `parts` of them suffice.
__device__ __forceinline__ bool lay_parts(const PlanBuffers& plan, int capacity, bool keep, int lane) {
    const int most = capacity - SEGMENT_COST;                    // tiles of a part that holds one segment
    int part = 0, left = capacity, splits = 0;
    if (most <= 0) return plan.batch == 0;
    if (keep && lane == 0) plan.store_part(0, 0, 0, 0);
    for (int request = 0; request < plan.batch; ++request) {
        const int tiles = plan.tiles(request);
        if (keep && lane == 0) plan.split_start[request] = splits;
        if (tiles <= 0) continue;
        if (tiles + SEGMENT_COST <= left) {
            left -= tiles + SEGMENT_COST, ++splits;
            continue;
        }
        const int first = max(left - SEGMENT_COST, 0), before = first > 0 ? 1 : 0;
        const int more = (tiles - first - 1) / most;             // parts that this request fills
        if (keep)
            for (int i = lane; i <= more; i += 32) plan.store_part(part + 1 + i, request, first + i * most, before + i);
        part += 1 + more, splits += before + more + 1;
        left = most - (tiles - first - more * most);
        if (part >= plan.parts) return false;
    }
    if (keep) {
        for (int i = part + 1 + lane; i <= plan.parts; i += 32) plan.store_part(i, plan.batch, 0, 0);
        if (lane == 0) plan.split_start[plan.batch] = splits;
    }
    return true;
}

// Parts that do not cross requests: each request gets as many parts as `most` tiles a part ask for. Returns how many that are;
// with `keep` stores the plan. Twin: plan.py.
__device__ __forceinline__ int lay_whole(const PlanBuffers& plan, int most, bool keep, int lane) {
    int used = 0;
    for (int base = 0; base < plan.batch; base += 32) {
        const int request = base + lane, tiles = request < plan.batch ? plan.tiles(request) : 0;
        const int count = tiles > 0 ? (tiles + most - 1) / most : 0;
        int until = count;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            const int other = __shfl_up_sync(0xffffffff, until, offset);
            if (lane >= offset) until += other;
        }
        const int first = used + until - count;
        if (keep && request < plan.batch) {
            plan.split_start[request] = first;
            for (int i = 0; i < count; ++i) plan.store_part(first + i, request, (int)((long long)tiles * i / count), i);
        }
        used += __shfl_sync(0xffffffff, until, 31);
    }
    if (keep) {
        for (int i = used + lane; i <= plan.parts; i += 32) plan.store_part(i, plan.batch, 0, 0);
        __syncwarp();
        if (lane == 0) plan.split_start[plan.batch] = used, plan.store_part(0, 0, 0, 0);   // it walks over leading empty requests
    }
    return used;
}

// One warp. Parts that do not cross requests, if they are nearly as equal; else lane i tries the i-th larger capacity, and
// the smallest that fits is laid. Also sets `arrived` to zero.
extern "C" __global__ void __launch_bounds__(32) latent_plan(const int* lengths, const int* page_starts, int batch, int parts,
                                                             int* part_begin, int* split_start, u32* arrived, int counters) {
    __shared__ int copy[PLAN_BATCH];
    PlanBuffers plan = {lengths, page_starts, part_begin, split_start, batch, parts};
    const int lane = threadIdx.x;
    int cost = 0;
    for (int i = lane; i < counters; i += 32) arrived[i] = 0;
    for (int i = lane; i < batch; i += 32) {
        const int tiles = plan.tiles(i);
        cost += tiles > 0 ? tiles + SEGMENT_COST : 0;
        if (i < PLAN_BATCH) copy[i] = lengths[i];
    }
    __syncwarp();
    if (batch <= PLAN_BATCH) plan.lengths = copy;
#pragma unroll
    for (int offset = 16; offset; offset /= 2) cost += __shfl_xor_sync(0xffffffff, cost, offset);
    const int capacity = (cost + parts - 1) / parts;
    for (int most = max(capacity - SEGMENT_COST, 1); most <= capacity + SEGMENT_COST; ++most)
        if (lay_whole(plan, most, false, lane) <= parts) {
            lay_whole(plan, most, true, lane);
            return;
        }
    const u32 fits = __ballot_sync(0xffffffff, lay_parts(plan, capacity + lane, false, lane));
    lay_parts(plan, capacity + __ffs(fits) - 1, true, lane);
}
