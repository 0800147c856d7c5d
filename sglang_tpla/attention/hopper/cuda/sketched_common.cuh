// ---- common code of both forms of the kernel for sketched rows ----------------------------------------------------

// Returns the number of tokens that query row `row` of the block may see.
__device__ __forceinline__ int limit_of(const Params& p, int length, int row) {
    const int at = blockIdx.y * kRows + row;
    const int token = (at >= p.heads) + (at >= 2 * p.heads) + (at >= 3 * p.heads);
    return length - p.query_len + 1 + min(token, p.query_len - 1);
}

// Returns the biased exponent of the power of two that a query is multiplied by. The query's largest value, given as the bits of a
// bfloat16, becomes 2^14 to 2^15.
__device__ __forceinline__ u32 query_exponent(u32 largest) { return largest ? min(268 - (int)(largest >> 7), 250) : 127; }

// The sums of one of the 128 threads that add up the values of 64 query rows.
struct RowSums {
    float o[LATENT / 2];
    float applied[2];                                            // the references of the thread's two rows

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < LATENT / 2; ++i) o[i] = 0.f;
        applied[0] = applied[1] = negative_infinity();
    }
};
