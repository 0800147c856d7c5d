// The shared memory that every variant has. Its 1,024 bytes are one period of the swizzle, so that the rest is aligned to it.
struct alignas(1024) Fixed {
    u64 full[STAGES], empty[STAGES], q_full, q_empty;
    Shared merge;
};

__device__ __forceinline__ void consume(const Params& p, Fixed& fixed, u32 q_smem, float* q_buffer, u32 ring, int group,
                                        int thread) {
    const u32 full = shared_address(fixed.full), empty = shared_address(fixed.empty);
    const u32 q_full = shared_address(&fixed.q_full), q_empty = shared_address(&fixed.q_empty);
    const int lane = thread % 32;
    const int first_row = MODE == MODE_ROWS ? group * 64 : 0;
    const int first_panel = MODE == MODE_WIDTH && group == 1 ? kValuePanels - kOutPanels : 0;
    const u32 q_rows = q_smem + first_row * 128;
    const int consumer = group * 128 + thread;
    u32 base = 0, q_phase = 0;                                   // tiles of earlier segments; phase of q_full
    if (consumer == 0) fixed.merge.request = -1;
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
        const Stretch stretch = {ring, full, empty, base, tiles, seg.first_tile * kTile, length - p.query_len + 1};
        float o[kOut];
        QueryRegisters query;
        Softmax state = {{negative_infinity(), negative_infinity()}, {0.f, 0.f}};
#pragma unroll
        for (int i = 0; i < kOut; ++i) o[i] = 0.f;
        load_query_registers(p, query, seg.request, first_row, thread);
        if (base == 0) {                                         // the producer is already loading keys
            load_query<kConsumerThreads>(p, q_smem, seg.request, consumer);
            wait_for_copies();
            fence_async_proxy();
            sync_consumers();
        } else {
            barrier_wait(q_full, q_phase);
            q_phase ^= 1;
            fence_async_proxy();
        }
        if constexpr (MODE == MODE_ROWS)
            attend_in_turns(q_rows, query, stretch, limit, p.scale_log2, o, state, group, lane);
        else
            attend(q_rows, query, stretch, limit, p.scale_log2, o, state, group, first_panel, lane);
        base += tiles;
        // From here on maxima are in base-2 units, as the log-sum-exp is.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            state.highest[half] *= p.scale_log2;
            state.total[half] += __shfl_xor_sync(0xffffffff, state.total[half], 1);
            state.total[half] += __shfl_xor_sync(0xffffffff, state.total[half], 2);
        }
        const int split = first_split + seg.before;
        if (MODE != MODE_TOKENS) {
            __syncwarp();                                        // all lanes have now read the query's memory
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
        if (whole) continue;
        sync_consumers();
        if (consumer != 0) continue;
        const bool goes_on = last_goes_on(p, seg.request, seg.before, splits);
        hand_over(p, fixed.merge, seg.request, seg.before, first_split, splits, goes_on);
    }
    sync_consumers();                                            // now the query's memory is free and fixed.merge is written
    if (fixed.merge.request >= 0) merge(p, fixed.merge, q_buffer, consumer);
}

extern "C" __global__ void __launch_bounds__(384, 1) latent_decode(const __grid_constant__ Params p) {
    __shared__ Fixed fixed;
    extern __shared__ __align__(1024) char raw[];
    const u32 q_smem = shared_address(raw), ring = q_smem + kQBytes;
    float* q_buffer = reinterpret_cast<float*>(raw);
    int* slot_buffer = reinterpret_cast<int*>(raw + kQBytes + STAGES * kStageBytes);
    const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
    if (threadIdx.x == 0) {
        if (q_smem % 1024) __trap();                             // the swizzle repeats every 1,024 bytes
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(shared_address(fixed.full + i), kProducerThreads);
            barrier_init(shared_address(fixed.empty + i), MODE == MODE_TOKENS ? 4 : 8);
        }
        barrier_init(shared_address(&fixed.q_full), kProducerThreads);
        barrier_init(shared_address(&fixed.q_empty), 8);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (group == 0) {
        // The block starts with 3 x 168 registers a lane; a warpgroup that asks for more than are free waits forever.
        static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168, "registers of the three warpgroups");
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
        produce(p, q_smem, slot_buffer, ring, shared_address(fixed.full), shared_address(fixed.empty),
                shared_address(&fixed.q_full), shared_address(&fixed.q_empty), thread);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
        wait_for_predecessor();
        asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
        consume(p, fixed, q_smem, q_buffer, ring, group - 1, thread);
    }
}
