typedef unsigned char u8;

struct Params {
    const u16* q_latent;       // [batch * query_len, heads, LATENT + SKETCH]
    const u16* q_rope;         // [batch * query_len, heads, ROPE]
    const u8* kv;              // [slots, ROW_BYTES]
    u16* out;                  // [batch * query_len, heads, LATENT]
    u16* partial_out;          // [splits, query_len * heads, LATENT] float16 of values / scale
    float* partial_sums;       // [splits, 3, query_len * heads]: log-sum-exp (base 2), scale of the columns before
                               // kScaleColumn, scale of the others
    const int* lengths;        // [batch]
    const int* page_indices;
    const int* page_starts;    // [batch]
    const int* part_begin;     // as in shapes.cuh
    const int* split_start;    // [batch + 1]
    u32* arrived;              // [row blocks, batch]
    long long q_latent_token_stride, q_latent_head_stride, q_rope_token_stride, q_rope_head_stride;
    long long out_token_stride, out_head_stride, kv_stride;
    int heads, query_len, page_bits, batch;
    float scale_log2;
};
