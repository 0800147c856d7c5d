// ---- producer -----------------------------------------------------------------------------------------------------
//
// The page table and the cache rows, except those of the step's own tokens, have not changed since the step was planned, and
// the plan was complete before the kernel's predecessor in the stream started (decode.py ensures that). So the producer fills
// the ring while the predecessor still runs, and waits for the predecessor only before it reads the newest rows.

template <int kThreads>
__device__ __forceinline__ void load_query(const Params& p, u32 q_smem, int request, int thread) {
    const int rows = p.query_len * p.heads, column = thread % 8;
#pragma unroll 1
    for (int row = thread / 8; row < kRows; row += kThreads / 8) {
        const int global_row = blockIdx.y * kRows + row;
        const bool valid = global_row < rows;
        const int token = valid ? global_row / p.heads : 0, head = valid ? global_row - token * p.heads : 0;
        const long long query = (long long)request * p.query_len + token;
        const u16* latent = p.q_latent + query * p.q_latent_token_stride + head * p.q_latent_head_stride;
        const u16* rope = p.q_rope + query * p.q_rope_token_stride + head * p.q_rope_head_stride;
        const u32 target = q_smem + row * 128 + ((column ^ (row & 7)) << 4);
#pragma unroll
        for (int panel = 0; panel < kQPanels; ++panel) {
            const int first = panel * 64 + column * 8;
            if (first < kQWidth)
                copy16(target + panel * kQPanelBytes, first < LATENT ? latent + first : rope + (first - LATENT), valid);
        }
    }
}

constexpr int kRowsPerThread = kTile / (kProducerThreads / 8);             // cache rows of a tile that a thread copies
constexpr int kSlotsPerThread = kChunkTiles * kTile / kProducerThreads;    // slots of a chunk that a thread looks up

// Loads the slots of a chunk's tokens: every 128th for a thread, -1 beyond the end of the request. The loads bypass the
// read-only cache, which is only for data that is constant throughout a kernel: this kernel may start before a kernel that
// writes the page table has ended.
__device__ __forceinline__ void load_slots(const Params& p, int start, int length, int tile, int thread,
                                           int (&slots)[kSlotsPerThread]) {
    const int mask = (1 << p.page_bits) - 1;
#pragma unroll
    for (int i = 0; i < kSlotsPerThread; ++i) {
        const int token = tile * kTile + thread + i * kProducerThreads;
        slots[i] = -1;
        if (token < length) slots[i] = (__ldcg(p.page_indices + start + (token >> p.page_bits)) << p.page_bits) | (token & mask);
    }
}

__device__ __forceinline__ void load_tile(const Params& p, u32 stage, int thread, const int* slots, u64 policy) {
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
                copy_row16(target + panel * kPanelBytes, source + panel * 64, valid, policy);
    }
}

__device__ __forceinline__ void produce(const Params& p, u32 q_smem, int* slot_buffer, u32 ring, u32 full, u32 empty,
                                        u32 q_full, u32 q_empty, int thread) {
    const u64 policy = read_once();
    u32 stage = 0, phase = 0, q_phase = 0, chunk = 0;
    bool first_segment = true;
    for (Segments s(p); s.more(); s.next()) {
        const int length = s.length, start = s.start, end = s.end_tile();
        if (s.first_tile >= end) continue;
        int ahead[kSlotsPerThread];                              // slots of the next chunk, being loaded
        load_slots(p, start, length, s.first_tile, thread, ahead);
        if (!first_segment) {                                    // the consumers load the query of the first segment
            barrier_wait(q_empty, q_phase);
            q_phase ^= 1;
            load_query<kProducerThreads>(p, q_smem, s.request, thread);
            barrier_arrive_when_copied(q_full);
        }
        first_segment = false;
        for (int first = s.first_tile; first < end; first += kChunkTiles, chunk ^= 1) {
            int* slots = slot_buffer + chunk * (kChunkTiles * kTile);
#pragma unroll
            for (int i = 0; i < kSlotsPerThread; ++i) slots[thread + i * kProducerThreads] = ahead[i];
            sync_producers();
            load_slots(p, start, length, first + kChunkTiles, thread, ahead);
            for (int tile = first; tile < min(first + kChunkTiles, end); ++tile) {
                barrier_wait(empty + 8 * stage, phase ^ 1);
                if ((tile + 1) * kTile > length - p.query_len) wait_for_predecessor();
                load_tile(p, ring + stage * kStageBytes, thread, slots + (tile - first) * kTile, policy);
                barrier_arrive_when_copied(full + 8 * stage);
                if (++stage == STAGES) stage = 0, phase ^= 1;
            }
        }
    }
}
