// ---- common code of both forms of values --------------------------------------------------------------------------

// Waits for the next tile of warpgroup `from` and returns the stamp of its reference. `done` counts each warpgroup's tiles.
__device__ __forceinline__ u32 wait_for_tile(Fixed& fixed, int from, u32 (&done)[2]) {
    barrier_wait(shared_address(fixed.ready) + 8 * from, (from ? done[1] : done[0]) & 1);
    if (from) ++done[1];
    else ++done[0];
    return *reinterpret_cast<volatile u32*>(&fixed.stamp[from]);
}

// Returns the new reference of values that are relative to `applied`, before a tile is added whose probabilities are relative to
// `published`. Each warpgroup of scores has its own reference, so `published` may be far below `applied`. The result is at most 64
// below `applied`, so that values stay within float32; a tile further below weighs at most 2^(14 - 64) of the values so far.
__device__ __forceinline__ float next_reference(float applied, float published) { return fmaxf(published, applied - 64.f); }

// Returns the first of the two columns of value pair k in item `piece` of a partial result.
__device__ __forceinline__ int item_column(int piece, int k) { return piece * 8 + k * 2; }

// Returns the sum of a row's probabilities relative to `top`, from the sums that attend() left in `exchange`.
__device__ __forceinline__ float total_of(const Fixed& fixed, int row, float top) {
    float total = 0.f;
#pragma unroll
    for (int g = 0; g < 2; ++g) {
        float sum = 0.f;
#pragma unroll
        for (int k = 0; k < 4; ++k) sum += fixed.exchange[g][k][row];
        const float reference = fixed.reference[g][0][row];
        total += sum * (reference == negative_infinity() ? 0.f : exp2_fast(reference - top));
    }
    return total;
}

__device__ __forceinline__ void store_sums(const Params& p, int split, int row, float top, float total, float largest) {
    const int rows = p.query_len * p.heads;
    float* sums = p.partial_sums + 3ll * split * rows + row;
    sums[0] = total > 0.f ? top + log2_fast(total) : negative_infinity();
    sums[rows] = total > 0.f ? largest * reciprocal(total) : 0.f;
}

// Returns the address for a row's columns: in the output, or in the partial result of the split.
__device__ __forceinline__ u16* target_of(const Params& p, int request, int split, int row, bool whole) {
    const int token = (row >= p.heads) + (row >= 2 * p.heads) + (row >= 3 * p.heads), head = row - token * p.heads;
    return whole ? p.out + ((long long)request * p.query_len + token) * p.out_token_stride + head * p.out_head_stride
                 : p.partial_out + ((long long)split * p.query_len * p.heads + row) * LATENT;
}
