// ---- merge --------------------------------------------------------------------------------------------------------

// Announces that this block has stored its partial result of `request`. Returns the value of `arrived` once all are stored.
__device__ __forceinline__ u32 announce(const Params& p, int request, int splits) {
    u32 before;                                                  // follows the barrier, so it releases the stores of all consumers
    asm volatile("atom.add.release.gpu.global.u32 %0, [%1], 1;"
                 : "=r"(before) : "l"(p.arrived + blockIdx.y * p.batch + request) : "memory");
    return (before / splits + 1) * splits;                       // all layers of a step use the same counter
}

// Returns whether the last of a request's parts continues with another request. If so, it leaves the merge to the others.
__device__ __forceinline__ bool last_goes_on(const Params& p, int request, int before, int splits) {
    const int4 end = part_row(p, blockIdx.x - before + splits);
    return end.x > request + 1 || end.y > 0;
}

// Announces the partial result, and notes the block's share of the request's merge in `shared`. One thread calls this function,
// after a barrier of all threads that stored.
__device__ __forceinline__ void hand_over(const Params& p, Shared& shared, int request, int before, int first_split, int splits,
                                          bool goes_on) {
    const u32 target = announce(p, request, splits);
    if (!(goes_on && before == splits - 1))
        shared = {request, before, splits - (goes_on ? 1 : 0), first_split, splits, target};
}

// A running sum of 8 columns over splits: the values and the sum of weights, both scaled by 2^-top.
struct Sum {
    float value[8];
    float top, total;

    __device__ __forceinline__ void rescale_to(float new_top) {
        const float factor = top == negative_infinity() ? 0.f : exp2_fast(top - new_top);
#pragma unroll
        for (int i = 0; i < 8; ++i) value[i] *= factor;
        total *= factor, top = new_top;
    }
    __device__ __forceinline__ void add(const uint4& x, float scale, float x_top) {      // top >= x_top
        const float weight = x_top == negative_infinity() ? 0.f : exp2_fast(x_top - top);
        const u32 packed[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack_half(packed[i]);
            value[2 * i] += weight * scale * pair.x, value[2 * i + 1] += weight * scale * pair.y;
        }
        total += weight;
    }
    __device__ __forceinline__ void add(const Sum& other) {
        rescale_to(fmaxf(top, other.top));
        const float weight = other.top == negative_infinity() ? 0.f : exp2_fast(other.top - top);
#pragma unroll
        for (int i = 0; i < 8; ++i) value[i] += weight * other.value[i];
        total += weight * other.total;
    }
    // Returns the sum of the lane whose number differs in the bits of `bits`.
    __device__ __forceinline__ Sum across(int bits) const {
        Sum other;
#pragma unroll
        for (int i = 0; i < 8; ++i) other.value[i] = __shfl_xor_sync(0xffffffff, value[i], bits);
        other.top = __shfl_xor_sync(0xffffffff, top, bits), other.total = __shfl_xor_sync(0xffffffff, total, bits);
        return other;
    }
};

// An item of one split: 8 values of a row, their scale, and the row's log-sum-exp.
struct Item {
    uint4 values;
    float scale, lse;
};

