// The warpgroup of scores or of values walks the segments of its block's part. Both synchronise when a segment begins and when
// its sums are complete.
template <bool kScores>
__device__ __forceinline__ void consume(const Params& p, Fixed& fixed, const Memory& memory, float* buffer, int thread) {
    const int consumer = (kScores ? 0 : 128) + thread;
    u32 q[4 * QUERY_STEPS], done = 0;
    Stage at;
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
        const float inverse = load_query<kScores>(p, memory.query, seg.request, &fixed.largest, fixed.columns, consumer, q);
        const Segment c = {length, length - p.query_len + 1, p.scale_log2 * inverse, tiles, seg.first_tile * kTile,
                           __shfl_sync(0xffffffff, thread / 32, 0), thread % 32};
        if constexpr (kScores) {
            attend(p, fixed, c, memory, q, at, done);
            sync_consumers();
        } else {
            Values v;
            v.clear();
            gather_values(fixed, c, memory, at, done, v);
            sync_consumers();
            store(p, fixed, v, seg.request, first_split + seg.before, whole, c);
        }
        if (whole) continue;
        sync_consumers();
        if (consumer != 0) continue;
        const bool goes_on = last_goes_on(p, seg.request, seg.before, splits);
        hand_over(p, fixed.merge, seg.request, seg.before, first_split, splits, goes_on);
    }
    sync_consumers();                                            // now the query's memory is free and fixed.merge is written
    if (fixed.merge.request >= 0) merge(p, fixed.merge, buffer, consumer);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) sketched_tiles(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) char raw[];
    Fixed& fixed = *reinterpret_cast<Fixed*>(raw + kFixedOffset);
    static_assert(kFixedOffset + sizeof(Fixed) <= SHARED_BYTES, "as sketched_tiles.py counts");
    const u32 base = shared_address(raw);
    const Memory memory = {base, base + kProbabilityOffset, base + kRingOffset};
    const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
    if (threadIdx.x == 0) {
        if (base % 1024) __trap();                               // the swizzle repeats every 1,024 bytes
        for (int i = 0; i < kStages; ++i) {
            barrier_init(shared_address(fixed.keys_full + i), kFillWarps);
            barrier_init(shared_address(fixed.keys_empty + i), 4);
            barrier_init(shared_address(fixed.values_full + i), kFillWarps);
            barrier_init(shared_address(fixed.values_empty + i), 8);
        }
        barrier_init(shared_address(&fixed.ready), 4);
        barrier_init(shared_address(&fixed.used), 4);
        fixed.constants = Constants::of<BITS>();
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        fence_async_proxy();
    }
    if (threadIdx.x < 2 * kSteps) fixed.columns[threadIdx.x] = query_column(threadIdx.x) / 8;
    __syncthreads();
    // The warpgroups may not ask for more registers than the block starts with, as in latent_decode.cu.
    static_assert(2 * FILL_REGISTERS + SCORE_REGISTERS + VALUE_REGISTERS <= 4 * 128, "registers");
    if (group < 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FILL_REGISTERS));
        const int warp = group * 4 + thread / 32;
        fill(p, fixed, memory.ring, base + kRawOffset + warp * kRawBytes, warp, thread % 32);
    } else if (group == 2) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(SCORE_REGISTERS));
        wait_for_predecessor();
        asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
        consume<true>(p, fixed, memory, reinterpret_cast<float*>(raw), thread);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(VALUE_REGISTERS));
        wait_for_predecessor();
        asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
        consume<false>(p, fixed, memory, reinterpret_cast<float*>(raw), thread);
    }
}
