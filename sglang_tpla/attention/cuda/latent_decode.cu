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
//
// Compiled with -DLATENT -DROPE -DMODE -DSTAGES; wgmma_ss_64 and wgmma_rs come from wgmma.py.

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
    const int* part_begin;     // [parts + 1, 4]: request, tile, segments of that request before this part, 0
    const int* split_start;    // [batch + 1]
    long long q_latent_token_stride, q_latent_head_stride, q_rope_token_stride, q_rope_head_stride;
    long long out_token_stride, out_head_stride, kv_stride;
    int heads, query_len, page_bits;
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

// Walks the (request, tile range) segments of part blockIdx.x; every role walks the same list.
struct Segments {
    int request, last_request, last_tile, first_tile, before;

    __device__ __forceinline__ explicit Segments(const Params& p) {
        const int4 begin = reinterpret_cast<const int4*>(p.part_begin)[blockIdx.x];
        const int4 end = reinterpret_cast<const int4*>(p.part_begin)[blockIdx.x + 1];
        request = begin.x, first_tile = begin.y, before = begin.z, last_request = end.x, last_tile = end.y;
    }
    __device__ __forceinline__ bool more() const {
        return request < last_request || (request == last_request && first_tile < last_tile);
    }
    __device__ __forceinline__ int end_tile(int length) const {
        return request == last_request ? last_tile : (length + kTile - 1) / kTile;
    }
    __device__ __forceinline__ void next() { ++request, first_tile = 0, before = 0; }
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

constexpr int kRowsPerThread = kTile / (kProducerThreads / 8);   // cache rows one producer thread copies per tile

// Slots of the rows this thread copies of one tile; -1 beyond the end of the request.
__device__ __forceinline__ void load_slots(const Params& p, int start, int length, int tile, int thread,
                                           int (&slots)[kRowsPerThread]) {
    const int mask = (1 << p.page_bits) - 1;
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
        const int token = tile * kTile + thread / 8 + i * (kProducerThreads / 8);
        slots[i] = -1;
        if (token < length) slots[i] = (__ldg(p.page_indices + start + (token >> p.page_bits)) << p.page_bits) | (token & mask);
    }
}

__device__ __forceinline__ void load_tile(const Params& p, u32 stage, int thread, const int (&slots)[kRowsPerThread]) {
    const int column = thread % 8;
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
        const int row = thread / 8 + i * (kProducerThreads / 8);
        const bool valid = slots[i] >= 0;
        const u16* source = p.kv + (long long)(valid ? slots[i] : 0) * p.kv_stride + column * 8;
        const u32 target = stage + row * 128 + ((column ^ (row & 7)) << 4);
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel)
            if (panel * 64 + 64 <= kWidth || panel * 64 + column * 8 < kWidth)
                copy16(target + panel * kPanelBytes, source + panel * 64, valid);
    }
}

__device__ __forceinline__ void produce(const Params& p, u32 q_smem, u32 ring, u32 full, u32 empty, u32 q_full,
                                        u32 q_empty, int thread) {
    u32 stage = 0, phase = 0, q_phase = 0;
    for (Segments s(p); s.more(); s.next()) {
        const int length = p.lengths[s.request], start = p.page_starts[s.request];
        const int end = s.end_tile(length);
        if (s.first_tile >= end) continue;
        int slots[kRowsPerThread], next[kRowsPerThread], later[kRowsPerThread];
        load_slots(p, start, length, s.first_tile, thread, slots);
        load_slots(p, start, length, s.first_tile + 1, thread, next);
        barrier_wait(q_empty, q_phase ^ 1);
        q_phase ^= 1;
        load_query(p, q_smem, s.request, thread);
        barrier_arrive_when_copied(q_full);
        for (int tile = s.first_tile; tile < end; ++tile) {
            load_slots(p, start, length, tile + 2, thread, later);
            barrier_wait(empty + 8 * stage, phase ^ 1);
            load_tile(p, ring + stage * kStageBytes, thread, slots);
            barrier_arrive_when_copied(full + 8 * stage);
            if (++stage == STAGES) stage = 0, phase ^= 1;
#pragma unroll
            for (int i = 0; i < kRowsPerThread; ++i) slots[i] = next[i], next[i] = later[i];
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

// MODE_TOKENS: adds the second warpgroup's sums to the first's, through the query's shared memory, half a row at a time.
__device__ __forceinline__ void join(float (&o)[kOut], Softmax& state, float* buffer, int group, int thread) {
    constexpr int kHalf = kOut / 2;
    float* statistics = buffer + kHalf * 128;
    sync_consumers();                                            // all scores done: the query may go
    if (group == 1) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            statistics[i * 128 + thread] = state.highest[i];
            statistics[(2 + i) * 128 + thread] = state.total[i];
        }
    }
    float mine[2], other[2];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
        if (part == 1) sync_consumers();
        if (group == 1) {
#pragma unroll
            for (int i = 0; i < kHalf; ++i) buffer[i * 128 + thread] = o[part * kHalf + i];
        }
        sync_consumers();
        if (group == 0) {
            if (part == 0) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float theirs = statistics[i * 128 + thread], top = fmaxf(state.highest[i], theirs);
                    const bool nothing = top == negative_infinity();
                    mine[i] = nothing ? 0.f : exp2_fast(state.highest[i] - top);
                    other[i] = nothing ? 0.f : exp2_fast(theirs - top);
                    state.highest[i] = top;
                    state.total[i] = state.total[i] * mine[i] + statistics[(2 + i) * 128 + thread] * other[i];
                }
            }
#pragma unroll
            for (int i = 0; i < kHalf; ++i) {
                const int at = part * kHalf + i;
                o[at] = o[at] * mine[(at >> 1) & 1] + buffer[i * 128 + thread] * other[(at >> 1) & 1];
            }
        }
    }
}