// Adds up items [begin, end). If there are fewer items than threads, several threads share an item's splits: of `width` items, a
// power of two, thread i takes item i % width and every (256 / width)-th split. A thread has up to two batches of loads in
// flight. The loops are kept short, because a block runs them once and would spend most of their time on fetching instructions.
__device__ __forceinline__ void merge_items(const Params& p, int request, int first, int splits, int begin, int end, Sum* sums,
                                            int consumer) {
    constexpr int kItemsPerRow = LATENT / 8, kBatch = 4;
    const int rows = p.query_len * p.heads, first_row = blockIdx.y * kRows;
    const int width = min(1 << (32 - __clz(max(end - begin - 1, 7))), kConsumerThreads), step = kConsumerThreads / width;
    const int item = consumer % width, offset = consumer / width;
#pragma unroll 1
    for (int base = begin + item; base - item < end; base += width) {
        const int row = first_row + base / kItemsPerRow, piece = base % kItemsPerRow;
        const int last = base < end ? splits : 0, to_scale = (piece * 8 < kScaleColumn ? 1 : 2) * rows;
        const auto load = [&](Item (&batch)[kBatch], int i) {
#pragma unroll
            for (int j = 0; j < kBatch; ++j, i += step) {
                batch[j] = {make_uint4(0, 0, 0, 0), 0.f, negative_infinity()};
                if (i >= last) continue;
                const long long split_row = (long long)(first + i) * rows + row;
                const float* row_sums = p.partial_sums + 3 * split_row - 2 * row;
                batch[j].lse = __ldcg(row_sums), batch[j].scale = __ldcg(row_sums + to_scale);
                batch[j].values = __ldcg(reinterpret_cast<const uint4*>(p.partial_out) + split_row * kItemsPerRow + piece);
            }
        };
        Sum sum = {{0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f}, negative_infinity(), 0.f};
        Item batch[kBatch], next[kBatch];
        load(batch, offset);
#pragma unroll 1
        for (int i = offset; i < splits; i += step * kBatch) {
            load(next, i + step * kBatch);
            float top = sum.top;
#pragma unroll
            for (int j = 0; j < kBatch; ++j) top = fmaxf(top, batch[j].lse);
            sum.rescale_to(top);
#pragma unroll
            for (int j = 0; j < kBatch; ++j) sum.add(batch[j].values, batch[j].scale, batch[j].lse);
#pragma unroll
            for (int j = 0; j < kBatch; ++j) batch[j] = next[j];
        }
        if (step > 1) {                                          // then this is the only round
#pragma unroll 1
            for (int bits = 16; bits >= width; bits /= 2) sum.add(sum.across(bits));
            sums[consumer] = sum;
            sync_consumers();
#pragma unroll 1
            for (int i = consumer + max(width, 32); consumer < width && i < kConsumerThreads; i += max(width, 32)) sum.add(sums[i]);
        }
        if (base >= end || offset > 0) continue;
        const int token = (row >= p.heads) + (row >= 2 * p.heads) + (row >= 3 * p.heads), head = row - token * p.heads;
        const float inverse = sum.total > 0.f ? reciprocal(sum.total) : 0.f;
        u16* out = p.out + ((long long)request * p.query_len + token) * p.out_token_stride + head * p.out_head_stride;
#pragma unroll
        for (int k = 0; k < 4; ++k)
            *reinterpret_cast<u32*>(out + item_column(piece, k)) =
                pack_bf16(sum.value[2 * k] * inverse, sum.value[2 * k + 1] * inverse);
    }
}

// Waits until all partial results of the request are stored, and adds up this block's share of the request's items.
__device__ __forceinline__ void merge(const Params& p, const Shared shared, float* buffer, int consumer) {
    const int items = min(kRows, p.query_len * p.heads - (int)blockIdx.y * kRows) * (LATENT / 8);
    const int begin = items * shared.share / shared.shares, end = items * (shared.share + 1) / shared.shares;
    if (consumer == 0) {
        const u32* arrived = p.arrived + blockIdx.y * p.batch + shared.request;
        u32 now;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrived) : "memory");
        } while ((int)(now - shared.target) < 0);
    }
    sync_consumers();
    Sum* sums = reinterpret_cast<Sum*>(buffer);
    merge_items(p, shared.request, shared.first_split, shared.splits, begin, end, sums, consumer);
}

// Writes the output of an empty request, zeros.
__device__ __forceinline__ void store_zeros(const Params& p, int request, int consumer) {
    const int rows = p.query_len * p.heads;
#pragma unroll 1
    for (int i = consumer; i < kRows * (LATENT / 8); i += 256) {
        const int row = blockIdx.y * kRows + i / (LATENT / 8), token = row / p.heads, head = row - token * p.heads;
        u16* out = p.out + ((long long)request * p.query_len + token) * p.out_token_stride + head * p.out_head_stride;
        if (row < rows) *reinterpret_cast<uint4*>(out + (i % (LATENT / 8)) * 8) = make_uint4(0, 0, 0, 0);
    }
}
