// ---- producer -----------------------------------------------------------------------------------------------------
//
// gather.cuh says when the producer may read which rows.

// Slot of a token; behind the last one slot 0, whose row is read and masked.
__device__ __forceinline__ int slot_of(const Params& p, int start, int length, int token) {
    if (token >= length) return 0;
    const int mask = (1 << p.page_bits) - 1;
    return (__ldcg(p.page_indices + start + (token >> p.page_bits)) << p.page_bits) | (token & mask);
}

// a b + c. In assembly, because the compiler works out a row's addresses twice otherwise.
__device__ __forceinline__ unsigned long long multiply_add_wide(u32 a, u32 b, unsigned long long c) {
    unsigned long long d;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(d) : "r"(a), "r"(b), "l"(c));
    return d;
}
__device__ __forceinline__ unsigned long long multiply_add_wide_signed(int a, int b, unsigned long long c) {
    unsigned long long d;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(d) : "r"(a), "r"(b), "l"(c));
    return d;
}

// A warp copies 16 rows of a half tile; eight lanes copy a row, each time the 16-byte pieces of one line of 128 bytes: rows
// begin anywhere in a line, and a request that crosses lines counts twice. No prefetch into the L2: what lies beside a row is
// another token. Lane `first + row` knows the slot of a row.
constexpr int kFullArrivals = 64;
__device__ __forceinline__ void load_rows(const Params& p, u32 stage, u32 full, int slots, int first, int lane) {
    constexpr int kPieces = ROW_BYTES / 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = i * 4 + lane / 8, slot = __shfl_sync(0xffffffff, slots, first + row);
        const unsigned long long row_start = multiply_add_wide(slot, (u32)p.kv_stride, (unsigned long long)p.kv);
        const int begin = lane % 8 - (int)((u32)row_start >> 4 & 7);                   // the lane's piece of the first line
        const unsigned long long source = multiply_add_wide_signed(begin, 16, row_start);
        const u32 target = stage + row * kStride + begin * 16;
#pragma unroll
        for (int line = 0; line < kPieces + 7; line += 8) {
            const bool here = (line > 0 || begin >= 0) && (line + 7 < kPieces || begin < kPieces - line);
            asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p cp.async.cg.shared.global [%0], [%1], 16;\n}"
                         ::"r"(target + line * 16), "l"(source + line * 16), "r"((u32)here) : "memory");
        }
    }
    barrier_arrive_when_copied(full);
}