// Writes a segment: straight to the output when it is the whole request, else as a partial result with its log-sum-exp.
__device__ __forceinline__ void store(const Params& p, const float (&o)[kOut], const Softmax& state, int request, int split,
                                      bool whole, int first_row, int first_column, int group, int thread) {
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
        for (int i = 0; i < kOut; i += 4) {
            const int column = first_column + i * 2 + (lane % 4) * 2;
            // In MODE_WIDTH the halves may overlap by a panel: the first warpgroup writes it.
            const bool mine = column < LATENT && (MODE != MODE_WIDTH || group == 0 || column >= kOutPanels * 64);
            if (!mine) continue;
            const float x = o[i + 2 * half] * inverse, y = o[i + 2 * half + 1] * inverse;
            if (whole) *reinterpret_cast<u32*>(out + column) = pack_bf16(x, y);
            else *reinterpret_cast<float2*>(partial + column) = make_float2(x, y);
        }
        if (!whole && lane % 4 == 0 && (MODE != MODE_WIDTH || group == 0))
            p.partial_lse[(long long)split * rows + row] =
                state.total[half] > 0.f ? state.highest[half] + log2_fast(state.total[half]) : negative_infinity();
    }
}

__device__ __forceinline__ void consume(const Params& p, u32 q_smem, float* q_buffer, u32 ring, u32 full, u32 empty,
                                        u32 q_full, u32 q_empty, int group, int thread) {
    constexpr int kStep = MODE == MODE_TOKENS ? 2 : 1;
    const int lane = thread % 32;
    const int first_row = MODE == MODE_ROWS ? group * 64 : 0;
    const int first_panel = MODE == MODE_WIDTH && group == 1 ? kValuePanels - kOutPanels : 0;
    const u32 q_rows = q_smem + first_row * 128;
    u32 base = 0, q_phase = 0;                                   // tiles of earlier segments; parity of the query
    for (Segments seg(p); seg.more(); seg.next()) {
        const int length = p.lengths[seg.request], end = seg.end_tile(length), tiles = end - seg.first_tile;
        if (tiles <= 0) continue;
        const int first_split = p.split_start[seg.request];
        const bool whole = p.split_start[seg.request + 1] - first_split == 1;
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
        if (MODE == MODE_TOKENS) join(o, state, q_buffer, group, thread);
        if (lane == 0) barrier_arrive(q_empty);
        if (MODE != MODE_TOKENS || group == 0)
            store(p, o, state, seg.request, first_split + seg.before, whole, first_row, first_panel * 64, group, thread);
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) latent_decode(const __grid_constant__ Params p) {
    extern __shared__ char raw[];
    const u32 q_smem = (shared_address(raw) + 1023) & ~1023u;    // the swizzle repeats every 1,024 bytes
    float* q_buffer = reinterpret_cast<float*>(raw + (q_smem - shared_address(raw)));
    const u32 ring = q_smem + kQBytes, full = ring + STAGES * kStageBytes;
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
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    if (group == 0) {
        // The block starts with 3 x 168 registers a lane; a warpgroup that asks for more than is free waits forever.
        static_assert(56 + 2 * 224 <= 3 * 168, "registers of the three warpgroups");
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        produce(p, q_smem, ring, full, empty, q_full, q_empty, thread);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
        consume(p, q_smem, q_buffer, ring, full, empty, q_full, q_empty, group - 1, thread);
    }
}

// ---- merge --------------------------------------------------------------------------------------------------------

// Adds a request's partial results in the order of its splits. Grid: (query_len * heads, batch), 256 threads.
extern "C" __global__ void __launch_bounds__(256) latent_merge(const __grid_constant__ Params p) {
    constexpr int kLanes = LATENT / 4, kGroups = 256 / kLanes;
    __shared__ float weight[MAX_PARTS];
    __shared__ float4 sums[kGroups * kLanes];
    const int row = blockIdx.x, request = blockIdx.y, rows = gridDim.x, thread = threadIdx.x;
    const int first = p.split_start[request], splits = p.split_start[request + 1] - first;
    if (splits == 1) return;
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (thread < 32) {
        float top = negative_infinity(), total = 0.f;
        for (int i = thread; i < splits; i += 32) {
            weight[i] = p.partial_lse[(long long)(first + i) * rows + row];
            top = fmaxf(top, weight[i]);
        }
#pragma unroll
        for (int offset = 16; offset; offset /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, offset));
        for (int i = thread; i < splits; i += 32) {
            weight[i] = top == negative_infinity() ? 0.f : exp2_fast(weight[i] - top);
            total += weight[i];
        }
#pragma unroll
        for (int offset = 16; offset; offset /= 2) total += __shfl_xor_sync(0xffffffff, total, offset);
        const float inverse = total > 0.f ? 1.f / total : 0.f;
        for (int i = thread; i < splits; i += 32) weight[i] *= inverse;
    }
    __syncthreads();
    const int group = thread / kLanes, lane = thread % kLanes;
    if (group < kGroups) {
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        const float4* partial = reinterpret_cast<const float4*>(p.partial_out + ((long long)first * rows + row) * LATENT) + lane;
#pragma unroll 8
        for (int i = group; i < splits; i += kGroups) {
            const float4 x = __ldcg(partial + (long long)i * rows * kLanes);
            const float factor = weight[i];
            sum.x += factor * x.x, sum.y += factor * x.y, sum.z += factor * x.z, sum.w += factor * x.w;
        }
        sums[group * kLanes + lane] = sum;
    }
    __syncthreads();
    if (group == 0) {
        float4 sum = sums[lane];
#pragma unroll
        for (int i = 1; i < kGroups; ++i) {
            const float4 x = sums[i * kLanes + lane];
            sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
        }
        const int token = row / p.heads, head = row - token * p.heads;
        u16* out = p.out + ((long long)request * p.query_len + token) * p.out_token_stride + head * p.out_head_stride;
        *reinterpret_cast<uint2*>(out + lane * 4) = make_uint2(pack_bf16(sum.x, sum.y), pack_bf16(sum.z, sum.w));
    }
}

