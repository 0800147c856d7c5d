// ---- producer -----------------------------------------------------------------------------------------------------
//
// gather.cuh says when the producer may read which rows.

// The page of a token; behind the last one page 0, whose row is read and masked.
__device__ __forceinline__ int page_of(const Params& p, int start, int length, int token) {
    return token < length ? __ldcg(p.page_indices + start + (token >> p.page_bits)) : 0;
}

// a b + c. In assembly, because the compiler works out a row's address twice otherwise.
__device__ __forceinline__ u64 multiply_add_wide(u32 a, u32 b, u64 c) {
    u64 d;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(d) : "r"(a), "r"(b), "l"(c));
    return d;
}

// A warp copies 16 rows of a half tile; eight lanes copy a row, each time the 16-byte pieces of one line of 128 bytes: rows
// begin anywhere in a line, and a request that crosses lines counts twice. No prefetch into the L2: what lies beside a row is
// another token. Lane `first + row` knows the slot of a row.
constexpr int kFullArrivals = 64;
__device__ __forceinline__ void load_rows(const Params& p, u32 stage, u32 full, int slots, int first, int lane, u64 policy) {
    const int piece = lane % 8 * 16;                             // of a line
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = i * 4 + lane / 8, slot = __shfl_sync(0xffffffff, slots, first + row);
        const u64 begin = multiply_add_wide(slot, (u32)p.kv_stride, (u64)p.kv), source = (begin & ~127ull) | (u32)piece;
        const int at = piece - (int)((u32)begin & 127);          // from the row's beginning
        const u32 target = stage + row * kStride + at;
#pragma unroll
        for (int line = 0; line < ROW_BYTES + 112; line += 128) {
            const bool here = (line > 0 || at >= 0) && (line + 112 < ROW_BYTES || at < ROW_BYTES - line);
            asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n"
                         "@p cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %3;\n}"
                         ::"r"(target + line), "l"(source + line), "r"((u32)here), "l"(policy) : "memory");
        }
    }
    barrier_arrive_when_copied(full);
}

// Each warp fills every second half tile: warps 0 and 1 the first halves. Pages are looked up two tiles ahead, and waited for where
// they are used. Beyond kEarly half tiles the first query comes first, which would wait for whatever the memory has to do before.
//
// A warp waits for room for its own half tiles alone. With an odd number of stages a stage changes hands from round to round. Then
// the warps meet every two tiles: a warp a round ahead of the others could take a barrier two phases behind for one that has done
// what it waits for. Waiting for room for the others' halves would keep them together, too, but could hang: where the others fill
// a half and see it given back before this warp looks, this warp finds the parity that it waits to see change.
constexpr int kEarly = 1;
__device__ __forceinline__ void produce(const Params& p, u32 ring, u32 full, u32 empty, u32 query, int thread) {
    const int warp = thread / 32, lane = thread % 32, my_token = lane / 16 * kTile + warp * 16 + lane % 16;
    const int page_mask = (1 << p.page_bits) - 1;
    const u32 rows = ring + warp % 2 * 16 * kStride;
    const u64 policy = read_once();
    u32 stage = warp / 2, phase = 0, filled = 0;
    for (Segments s(p); s.more(); s.next()) {
        const int length = s.length, start = s.start, end = s.end_tile();
        if (s.first_tile >= end) continue;
        int ahead = page_of(p, start, length, s.first_tile * kTile + my_token);
#pragma unroll 1
        for (int tile = s.first_tile; tile < end; tile += 2) {
            const int slots = ahead << p.page_bits | ((tile * kTile + my_token) & page_mask);
            ahead = page_of(p, start, length, (tile + 2) * kTile + my_token);
            if (STAGES % 2) sync_producers();
#pragma unroll 1
            for (int k = 0; k < 2; ++k) {
                if (tile + k >= end) break;
                barrier_wait(empty + 8 * stage, phase ^ 1);
                if (filled++ == kEarly) barrier_wait(query, 0);
                if ((tile + k + 1) * kTile > length - p.query_len) wait_for_predecessor();
                load_rows(p, rows + stage * kStageBytes, full + 8 * stage, slots, 16 * k, lane, policy);
                stage += 2;
                if (stage >= STAGES) stage -= STAGES, phase ^= 1;
            }
        }
    }
}

// ---- query --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 query_address(u32 q_smem, int row, int step, int half) {
    return q_smem + step / 4 * kQPanelBytes + row * 128 + ((((step % 4) * 2 + half) ^ (row & 7)) << 4);
}

__device__ __forceinline__ void sync_all() { asm volatile("bar.sync 6, %0;" ::"n"(kAllThreads) : "memory"); }

// Where piece i (16 bytes, 8 columns) of group g of query row `row` stands: at first as it came, in the end as half i % 2 of step
// 2 g + i / 2.
__device__ __forceinline__ u32 query_piece(u32 q_smem, int row, int g, int i) { return query_address(q_smem, row, 2 * g + i / 2, i % 2); }

