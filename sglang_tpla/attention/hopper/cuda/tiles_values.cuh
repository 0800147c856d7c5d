// ---- values -------------------------------------------------------------------------------------------------------
//
// One warpgroup computes values. Of O [64 query rows, LATENT] a thread holds rows 16 warp + lane / 4 and 8 further on: element
// 4 j + 2 i + e is row i, column 2 (lane % 4) + e of chunk j.

using Values = RowSums;

// Adds up the values of all tiles of a segment. `done` counts tiles.
__device__ __forceinline__ void gather_values(Fixed& fixed, const Segment& c, const Memory& memory, Stage& at, u32& done,
                                              Values& v) {
    u32 stamp = 0;                                               // no tile has 0, so the first tile sets the values' reference
#pragma unroll 1
    for (int j = 0; j < c.tiles; ++j) {
        barrier_wait(shared_address(fixed.values_full + at.slot), at.phase);
        barrier_wait(shared_address(&fixed.ready), done++ & 1);
        const u32 now = *reinterpret_cast<volatile u32*>(&fixed.stamp[c.warp]);
        if (now != stamp) {
            stamp = now;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float top = fixed.published[c.warp * 16 + c.lane / 4 + 8 * i];
                const float factor = v.applied[i] == negative_infinity() ? 0.f : exp2_fast(v.applied[i] - top);
                v.applied[i] = top;
#pragma unroll
                for (int k = 2 * i; k < LATENT / 2; k += 4) v.o[k] *= factor, v.o[k + 1] *= factor;
            }
        }
        const u64 weights = descriptor(memory.probability, 16);
        const u64 columns = descriptor(memory.ring + at.slot * kStageBytes, kPanelBytes);
        pin(v.o);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kTile / 16; ++step)
            wgmma_values(v.o, weights + (step * 32 >> 4), columns + (step * 16 * 128 >> 4));
        wgmma_commit();
        wgmma_wait<0>();
        pin(v.o);
        __syncwarp();                                            // all lanes have read `stamp` and `published`
        if (c.lane == 0) {
            barrier_arrive(shared_address(&fixed.used));
            barrier_arrive(shared_address(fixed.values_empty + at.slot));
        }
        at.next();
    }
}

// Writes a segment to the output if it is the whole request, and otherwise as a partial result, in which each row is scaled by
// its largest value.
__device__ __forceinline__ void store(const Params& p, const Fixed& fixed, const Values& v, int request, int split, bool whole,
                                      const Segment& c) {
    const int rows = p.query_len * p.heads;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float largest = 0.f;
#pragma unroll
        for (int j = 0; j < LATENT / 8; ++j)
            largest = fmaxf(largest, fmaxf(fabsf(v.o[4 * j + 2 * i]), fabsf(v.o[4 * j + 2 * i + 1])));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 2));
        const int my_row = c.warp * 16 + c.lane / 4 + 8 * i, row = blockIdx.y * kRows + my_row;
        if (row >= rows) continue;
        const float total = fixed.total[my_row];
        float scale = total > 0.f ? 1.f / total : 0.f;
        const int token = row / p.heads, head = row - token * p.heads;
        u16* target = p.out + ((long long)request * p.query_len + token) * p.out_token_stride + head * p.out_head_stride;
        if (!whole) {
            scale = largest > 1e-37f ? 1.f / largest : 0.f;
            target = p.partial_out + ((long long)split * rows + row) * LATENT;
            if (c.lane % 4 == 0) {
                float* sums = p.partial_sums + 3ll * split * rows + row;
                sums[0] = total > 0.f ? v.applied[i] + log2_fast(total) : negative_infinity();
                sums[rows] = total > 0.f ? largest / total : 0.f;
            }
        }
        target += 2 * (c.lane % 4);
#pragma unroll
        for (int j = 0; j < LATENT / 8; ++j) {
            const float x = v.o[4 * j + 2 * i] * scale, y = v.o[4 * j + 2 * i + 1] * scale;
            // Volatile stores stay in order, so that few results occupy registers at once.
            const u32 pair = whole ? pack_bf16(x, y) : pack_half(x, y);
            asm volatile("st.global.u32 [%0], %1;" ::"l"(target + OwnChunks::column(j)), "r"(pair) : "memory");
        }
    }
}

// The first of the two columns that value pair k of item `piece` of a partial result holds.
__device__ __forceinline__ int item_column(int piece, int k) { return piece * 8 + k * 2; }