// Each warp fills every second stage: warps 0 and 1 the first halves of the tiles. Slots are looked up two tiles ahead.
__device__ __forceinline__ void produce(const Params& p, u32 ring, u32 full, u32 empty, int thread) {
    const int warp = thread / 32, lane = thread % 32, my_token = lane / 16 * kTile + warp * 16 + lane % 16;
    const u32 rows = ring + warp % 2 * 16 * kStride;
    u32 stage = warp / 2, phase = 0;
    for (Segments s(p); s.more(); s.next()) {
        const int length = s.length, start = s.start, end = s.end_tile();
        if (s.first_tile >= end) continue;
        int ahead = slot_of(p, start, length, s.first_tile * kTile + my_token);
#pragma unroll 1
        for (int tile = s.first_tile; tile < end; tile += 2) {
            const int now = ahead;
            ahead = slot_of(p, start, length, (tile + 2) * kTile + my_token);
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                if (tile + k >= end) break;
                barrier_wait(empty + 8 * stage, phase ^ 1);
                if ((tile + k + 1) * kTile > length - p.query_len) wait_for_predecessor();
                load_rows(p, rows + stage * kStageBytes, full + 8 * stage, now, 16 * k, lane);
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

// Group g of 32 columns of query row `row`: which columns wgmma multiplies with each other follows from how ldmatrix hands
// out codes, see unpack_group(): of the 16 columns of a step, bytes 4 i and 4 i + 1 come before 4 i + 2 and 4 i + 3; of 32
// sketch codes, the first step has 8 i, 8 i + 4, 8 i + 1 and 8 i + 5, the second the others. Returns the largest magnitude's bits.
__device__ __forceinline__ u32 load_query_group(const Params& p, u32 q_smem, int request, int row, int g) {
    const int global_row = blockIdx.y * kRows + row;
    const bool valid = global_row < p.query_len * p.heads;
    const int token = valid ? global_row / p.heads : 0, head = valid ? global_row - token * p.heads : 0;
    const long long query = (long long)request * p.query_len + token;
    const bool own = g >= kOwnGroup, sketch = g < kSketchGroups;
    const int group = own ? g - kOwnGroup : sketch ? g : g - kSketchGroups;
    const int columns = own ? LATENT : sketch ? SKETCH : ROPE;
    const u16* source = own || sketch
        ? p.q_latent + query * p.q_latent_token_stride + head * p.q_latent_head_stride + (sketch ? LATENT : 0)
        : p.q_rope + query * p.q_rope_token_stride + head * p.q_rope_head_stride;
    u32 w[16], largest = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint4 x = make_uint4(0, 0, 0, 0);
        if (valid && group * 32 + i * 8 < columns) x = __ldcg(reinterpret_cast<const uint4*>(source + group * 32 + i * 8));
        w[4 * i] = x.x, w[4 * i + 1] = x.y, w[4 * i + 2] = x.z, w[4 * i + 3] = x.w;
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) largest = largest_of(largest, w[i]);
    const int step = (own ? kOwnStep : sketch ? 0 : kRopeStep) + 2 * group;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (step + i >= kSteps) break;
        const u32 before = query_address(q_smem, row, step + i, 0), behind = query_address(q_smem, row, step + i, 1);
        if (sketch) {
            u32 x[2][4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const uint4 eight = in_order_of_levels(make_uint4(w[4 * k], w[4 * k + 1], w[4 * k + 2], w[4 * k + 3]));
                x[0][k] = i ? eight.z : eight.x, x[1][k] = i ? eight.w : eight.y;
            }
            store_shared4(before, x[0][0], x[0][1], x[0][2], x[0][3]);
            store_shared4(behind, x[1][0], x[1][1], x[1][2], x[1][3]);
        } else if (own || ROPE_BITS == 8) {
            store_shared4(before, w[8 * i], w[8 * i + 2], w[8 * i + 4], w[8 * i + 6]);
            store_shared4(behind, w[8 * i + 1], w[8 * i + 3], w[8 * i + 5], w[8 * i + 7]);
        } else {
            store_shared4(before, w[8 * i], w[8 * i + 1], w[8 * i + 2], w[8 * i + 3]);
            store_shared4(behind, w[8 * i + 4], w[8 * i + 5], w[8 * i + 6], w[8 * i + 7]);
        }
    }
    return largest;
}

__device__ __forceinline__ void sync_all() { asm volatile("bar.sync 2, %0;" ::"n"(kAllThreads) : "memory"); }

// Loads the segment's query into shared memory, in float16 (its rotary part in bfloat16 where the keys' is), multiplied by a
// power of two that leaves no value too large; returns that power's inverse. All threads but the producer's call it.
__device__ __forceinline__ float load_query(const Params& p, u32 q_smem, int request, u32* shared_largest, int consumer) {
    if (consumer == 0) *shared_largest = 0;
    sync_all();                                                  // no thread reads the memory any more
    u32 largest = 0;
#pragma unroll 1
    for (int item = consumer; item < kRows * kGroups; item += kAllThreads)
        largest = max(largest, load_query_group(p, q_smem, request, item / kGroups, item % kGroups));
#pragma unroll
    for (int offset = 16; offset; offset /= 2) largest = max(largest, __shfl_xor_sync(0xffffffff, largest, offset));
    if (consumer % 32 == 0) atomicMax(shared_largest, largest);
    sync_all();
    largest = *reinterpret_cast<volatile u32*>(shared_largest);
    const u32 exponent = query_exponent(largest);
    const float factor = __uint_as_float(exponent << 23);
#pragma unroll 1
    for (int item = consumer; item < kRows * kSteps * 2; item += kAllThreads) {
        const int row = item / (kSteps * 2), step = item % (kSteps * 2) / 2;
        const u32 address = query_address(q_smem, row, step, item % 2);
        const uint4 x = load_shared4(address);
        u32 w[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float low = __uint_as_float(w[i] << 16) * factor, high = __uint_as_float(w[i] & 0xFFFF0000u) * factor;
            w[i] = ROPE_BITS == 16 && step >= kRopeStep && step < kOwnStep ? pack_bf16(low, high) : pack_half(low, high);
        }
        store_shared4(address, w[0], w[1], w[2], w[3]);
    }
    fence_async_proxy();
    sync_all();
    return __uint_as_float((254 - exponent) << 23);
}
