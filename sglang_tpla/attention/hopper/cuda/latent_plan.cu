// ---- plan ---------------------------------------------------------------------------------------------------------

struct PlanBuffers {
    const int *lengths, *page_starts;
    int *part_begin, *split_start;
    int batch, parts;

    __device__ __forceinline__ int tiles(int request) const { return (lengths[request] + kTile - 1) / kTile; }
    __device__ __forceinline__ void store_part(int part, int request, int tile, int before) const {
        const bool real = request < batch;
        int4* row = reinterpret_cast<int4*>(part_begin) + 2 * part;
        row[0] = make_int4(request, tile, before, real ? lengths[request] : 0);
        row[1] = make_int4(real ? page_starts[request] : 0, 0, 0, 0);
    }
};

// Lays the requests into parts of `capacity`, as tests/gpu/plan_twin.py does, and returns whether `parts` parts suffice. With
// `keep`, the lanes of the warp store the plan together.
__device__ __forceinline__ bool lay_parts(const PlanBuffers& plan, int capacity, bool keep, int lane) {
    const int most = capacity - SEGMENT_COST;                    // the most tiles of a part that holds one segment
    int part = 0, left = capacity, splits = 0;
    if (most <= 0) return plan.batch == 0;
    if (keep && lane == 0) plan.store_part(0, 0, 0, 0);
    for (int request = 0; request < plan.batch; ++request) {
        const int tiles = plan.tiles(request);
        if (keep && lane == 0) plan.split_start[request] = splits;
        if (tiles <= 0) continue;
        if (tiles + SEGMENT_COST <= left) {
            left -= tiles + SEGMENT_COST, ++splits;
            continue;
        }
        const int first = max(left - SEGMENT_COST, 0), before = first > 0 ? 1 : 0;
        const int more = (tiles - first - 1) / most;             // parts that this request fills
        if (keep)
            for (int i = lane; i <= more; i += 32) plan.store_part(part + 1 + i, request, first + i * most, before + i);
        part += 1 + more, splits += before + more + 1;
        left = most - (tiles - first - more * most);
        if (part >= plan.parts) return false;
    }
    if (keep) {
        for (int i = part + 1 + lane; i <= plan.parts; i += 32) plan.store_part(i, plan.batch, 0, 0);
        if (lane == 0) plan.split_start[plan.batch] = splits;
    }
    return true;
}

// Lays parts that do not cross requests: each request gets as many parts as it needs at up to `most` tiles a part. Returns
// their number and, with `keep`, stores the plan. The twin is in tests/gpu/plan_twin.py.
__device__ __forceinline__ int lay_whole(const PlanBuffers& plan, int most, bool keep, int lane) {
    int used = 0;
    for (int base = 0; base < plan.batch; base += 32) {
        const int request = base + lane, tiles = request < plan.batch ? plan.tiles(request) : 0;
        const int count = tiles > 0 ? (tiles + most - 1) / most : 0;
        int until = count;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            const int other = __shfl_up_sync(0xffffffff, until, offset);
            if (lane >= offset) until += other;
        }
        const int first = used + until - count;
        if (keep && request < plan.batch) {
            plan.split_start[request] = first;
            for (int i = 0; i < count; ++i) plan.store_part(first + i, request, (int)((long long)tiles * i / count), i);
        }
        used += __shfl_sync(0xffffffff, until, 31);
    }
    if (keep) {
        for (int i = used + lane; i <= plan.parts; i += 32) plan.store_part(i, plan.batch, 0, 0);
        __syncwarp();
        if (lane == 0) plan.split_start[plan.batch] = used, plan.store_part(0, 0, 0, 0);   // part 0 walks over empty requests
    }
    return used;
}

// Plans a step, in one warp. If parts that do not cross requests are nearly as equal, lays those; otherwise lane i tries a
// capacity larger by i, and the smallest that fits is laid. Also sets `arrived` to zero.
extern "C" __global__ void __launch_bounds__(32) latent_plan(const int* lengths, const int* page_starts, int batch, int parts,
                                                             int* part_begin, int* split_start, u32* arrived, int counters) {
    __shared__ int copy[PLAN_BATCH];
    PlanBuffers plan = {lengths, page_starts, part_begin, split_start, batch, parts};
    const int lane = threadIdx.x;
    int cost = 0;
    for (int i = lane; i < counters; i += 32) arrived[i] = 0;
    for (int i = lane; i < batch; i += 32) {
        const int tiles = plan.tiles(i);
        cost += tiles > 0 ? tiles + SEGMENT_COST : 0;
        if (i < PLAN_BATCH) copy[i] = lengths[i];
    }
    __syncwarp();
    if (batch <= PLAN_BATCH) plan.lengths = copy;
#pragma unroll
    for (int offset = 16; offset; offset /= 2) cost += __shfl_xor_sync(0xffffffff, cost, offset);
    const int capacity = (cost + parts - 1) / parts;
    for (int most = max(capacity - SEGMENT_COST, 1); most <= capacity + SEGMENT_COST; ++most)
        if (lay_whole(plan, most, false, lane) <= parts) {
            lay_whole(plan, most, true, lane);
            return;
        }
    const u32 fits = __ballot_sync(0xffffffff, lay_parts(plan, capacity + lane, false, lane));
    lay_parts(plan, capacity + __ffs(fits) - 1, true, lane);
}
