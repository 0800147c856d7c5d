// Paged latent decode attention for Hopper (sm_90a).
//
// One query row is one (query token, head); a row's key is [latent | rope], its value the latent part:
//     p = softmax(scale * (q_latent . z + q_rope . k_rope)),  out = p z           (TPLA, arXiv 2508.15881, eq. 10)
//
// A block has three warpgroups: warpgroup 0 gathers cache rows with cp.async into a ring of tiles (64 tokens each,
// panels of 64 columns in the 128-byte swizzle that wgmma reads); warpgroups 1 and 2 compute, and divide the work
// by the compile-time MODE:
//     MODE_TOKENS  up to 64 rows: they take alternate tiles and add up through shared memory at the end;
//     MODE_ROWS    up to 128 rows: each has 64 rows of every tile; they take turns at the tensor cores (turns.cuh);
//     MODE_WIDTH   latent wider than 256: each has half of the value columns and computes all scores.
// The grid is persistent: block x runs part x of the plan (see plan.py), so the grid's size never depends on the lengths.
// A request that lies in several parts is merged at the end by the blocks that hold it: each block waits until all have
// stored their partial results, then adds up its share of the rows in the order of the splits. This needs all blocks
// resident at once, so the grid never has more blocks than the GPU has multiprocessors.
//
// Compiled with -DLATENT -DROPE -DMODE -DSTAGES (decode.py); wgmma_ss_64, wgmma_rs_64 and wgmma_rs come from wgmma.py.

constexpr int kTile = 64;                                   // tokens a tile
constexpr int kWidth = LATENT + ROPE;                       // columns of a cache row
constexpr int kPanels = (kWidth + 63) / 64;
constexpr int kValuePanels = (LATENT + 63) / 64;
constexpr int kRows = MODE == MODE_ROWS ? 128 : 64;         // query rows a block
constexpr int kOutPanels = MODE == MODE_WIDTH ? (kValuePanels + 1) / 2 : kValuePanels;
constexpr int kOut = kOutPanels * 32;                       // fp32 accumulators a thread
// Each warpgroup scales the columns that it stores; the second warpgroup stores those from this column on.
constexpr int kScaleColumn = MODE == MODE_TOKENS ? kOutPanels * 32 : MODE == MODE_WIDTH ? kOutPanels * 64 : LATENT;
constexpr int kPanelBytes = kTile * 128;
constexpr int kQPanelBytes = kRows * 128;
constexpr int kStageBytes = kPanels * kPanelBytes;
// MODE_ROWS keeps the rotary part of the query in registers: shared memory then holds one more tile, and is read less.
constexpr int kRegisterSteps = MODE == MODE_ROWS ? ROPE / 16 : 0;
constexpr int kQWidth = kWidth - kRegisterSteps * 16;        // query columns in shared memory
constexpr int kQPanels = (kQWidth + 63) / 64;
constexpr int kQBytes = kQPanels * kQPanelBytes;
constexpr int kSteps = kWidth / 16;                         // wgmma steps of the scores
constexpr int kProducerThreads = 128, kConsumerThreads = 256;
constexpr int kChunkTiles = MODE == MODE_ROWS ? 4 : 8;      // tiles whose slots are looked up together
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kWidth % 32 == 0 && LATENT % 32 == 0, "widths are multiples of 32");
static_assert(kOutPanels == OUT_COLUMNS / 64, "wgmma_rs was generated for another width");

struct Params {
    const u16* q_latent;       // [batch * query_len, heads, LATENT]
    const u16* q_rope;         // [batch * query_len, heads, ROPE]
    const u16* kv;             // [slots, LATENT + ROPE]
    u16* out;                  // [batch * query_len, heads, LATENT]
    u16* partial_out;          // [splits, query_len * heads, LATENT] float16 of values / scale; store_partial() has their order
    float* partial_sums;       // [splits, 3, query_len * heads]: log-sum-exp (base 2), scale of the columns before
                               // kScaleColumn, scale of the others
    const int* lengths;        // [batch]
    const int* page_indices;
    const int* page_starts;    // [batch]
    const int* part_begin;     // [parts + 1, 8]: request, tile, segments of that request before this part; its length, its
                               // entry of page_starts (spares a round trip to memory at the start); 3 unused
    const int* split_start;    // [batch + 1]
    u32* arrived;              // [row blocks, batch]: partial results stored since the plan was made
    long long q_latent_token_stride, q_latent_head_stride, q_rope_token_stride, q_rope_head_stride;
    long long out_token_stride, out_head_stride, kv_stride;
    int heads, query_len, page_bits, batch;
    float scale_log2;
};
