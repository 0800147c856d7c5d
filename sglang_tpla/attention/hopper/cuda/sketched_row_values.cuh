// ---- values, by query rows ----------------------------------------------------------------------------------------
//
// With ROW_VALUES, one warpgroup adds up O [64 query rows, LATENT] from the columns that scores() stored. A thread holds row
// 16 warp + lane / 4 and the row 8 after it: element 4 j + 2 i + e is row i, stored column 8 j + 2 (lane % 4) + e. For even c,
// stored columns 16 s + c and 16 s + 8 + c are columns 16 s + 2 c and 16 s + 2 c + 2 (see store_query_columns()), so a thread
// has four adjacent columns of each step.

using Values = RowSums;

// Adds up a segment's tiles in the warpgroup of values. `done` counts the tiles of each warpgroup of scores over all segments.
__device__ __forceinline__ void gather_values(Fixed& fixed, const Segment& c, u32 (&done)[2], Values& v) {
    const u32 used = shared_address(fixed.used);
    u32 stamp = 0xffffffffu;                                     // no tile's stamp: the first tile sets the reference
    for (int j = 0; j < c.tiles; ++j) {
        const int from = j & 1;
        const u32 now = wait_for_tile(fixed, from, done);
        if (now != stamp) {
            stamp = now;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = c.warp * 16 + c.lane / 4 + 8 * i;
                const float top = row < kRows ? next_reference(v.applied[i], fixed.published[from][row]) : negative_infinity();
                const float factor = v.applied[i] == negative_infinity() ? 0.f : exp2_fast(v.applied[i] - top);
                v.applied[i] = top;
#pragma unroll
                for (int k = 2 * i; k < LATENT / 2; k += 4) v.o[k] *= factor, v.o[k + 1] *= factor;
            }
        }
        const u64 weights = descriptor(c.probability + from * kProbabilityBytes, 16);
        const u64 columns = descriptor(c.values + from * kValueBytes, kPanelBytes);
        pin(v.o);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kTile / 16; ++step)
            wgmma_values(v.o, weights + (step * 32 >> 4), columns + (step * 16 * 128 >> 4));
        wgmma_commit();
        wgmma_wait<0>();
        pin(v.o);
        if (c.lane == 0) barrier_arrive(used + 8 * from);
    }
}

// Writes a segment to the output if it is the whole request, else as a partial result, in which each row is scaled by its largest
// value.
__device__ __forceinline__ void store(const Params& p, Fixed& fixed, const Values& v, int request, int split, bool whole, int warp,
                                      int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float largest = 0.f;
#pragma unroll
        for (int k = 2 * i; k < LATENT / 2; k += 4) largest = fmaxf(largest, fmaxf(fabsf(v.o[k]), fabsf(v.o[k + 1])));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 2));
        const int row = warp * 16 + lane / 4 + 8 * i, global_row = blockIdx.y * kRows + row;
        if (row >= kRows || global_row >= p.query_len * p.heads) continue;
        const float total = total_of(fixed, row, v.applied[i]);
        float scale = total > 0.f ? reciprocal(total) : 0.f;
        if (!whole) {
            scale = largest > 1e-37f ? reciprocal(largest) : 0.f;
            if (lane % 4 == 0) store_sums(p, split, global_row, v.applied[i], total, largest);
        }
        u16* target = target_of(p, request, split, global_row, whole) + 4 * (lane % 4);
        const auto store_columns = [&](const auto& pack) {
#pragma unroll
            for (int step = 0; step < LATENT / 16; ++step) {
                const float* o = v.o + 8 * step + 2 * i;
                *reinterpret_cast<uint2*>(target + 16 * step) =
                    make_uint2(pack(o[0] * scale, o[1] * scale), pack(o[4] * scale, o[5] * scale));
            }
        };
        if (whole) store_columns(pack_bf16);
        else store_columns(pack_half);
    }
}
