// ---- producer -----------------------------------------------------------------------------------------------------
//
// gather.cuh explains which rows the producer may read before its predecessor has ended.

// Returns the page of a token, or page 0 behind the last token: rows read from there are masked.
__device__ __forceinline__ int page_of(const Params& p, int start, int length, int token) {
    return token < length ? __ldcg(p.page_indices + start + (token >> p.page_bits)) : 0;
}

// Returns a b + c. Without assembly the compiler computes a row's address twice.
__device__ __forceinline__ u64 multiply_add_wide(u32 a, u32 b, u64 c) {
    u64 d;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(d) : "r"(a), "r"(b), "l"(c));
    return d;
}

// Copies a warp's 16 rows of a half tile. Eight lanes copy a row, one line of 128 bytes at a time in 16-byte pieces: rows begin
// anywhere in a line, and a request that crosses lines counts twice. The copies do not prefetch into the L2, because the bytes
// beside a row belong to another token. Lane `first + row` holds the slot of a row.
constexpr int kFullArrivals = 64;
__device__ __forceinline__ void load_rows(const Params& p, u32 stage, u32 full, int slots, int first, int lane, u64 policy) {
    const int piece = lane % 8 * 16;                             // the lane's byte in a line
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = i * 4 + lane / 8, slot = __shfl_sync(0xffffffff, slots, first + row);
        const u64 begin = multiply_add_wide(slot, (u32)p.kv_stride, (u64)p.kv), source = (begin & ~127ull) | (u32)piece;
        const int at = piece - (int)((u32)begin & 127);          // the byte in the row
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

// Warps 0 and 1 fill the first half of each tile, warps 2 and 3 the second half, 16 rows each. The pages of two tiles are looked up
// while the two tiles before them are copied. After kEarly half tiles a warp waits until the first query has arrived, because the
// query's loads would wait behind more copies.
//
// A warp waits only for room for its own half tiles. With an odd number of stages, a stage alternates between the two pairs of
// warps from round to round. Then the warps meet every two tiles: a warp that is a round ahead of the others could take a barrier
// that is two phases behind for one whose phase has completed. If each warp also waited for room for the others' halves, they
// would stay together too, but could hang: the others may fill a half and see it freed before this warp looks, and then this warp
// finds the parity that it is waiting to see change.
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
