// Paged decode attention over sketched rows for Hopper (sm_90a). A row (see cache_rows/sketched.py) is
//     [ shared bytes | own bytes | 128 to LATENT | rotary key | sketch of the other groups' columns | 4 scales ]
// All fields contribute to the scores, and [shared | own] are also the values:
//     p = softmax(scale * (q_latent . [own, sketch] + q_rope . k_rope)),  out = p [own]
//
// The rows of the scores' product are tokens and its columns are query rows (token, head). A warpgroup multiplies 64 tokens by
// ROWS query rows, so few heads cost little. Codes go from the raw row straight into the registers of wgmma's left operand:
//     scores  S [64 tokens, ROWS] = K [64, columns] Q^T            left: codes as float16 from registers
// The values have two forms. With up to 288 columns and more than 32 query rows (ROW_VALUES), the warps that unpack a tile for its
// scores also store its 8-bit columns to shared memory, and a warpgroup that unpacks nothing multiplies them:
//     values  O [ROWS, columns]  += P [64, 64 tokens] V            both from shared memory
// Otherwise that warpgroup, whose registers cannot hold wider sums, unpacks the raw rows a second time, turned (transposed):
//     values  O [64 columns, ROWS] += V^T [64, 64 tokens] P        left: codes, turned by ldmatrix.trans, from registers
//
// A code becomes float16 when its bits are put into the mantissa of a power of two. The power is subtracted from the codes or, if
// a sum has codes of one kind only, from the sum. Every code is exact in float16. The sketch has a separate sum, which its
// scale multiplies in float32; with up to 32 query rows (kSplit), the rotary key has one too. If bytes of two scales, or bytes and
// the key, share a sum, each scale becomes a factor of at most 1 relative to a power of two, which multiplies the sum.
// Probabilities are weighted by the factor that the values lack: that power of two, or the only scale.
//
// A block has one warpgroup that copies raw rows into a ring of half tiles, two that compute the scores and probabilities of
// alternate tiles, and one that adds up the values of all tiles. Plan, parts and merging are those of latent_decode.cu.
//
// Compiled with the macros of sketched.py's SketchedVariant; wgmma_half and wgmma_bf16 come from wgmma.py.

constexpr int kTile = 64;                                   // tokens a tile
constexpr int kHalf = kTile / 2;                            // tokens a stage of the ring
constexpr int kRows = ROWS;                                 // query rows a block
constexpr int kPart = kRows / 2;                            // a thread's accumulators of a product 64 x ROWS
constexpr bool kSplit = kRows <= 32;
constexpr bool kTwoScales = SHARED > 0 && OWN > 0;
// Shared and own columns have separate sums if each step holds only one kind and the values need no scaled codes.
constexpr bool kApart = kSplit && kTwoScales && !ROW_VALUES && SHARED % 16 == 0;
constexpr bool kScaleCodes = !kSplit || (kTwoScales && !kApart);             // multiply codes by their scale's factor
// Fields whose codes keep the power of two that makes them float16: their sums begin with minus the query times that power.
constexpr bool kSketchAbove = SKETCH > 0, kRopeAbove = kSplit && ROPE_BITS == 8;
constexpr bool kBytesAbove = kSplit && !ROW_VALUES && !kScaleCodes;             // ROW_VALUES reads the codes of the scores
// Columns are unpacked 32 at a time (a group) and multiplied 16 at a time (a step), first the sketch, then key and 8-bit codes.
constexpr int kOwnSteps = LATENT / 16, kOwnGroups = (kOwnSteps + 1) / 2;
constexpr int kSketchGroups = (SKETCH + 31) / 32;           // the query is zero behind the last code
constexpr int kRopeGroups = ROPE / 32;
constexpr int kOwnGroup = kSketchGroups + kRopeGroups;      // the first group of 8-bit codes
constexpr int kGroups = kOwnGroup + kOwnGroups;
constexpr int kRopeStep = 2 * kSketchGroups, kOwnStep = kRopeStep + 2 * kRopeGroups, kSteps = kOwnStep + kOwnSteps;
// Indices of the numbers that sums begin with: for the sketch, the rotary key, and one or two kinds of bytes.
constexpr int kSketchStart = 0, kRopeStart = kSketchStart + kSketchAbove, kBytesStart = kRopeStart + kRopeAbove;
constexpr int kOwnStart = kBytesStart + kBytesAbove, kStarts = kOwnStart + (kBytesAbove && kApart);
constexpr int kPanelBytes = kTile * 128;                    // 64 columns of a tile's values
constexpr int kQPanelBytes = kRows * 128;                   // 64 columns of the query
constexpr int kQBytes = (kSteps + 3) / 4 * kQPanelBytes > 10240 ? (kSteps + 3) / 4 * kQPanelBytes : 10240;
// A tile's probabilities, [query row][token] in float16. As a left operand they have 64 rows.
constexpr int kProbabilityBytes = (ROW_VALUES ? 64 : kRows) * 128;
constexpr int kRopeOffset = LATENT, kSketchOffset = LATENT + ROPE * ROPE_BITS / 8;
// A stride of an odd number of 16-byte pieces puts the eight rows of a matrix that ldmatrix reads into different banks.
constexpr int kStride = ROW_BYTES / 16 % 2 ? ROW_BYTES : ROW_BYTES + 16;
constexpr int kStageBytes = kHalf * kStride;
constexpr int kBlocks = (LATENT + 63) / 64;                 // blocks of 64 value columns
constexpr int kValueBytes = ROW_VALUES ? kBlocks * kPanelBytes : 0;             // of a tile
constexpr int kRingOffset = kQBytes + 2 * kProbabilityBytes + 2 * kValueBytes;  // in dynamic shared memory
constexpr int kScaleColumn = kBlocks * 64;                  // all columns of a partial result share a row's scale
constexpr int kConsumerThreads = 256;                       // the threads that compute scores and merge
constexpr int kAllThreads = kConsumerThreads + 128;
static_assert(LATENT % 16 == 0 && ROPE % 32 == 0 && ROW_BYTES % 16 == 0 && SKETCH % 8 == 0, "pieces of 16 bytes");
static_assert(SHARED % 4 == 0 && kRows % 16 == 0 && kRows <= 64 && STAGES >= 4, "sizes the registers allow");