// ---- plan ---------------------------------------------------------------------------------------------------------

// Lays parts of at most `capacity` over all requests; returns whether `parts` of them suffice. Twin: plan.py.
__device__ bool lay_parts(const int* lengths, int batch, int parts, int capacity, int* part_begin, int* split_start) {
    int request = 0, tile = 0, before = 0, splits = 0;
    for (int part = 0; part < parts; ++part) {
        if (part_begin) reinterpret_cast<int4*>(part_begin)[part] = make_int4(request, tile, before, 0);
        int left = capacity;
        while (request < batch) {
            const int tiles = (__ldg(lengths + request) + kTile - 1) / kTile, rest = tiles - tile;
            if (tiles == 0 || rest + SEGMENT_COST <= left) {
                if (split_start) split_start[request] = splits;
                if (tiles) splits += before + 1, left -= rest + SEGMENT_COST;
                ++request, tile = 0, before = 0;
            } else {
                const int take = left - SEGMENT_COST;
                if (take > 0) tile += take, ++before;
                break;
            }
        }
    }
    if (part_begin) reinterpret_cast<int4*>(part_begin)[parts] = make_int4(request, tile, before, 0);
    if (split_start) split_start[request] = splits;
    return request == batch;
}

// One warp; lane i tries the i-th larger capacity, the smallest that fits is laid.
extern "C" __global__ void __launch_bounds__(32) latent_plan(const int* lengths, int batch, int parts, int* part_begin,
                                                             int* split_start) {
    const int lane = threadIdx.x;
    int cost = 0;
    for (int i = lane; i < batch; i += 32) {
        const int tiles = (lengths[i] + kTile - 1) / kTile;
        cost += tiles ? tiles + SEGMENT_COST : 0;
    }
#pragma unroll
    for (int offset = 16; offset; offset /= 2) cost += __shfl_xor_sync(0xffffffff, cost, offset);
    const int capacity = (cost + parts - 1) / parts + lane;
    const u32 fits = __ballot_sync(0xffffffff, lay_parts(lengths, batch, parts, capacity, nullptr, nullptr));
    if (lane == __ffs(fits) - 1) lay_parts(lengths, batch, parts, capacity, part_begin, split_start);
}
