// Moves a warpgroup from kFrom to kTo registers a thread. Each segment begins and ends with 128 registers, so that all warpgroups
// share the code there: two copies of it would take twice as long to fetch.
template <int kFrom, int kTo> __device__ __forceinline__ void set_registers() {
    if constexpr (kTo > kFrom) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kTo));
    else if constexpr (kTo < kFrom) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kTo));
}

// Returns the thread's number in its warpgroup, and reads it from the hardware each time: a copy in a register was spilled, and the
// reload from local memory took a thousand cycles.
__device__ __forceinline__ int thread_of_group() {
    u32 thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread % 128;
}

// Runs a warpgroup of scores (role 0 or 1) or of values (role 2) over the segments of the block's part. All warpgroups meet when a
// segment begins, when its sums are complete and, if it is part of a request, when its result is stored.
__device__ __forceinline__ void consume(const Params& p, Fixed& fixed, u32 q_smem, float* buffer, u32 ring, int role) {
    const int consumer = role * 128 + thread_of_group();
    float* start_parts = buffer + kQBytes / 4;                   // in the probabilities' memory, which is free here
    u32 base = 0, tries = 0, done = 0, done_of[2] = {0, 0};
    if (consumer == 0) fixed.merge.request = -1;
    Segments seg(p);                                             // before the wait: the plan is older than the predecessor
    int first_split = 0, splits = 0;
    const auto read_splits = [&]() {
        if (!seg.more()) return;
        const int* start = p.split_start + seg.request;
        first_split = __ldcg(start), splits = __ldcg(start + 1) - first_split;
    };
    read_splits();
    wait_for_predecessor();
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    for (; seg.more(); seg.next(), read_splits()) {
        const int length = seg.length, tiles = seg.end_tile() - seg.first_tile;
        if (tiles <= 0) {
            if (length <= 0) store_zeros(p, seg.request, consumer);
            continue;
        }
        const bool whole = splits == 1;
        bool goes_on = false;
        const u32 came = base == 0 ? shared_address(&fixed.query) : 0;
        const float inverse = load_query(p, q_smem, start_parts, seg.request, fixed.largest, came, consumer / 32, consumer % 32);
        const int thread = thread_of_group(), warp = thread / 32, lane = thread % 32;
        const u32 group = role < 2 ? role : 0, probability = q_smem + kQBytes, values = probability + 2 * kProbabilityBytes;
        const Segment c = {length, length - p.query_len + 1, p.scale_log2 * inverse, ring, base, q_smem,
                           probability + group * kProbabilityBytes, values + group * kValueBytes, tiles, seg.first_tile * kTile,
                           (int)group, warp, lane};
        base += tiles;
        if (role < 2) {
            set_registers<128, SCORE_REGISTERS>();
            float total[kRows / 4];
#pragma unroll
            for (int i = 0; i < kRows / 4; ++i) total[i] = 0.f;
            for (int row = lane; row < kRows; row += 32) fixed.reference[role][warp][row] = negative_infinity();
            __syncwarp();
            if (kSketchAbove || kRopeAbove || kBytesAbove) find_starts(fixed, start_parts, consumer);
            attend(p, fixed, c, tries, done, total);
            if (!whole && consumer == 0) goes_on = last_goes_on(p, seg.request, seg.before, splits);
            sync_all();
            set_registers<SCORE_REGISTERS, 128>();
        } else {
            set_registers<128, VALUE_REGISTERS>();
            Values v;
            v.clear();
            gather_values(fixed, c, done_of, v);
            sync_all();
            store(p, fixed, v, seg.request, first_split + seg.before, whole, warp, lane);
            set_registers<VALUE_REGISTERS, 128>();
        }
        if (whole) continue;
        sync_all();
        if (consumer == 0) hand_over(p, fixed.merge, seg.request, seg.before, first_split, splits, goes_on);
    }
    if (role == 2) return;
    sync_consumers();                                            // the query's memory is free, and fixed.merge is written
    if (fixed.merge.request >= 0) merge(p, fixed.merge, buffer, consumer);
}

extern "C" __global__ void __launch_bounds__(kAllThreads + 128, 1) sketched_decode(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) char raw[];
    Fixed& fixed = *reinterpret_cast<Fixed*>(raw + kRingOffset + STAGES * kStageBytes);
    static_assert(sizeof(Fixed) <= FIXED_BYTES, "as sketched.py counts");
    static_assert(kRingOffset + STAGES * kStageBytes + FIXED_BYTES == SHARED_BYTES, "as sketched.py counts");
    const u32 q_smem = shared_address(raw), ring = q_smem + kRingOffset;
    const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) {
        if (q_smem % 1024) __trap();                             // the swizzle repeats every 1,024 bytes
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(shared_address(fixed.full + i), kFullArrivals);
            barrier_init(shared_address(fixed.empty + i), ROW_VALUES ? 2 : 4);  // the warps that read a half tile
        }
        barrier_init(shared_address(&fixed.query), kAllThreads / 32);
        for (int i = 0; i < 2; ++i) {
            barrier_init(shared_address(fixed.ready + i), 1);
            barrier_init(shared_address(fixed.used + i), 4);
        }
        fixed.constants = Constants::of<BITS>();
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        fence_async_proxy();
    }
    __syncthreads();
    // The warpgroups never hold more registers than the block starts with, as in latent_decode.cu. A warpgroup that asks for more
    // registers waits until others have released theirs, and a release waits for nobody.
    static_assert(PRODUCER_REGISTERS + 2 * SCORE_REGISTERS + VALUE_REGISTERS <= 4 * 128, "registers");
    float* buffer = reinterpret_cast<float*>(raw);
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        produce(p, ring, shared_address(fixed.full), shared_address(fixed.empty), shared_address(&fixed.query), thread_of_group());
    } else {
        consume(p, fixed, q_smem, buffer, ring, group - 1);
    }
}
