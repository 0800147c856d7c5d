// ---- merge --------------------------------------------------------------------------------------------------------

// The request whose merge this block has a share in: at most one, that of the part's last segment.
struct Shared {
    int request, share, shares;
    u32 target;                // value of `arrived` when all partial results are stored
};

// Tells that this block's partial result of `request` is stored. Called by all consumers.
__device__ __forceinline__ u32 announce(const Params& p, int request, int splits, int consumer) {
    sync_consumers();
    if (consumer != 0) return 0;
    __threadfence();                                             // after the barrier: it covers the stores of all consumers
    const u32 before = atomicAdd(p.arrived + blockIdx.y * p.batch + request, 1u);
    return (before / splits + 1) * splits;                       // the counter runs on over the layers of a step
}

// A sum over splits on its way: values scaled to 2^-top, and the sum of weights.
struct Sum {
    float4 value;
    float top, total;

    __device__ __forceinline__ void rescale_to(float new_top) {
        const float factor = top == negative_infinity() ? 0.f : exp2_fast(top - new_top);
        value.x *= factor, value.y *= factor, value.z *= factor, value.w *= factor;
        total *= factor, top = new_top;
    }
    __device__ __forceinline__ void add(const float4& x, float x_top, float weight) {   // top >= x_top
        const float factor = x_top == negative_infinity() ? 0.f : exp2_fast(x_top - top);
        value.x += factor * x.x, value.y += factor * x.y, value.z += factor * x.z, value.w += factor * x.w;
        total += factor * weight;
    }
};

// Adds up items [begin, end), four columns of a row each, in the order of the splits. With `together` (many splits, few
// items) eight warps share an item's splits. Per step a thread has kItems * kBatch loads in flight.
template <int kItems, int kBatch>
__device__ __forceinline__ void merge_items(const Params& p, int request, int first, int splits, int begin, int end,
                                            bool together, Sum* sums, int consumer) {
    constexpr int kItemsPerRow = LATENT / 4;
    const int rows = p.query_len * p.heads, first_row = blockIdx.y * kRows, warp = consumer / 32, lane = consumer % 32;
    const int step = together ? 8 : 1, offset = together ? warp : 0, stride = together ? 32 : 256;
    for (int base = begin + (together ? lane : consumer); base - (together ? lane : consumer) < end; base += stride * kItems) {
        Sum sum[kItems];
#pragma unroll
        for (int q = 0; q < kItems; ++q) sum[q] = {make_float4(0.f, 0.f, 0.f, 0.f), negative_infinity(), 0.f};
        for (int i = offset; i < splits; i += step * kBatch) {
            float4 x[kItems][kBatch];
            float lse[kItems][kBatch];
#pragma unroll
            for (int q = 0; q < kItems; ++q) {
                const int item = base + q * stride, row = first_row + item / kItemsPerRow, column = item % kItemsPerRow * 4;
#pragma unroll
                for (int j = 0; j < kBatch; ++j) {
                    const long long at = (long long)(first + i + j * step) * rows + row;
                    x[q][j] = make_float4(0.f, 0.f, 0.f, 0.f), lse[q][j] = negative_infinity();
                    if (item < end && i + j * step < splits) {
                        lse[q][j] = __ldcg(p.partial_lse + at);
                        x[q][j] = __ldcg(reinterpret_cast<const float4*>(p.partial_out + at * LATENT + column));
                    }
                }
            }
#pragma unroll
            for (int q = 0; q < kItems; ++q) {
                float top = sum[q].top;
#pragma unroll
                for (int j = 0; j < kBatch; ++j) top = fmaxf(top, lse[q][j]);
                sum[q].rescale_to(top);
#pragma unroll
                for (int j = 0; j < kBatch; ++j) sum[q].add(x[q][j], lse[q][j], 1.f);
            }
        }
        if (together) {
            sums[consumer] = sum[0];
            sync_consumers();
            if (warp == 0) {
#pragma unroll
                for (int i = 1; i < 8; ++i) {
                    const Sum other = sums[i * 32 + lane];
                    sum[0].rescale_to(fmaxf(sum[0].top, other.top));
                    sum[0].add(other.value, other.top, other.total);
                }
            }
            sync_consumers();
        }
#pragma unroll
        for (int q = 0; q < kItems; ++q) {
            const int item = base + q * stride, row = first_row + item / kItemsPerRow, column = item % kItemsPerRow * 4;
            if (item >= end || (together && warp > 0)) continue;
            const int token = row / p.heads, head = row - token * p.heads;
            const float inverse = sum[q].total > 0.f ? 1.f / sum[q].total : 0.f;
            const float4 v = sum[q].value;
            u16* out = p.out + ((long long)request * p.query_len + token) * p.out_token_stride + head * p.out_head_stride;
            *reinterpret_cast<uint2*>(out + column) =
                make_uint2(pack_bf16(v.x * inverse, v.y * inverse), pack_bf16(v.z * inverse, v.w * inverse));
        }
    }
}

// Waits until all partial results of the request are stored, and adds up this block's share of its rows.
__device__ __forceinline__ void merge(const Params& p, const Shared shared, float* buffer, int consumer) {
    const int first = p.split_start[shared.request], splits = p.split_start[shared.request + 1] - first;
    const int items = min(kRows, p.query_len * p.heads - (int)blockIdx.y * kRows) * (LATENT / 4);
    const int begin = items * shared.share / shared.shares, end = items * (shared.share + 1) / shared.shares;
    if (consumer % 32 == 0) {
        const u32* arrived = p.arrived + blockIdx.y * p.batch + shared.request;
        u32 now;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrived) : "memory");
        } while ((int)(now - shared.target) < 0);
    }
    __syncwarp();
    Sum* sums = reinterpret_cast<Sum*>(buffer);
    if (splits <= 4) merge_items<4, 4>(p, shared.request, first, splits, begin, end, false, sums, consumer);
    else if (splits <= 8) merge_items<2, 8>(p, shared.request, first, splits, begin, end, false, sums, consumer);
    else merge_items<1, 12>(p, shared.request, first, splits, begin, end, splits > 32, sums, consumer);
}

// An empty request's output.
__device__ __forceinline__ void store_zeros(const Params& p, int request, int consumer) {
    const int rows = p.query_len * p.heads;
    for (int i = consumer; i < kRows * (LATENT / 8); i += 256) {
        const int row = blockIdx.y * kRows + i / (LATENT / 8), token = row / p.heads, head = row - token * p.heads;
        u16* out = p.out + ((long long)request * p.query_len + token) * p.out_token_stride + head * p.out_head_stride;
        if (row < rows) *reinterpret_cast<uint4*>(out + (i % (LATENT / 8)) * 8) = make_uint4(0, 0, 0, 0);
    }
}