// Begins to copy it there; zeros where there is no such row or column.
__device__ __forceinline__ void copy_query_piece(const Params& p, u32 q_smem, int request, int row, int g, int i) {
    const int at = blockIdx.y * kRows + row;
    const int token = (at >= p.heads) + (at >= 2 * p.heads) + (at >= 3 * p.heads), head = at - token * p.heads;
    const bool own = g >= kOwnGroup, sketch = g < kSketchGroups;
    const int column = (own ? g - kOwnGroup : sketch ? g : g - kSketchGroups) * 32 + i * 8;
    const bool there = at < p.query_len * p.heads && column < (own ? LATENT : sketch ? SKETCH : ROPE);
    const long long query = (long long)request * p.query_len + token;
    const u16* source = own || sketch
        ? p.q_latent + query * p.q_latent_token_stride + head * p.q_latent_head_stride + (sketch ? LATENT : 0)
        : p.q_rope + query * p.q_rope_token_stride + head * p.q_rope_head_stride;
    copy16(query_piece(q_smem, row, g, i), there ? source + column : p.q_latent, there);
}

// Multiplies group g of a row by `factor` and puts it into order. Which columns wgmma multiplies with each other follows from how
// ldmatrix hands out codes, see unpack_group(): of the 16 columns of a step, bytes 4 i and 4 i + 1 come before 4 i + 2 and 4 i + 3;
// of 32 sketch codes, the first step has 8 i, 8 i + 4, 8 i + 1 and 8 i + 5, the second the others.
__device__ __forceinline__ void order_query_group(u32 q_smem, int row, int g, float factor) {
    const bool own = g >= kOwnGroup, sketch = g < kSketchGroups, bf16 = ROPE_BITS == 16 && !own && !sketch;
    u32 w[16];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint4 x = load_shared4(query_piece(q_smem, row, g, i));
        w[4 * i] = x.x, w[4 * i + 1] = x.y, w[4 * i + 2] = x.z, w[4 * i + 3] = x.w;
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const float low = __uint_as_float(w[i] << 16) * factor, high = __uint_as_float(w[i] & 0xFFFF0000u) * factor;
        w[i] = bf16 ? pack_bf16(low, high) : pack_half(low, high);
    }
    if (sketch) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const uint4 eight = in_order_of_levels(make_uint4(w[4 * k], w[4 * k + 1], w[4 * k + 2], w[4 * k + 3]));
            w[4 * k] = eight.x, w[4 * k + 1] = eight.y, w[4 * k + 2] = eight.z, w[4 * k + 3] = eight.w;
        }
    }
    // Whose word k half h of step i has: sketch 4 k + 2 i + h; bytes 8 i + 2 k + h; else 8 i + 4 h + k.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            u32 x[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) x[k] = sketch ? w[4 * k + 2 * i + h] : bf16 ? w[8 * i + 4 * h + k] : w[8 * i + 2 * k + h];
            store_shared4(query_piece(q_smem, row, g, 2 * i + h), x[0], x[1], x[2], x[3]);
        }
    }
}

// Loads the segment's query into shared memory, in float16 (its rotary part in bfloat16 where the keys' is), multiplied by a
// power of two that leaves no value too large; returns that power's inverse. All threads but the producer's call it. `came`: the
// barrier that says so, or 0. The loops are short on purpose: a block mostly runs them once, and would wait for their instructions.
__device__ __forceinline__ float load_query(const Params& p, u32 q_smem, int request, u32* shared_largest, u32 came, int consumer) {
    constexpr int kPieces = 4 * kGroups;                         // of a row; eight lanes copy a line
    if (consumer == 0) *shared_largest = 0;
    sync_all();                                                  // no thread reads the memory any more
#pragma unroll 1
    for (int item = consumer; item < kRows * kPieces; item += kAllThreads)
        copy_query_piece(p, q_smem, request, item / kPieces, item % kPieces / 4, item % 4);
    wait_for_copies();
    if (came && consumer % 32 == 0) barrier_arrive(came);
    u32 pair = 0;
#pragma unroll 1
    for (int item = consumer; item < kRows * kPieces; item += kAllThreads) {          // what this thread copied
        const uint4 x = load_shared4(query_piece(q_smem, item / kPieces, item % kPieces / 4, item % 4));
        pair = larger_magnitudes(larger_magnitudes(larger_magnitudes(larger_magnitudes(pair, x.x), x.y), x.z), x.w);
    }
    u32 largest = largest_of_warp(pair);
    if (consumer % 32 == 0) atomicMax(shared_largest, largest);
    sync_all();                                                  // all has been copied
    largest = *reinterpret_cast<volatile u32*>(shared_largest);
    const u32 exponent = query_exponent(largest);
    const float factor = __uint_as_float(exponent << 23);
#pragma unroll 1
    for (int item = consumer; item < kRows * kGroups; item += kAllThreads)
        order_query_group(q_smem, item % kRows, item / kRows, factor);
    fence_async_proxy();
    sync_all();
    return __uint_as_float((254 - exponent) << 23);
}
