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
        const int first_split = __ldcg(p.split_start + seg.request);
        const int splits = __ldcg(p.split_start + seg.request + 1) - first_split;
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
        if (base == 0) {                                         // the first query comes before its keys crowd the memory
            load_query<kConsumerThreads>(p, q_smem, seg.request, consumer);
            wait_for_copies();
            fence_async_proxy();
            sync_consumers();
        } else {
            barrier_wait(q_full, q_phase);
            q_phase ^= 1;
            fence_async_proxy();
        }
        if (group == 1) pass_turn(group);
        for (int j = MODE == MODE_TOKENS ? group : 0; j < tiles; j += kStep) {
            const u32 at = base + j, stage = at % STAGES;
            barrier_wait(full + 8 * stage, (at / STAGES) & 1);
            fence_async_proxy();
            take_turn(group);
            scores(s, q_rows, ring + stage * kStageBytes);
            wgmma_wait<0>();
            pin(s);
            if (group == 0 || j + 1 < tiles) pass_turn(group);
            const int first_token = (seg.first_tile + j) * kTile;
            soften(s, state, factor, p.scale_log2, first_token, limit, first_token + kTile > unmasked, lane);
            rescale(o, factor);
            pack_probability(probability, s);
            pin(o);
            add_values(o, probability, ring + stage * kStageBytes + first_panel * kPanelBytes);
            wgmma_wait<0>();
            pin(o);
            pin(probability);
            if (lane == 0) barrier_arrive(empty + 8 * stage);
        }
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
            __syncwarp();                                        // all lanes have read the query's memory
            if (lane == 0) barrier_arrive(q_empty);
            store<0, kOut>(p, o, state, seg.request, split, whole, first_row, first_panel * 64, group, thread);
        } else if (group == 0) {
            join<0>(o, state, q_buffer, thread);
            __syncwarp();
            if (lane == 0) barrier_arrive(q_empty);
            store<0, kOut / 2>(p, o, state, seg.request, split, whole, 0, 0, 0, thread);
        } else {
            join<1>(o, state, q_buffer, thread);
            __syncwarp();
            if (lane == 0) barrier_arrive(q_empty);
            store<kOut / 2, kOut / 2>(p, o, state, seg.request, split, whole, 0, 0, 1, thread);
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
    if (group == 0) {
        // The block starts with 3 x 168 registers a lane; a warpgroup that asks for more than is free waits forever.
        static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168, "registers of the three warpgroups");
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
        produce(p, q_smem, slot_buffer, ring, full, empty, q_full, q_empty, thread);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
        wait_for_predecessor();
        asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
        consume(p, q_smem, q_buffer, ring, full, empty, q_full, q_empty, group - 1, thread);
    }
}
