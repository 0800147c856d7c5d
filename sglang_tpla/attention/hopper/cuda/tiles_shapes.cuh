// The form of sketched_decode.cu's kernel for many query rows on wide values: it unpacks every code once, to shared memory.
// sketched_shapes.cuh describes a row. A block serves 64 query rows (token, head). Its warpgroups are a pipeline over tiles of
// 64 tokens:
//     fill    (2)  raw rows to unpacked columns in shared memory, float16 (a rotary key of 16 bits stays bfloat16)
//     scores  (1)  S [64 query rows, 64 tokens] = Q K^T, softmax, probabilities P to shared memory
//     values  (1)  O [64 query rows, LATENT] += P V
// Both products read a column in place. The columns that only scores need (rotary key, sketch: "keys") and those that are
// also values have separate barriers, because the keys are free again earlier.
//
// Within a token, scales differ between fields: codes are multiplied by their scale relative to a power of two (`power`) that
// eight neighbouring tokens share; the power multiplies their scores, and weights their probabilities for the values. The
// smaller of two of these tokens keeps all its bits down to 2^-19 of the larger.
//
// Columns are stored in chunks of 8, in an order that lets eight neighbouring lanes, each unpacking 16 bytes of a row, store
// without bank conflicts: see Chunks. Query and output follow that order.
//
// Plan, parts and merging are those of latent_decode.cu. The file is compiled with the macros of sketched_tiles.py's
// TiledVariant.

constexpr int kTile = 64;                                   // tokens a tile
constexpr int kRows = 64;                                   // query rows a block
constexpr int kStages = 2;                                  // unpacked tiles
constexpr int kPanelBytes = kTile * 128;                    // 64 columns of a tile, swizzled for wgmma
constexpr int kQPanelBytes = kRows * 128;                   // 64 columns of the query
constexpr int kProbabilityBytes = 64 * 128;                 // a tile's probabilities, [query row][token] in float16

// The chunks of one field. A lane unpacks a piece at a time: kPerPiece chunks, or kLast for the last piece. Up to eight
// neighbouring whole pieces store their first chunks first, then their second chunks, and so on.
template <int kPieces, int kPerPiece, int kLast = kPerPiece> struct Chunks {
    static constexpr int kWhole = kLast == kPerPiece ? kPieces : kPieces - 1;
    static constexpr int kCount = kPieces > 0 ? (kPieces - 1) * kPerPiece + kLast : 0, kGroups = (kPieces + 7) / 8;
    // The pieces and the whole pieces of a group.
    __host__ __device__ static constexpr int pieces(int group) { return group * 8 + 8 <= kPieces ? 8 : kPieces - group * 8; }
    __host__ __device__ static constexpr int whole(int group) { return group * 8 + 8 <= kWhole ? 8 : kWhole - group * 8; }
    // The place of chunk `k` of the first piece of group `group`; those of the other pieces follow.
    __host__ __device__ static constexpr int place(int group, int k) { return group * 8 * kPerPiece + k * whole(group); }
    // The first column of the chunk at `place`.
    __host__ __device__ static constexpr int column(int place) {
        if (place >= kWhole * kPerPiece) return place * 8;
        const int group = place / (8 * kPerPiece), rest = place % (8 * kPerPiece), n = whole(group);
        return ((group * 8 + rest % n) * kPerPiece + rest / n) * 8;
    }
};
using RopeChunks = Chunks<ROPE * ROPE_BITS / 128, 16 / ROPE_BITS>;
// Codes beyond the last are multiplied by a query of zeros.
using SketchChunks = Chunks<(SKETCH + 31) / 32, 4, SKETCH % 32 != 0 && SKETCH % 32 <= 16 ? 2 : 4>;
using OwnChunks = Chunks<LATENT / 16, 2>;                   // shared and own columns
constexpr int kKeyChunks = RopeChunks::kCount + SketchChunks::kCount;
// A step multiplies 16 columns; the steps of keys come first, then those of values.
constexpr int kRopeSteps = ROPE / 16, kOwnStep = kKeyChunks / 2, kSteps = kOwnStep + LATENT / 16;
// A stage of the ring holds first the chunks of values, then those of keys.
constexpr int kStageBytes = (OwnChunks::kCount + kKeyChunks + 7) / 8 * kPanelBytes;
// The first QUERY_STEPS steps have their query in registers, the others in shared memory.
constexpr int kQBytes = (kSteps - QUERY_STEPS + 3) / 4 * kQPanelBytes;
constexpr int kRopeOffset = LATENT, kSketchOffset = LATENT + ROPE * ROPE_BITS / 8;
constexpr int kProbabilityOffset = kQBytes, kRingOffset = kProbabilityOffset + kProbabilityBytes;
// Raw rows in flight: eight for each warp that unpacks.
constexpr int kFillWarps = 8, kRawOffset = kRingOffset + kStages * kStageBytes, kRawBytes = 8 * ROW_BYTES;
constexpr int kFixedOffset = kRawOffset + kFillWarps * kRawBytes;

constexpr int kConsumerThreads = 256;                       // threads of scores and of values, which also merge
constexpr int kThreads = 2 * kConsumerThreads;
constexpr int kScaleColumn = LATENT;                        // all columns of a partial result share a row's scale
static_assert(LATENT % 16 == 0 && ROPE % 32 == 0 && ROW_BYTES % 16 == 0 && SKETCH % 8 == 0 && SHARED % 4 == 0, "whole pieces");
static_assert(QUERY_STEPS > 0 && QUERY_STEPS <= kSteps && ROPE == 64, "as sketched_tiles.py chooses");

// The power that eight tokens of a tile share, with its logarithm and its inverse; the scores need them.
struct alignas(16) Eight {
    float power, weight_log2, inverse, unused;
};

// The shared memory behind the rings.
struct alignas(16) Fixed {
    u64 keys_full[kStages], keys_empty[kStages], values_full[kStages], values_empty[kStages];
    u64 ready, used;                                        // a tile's probabilities
    Constants constants;
    Shared merge;
    u32 largest;
    u32 stamp[4];                                           // of each warp's references
    alignas(16) Eight eights[kStages][kTile / 8];
    float published[kRows];                                 // the rows' references, written when the stamp changes
    float total[kRows];                                     // a segment's sums of probabilities
    u8 columns[2 * kSteps];                                 // for each chunk, an eighth of the first query column that it meets
};

// A warpgroup's position in the ring of tiles, and the phase of its barriers.
struct Stage {
    u32 slot = 0, phase = 0;
    __device__ __forceinline__ void next() {
        if (++slot == kStages) slot = 0, phase ^= 1;
    }
};
