template <int kGroup>
__device__ __forceinline__ void finish(const Params& p, Fixed& fixed, float (&o)[kBlocks][kPart], float (&total)[kRows / 4],
                                       float* buffer, int request, int split, bool whole, int warp, int lane) {
    float top[kRows / 4];
    join<kGroup>(fixed, o, top, total, buffer, warp, lane);
    store<kGroup>(p, fixed, o, top, total, request, split, whole, warp, lane);
}

__device__ __forceinline__ void consume(const Params& p, Fixed& fixed, u32 q_smem, float* buffer, u32 ring, int group, int thread) {
    const int consumer = group * 128 + thread, warp = thread / 32, lane = thread % 32;
    u32 base = 0, sequence = 0;                                  // tiles of earlier segments; tries at tiles of this warpgroup
    if (consumer == 0) fixed.merge.request = -1, fixed.flag[0] = fixed.flag[1] = 0;
    for (Segments seg(p); seg.more(); seg.next()) {
        const int length = seg.length, tiles = seg.end_tile() - seg.first_tile;
        if (tiles <= 0) {
            if (length <= 0) store_zeros(p, seg.request, consumer);
            continue;
        }
        const int first_split = __ldcg(p.split_start + seg.request);
        const int splits = __ldcg(p.split_start + seg.request + 1) - first_split;
        const bool whole = splits == 1;
        float o[kBlocks][kPart], total[kRows / 4];
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
            for (int i = 0; i < kPart; ++i) o[b][i] = 0.f;
#pragma unroll
        for (int i = 0; i < kRows / 4; ++i) total[i] = 0.f;
        const float inverse = load_query(p, q_smem, seg.request, &fixed.largest, consumer);
        for (int row = lane; row < kRows; row += 32) fixed.reference[group][warp][row] = negative_infinity();
        __syncwarp();
        const Segment c = {length, length - p.query_len + 1, p.scale_log2 * inverse, ring, shared_address(fixed.full),
                           shared_address(fixed.empty), base, q_smem, q_smem + kQBytes + group * kProbabilityBytes,
                           tiles, seg.first_tile * kTile, group, warp, lane};
        attend(p, fixed, c, sequence, o, total);
        base += tiles;
        const int split = first_split + seg.before;
        if (group == 0) finish<0>(p, fixed, o, total, buffer, seg.request, split, whole, warp, lane);
        else finish<1>(p, fixed, o, total, buffer, seg.request, split, whole, warp, lane);
        if (!whole) {
            const u32 target = announce(p, seg.request, splits, consumer);
            // The last of a request's parts, when it goes on to another request, leaves the merge to the others.
            const int4 last = part_row(p, blockIdx.x - seg.before + splits);
            const bool goes_on = last.x > seg.request + 1 || last.y > 0;
            if (consumer == 0 && !(goes_on && seg.before == splits - 1))
                fixed.merge = {seg.request, seg.before, splits - (goes_on ? 1 : 0), target};
        }
    }
    sync_consumers();                                            // the query's memory is free, fixed.merge is written
    if (fixed.merge.request >= 0) merge(p, fixed.merge, buffer, consumer);
}

extern "C" __global__ void __launch_bounds__(384, 1) sketched_decode(const __grid_constant__ Params p) {
    __shared__ Fixed fixed;
    extern __shared__ __align__(1024) char raw[];
    static_assert(sizeof(Fixed) == FIXED_BYTES, "decode.py counts this much");
    static_assert(kQBytes + 2 * kProbabilityBytes + STAGES * kStageBytes <= SHARED_BYTES, "decode.py counts less");
    const u32 q_smem = shared_address(raw), ring = q_smem + kQBytes + 2 * kProbabilityBytes;
    const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
    if (threadIdx.x == 0) {
        if (q_smem % 1024) __trap();                             // the swizzle repeats every 1,024 bytes
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(shared_address(fixed.full + i), kFullArrivals);
            barrier_init(shared_address(fixed.empty + i), 4);
        }
        fixed.levels = make_uint4(LEVELS_LOW_0, LEVELS_LOW_1, LEVELS_HIGH_0, LEVELS_HIGH_1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        fence_async_proxy();
    }
    __syncthreads();
    if (group == 0) {
        // As in latent_decode.cu: no more registers than the block starts with.
        static_assert(PRODUCER_REGISTERS + 2 * CONSUMER_REGISTERS <= 3 * 168, "registers of the three warpgroups");
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        produce(p, ring, shared_address(fixed.full), shared_address(fixed.empty), thread);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        wait_for_predecessor();
        asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
        consume(p, fixed, q_smem, reinterpret_cast<float*>(raw), ring, group - 1, thread);
    }
}
