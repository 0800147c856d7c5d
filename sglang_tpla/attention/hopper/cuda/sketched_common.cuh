// ---- what both forms of the kernel for sketched rows share --------------------------------------------------------

// Tokens that query row `row` of the block may see.
__device__ __forceinline__ int limit_of(const Params& p, int length, int row) {
    const int at = blockIdx.y * kRows + row;
    const int token = (at >= p.heads) + (at >= 2 * p.heads) + (at >= 3 * p.heads);
    return length - p.query_len + 1 + min(token, p.query_len - 1);
}

// The exponent of the power of two by which a query is multiplied whose largest value has these bits of bfloat16: the largest
// becomes 2^14 to 2^15.
__device__ __forceinline__ u32 query_exponent(u32 largest) { return largest ? min(268 - (int)(largest >> 7), 250) : 127; }

// The sums of a thread that adds up values of 64 query rows.
struct RowSums {
    float o[LATENT / 2];
    float applied[2];                                            // the rows' reference

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < LATENT / 2; ++i) o[i] = 0.f;
        applied[0] = applied[1] = negative_infinity();
    }
};
