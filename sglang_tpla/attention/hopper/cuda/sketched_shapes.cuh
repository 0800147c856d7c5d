// Paged decode attention over sketched rows for Hopper (sm_90a). A row, see cache_rows/sketched.py, is
//     [ shared bytes | own bytes | 128 to LATENT | rotary key | sketch of the other groups' columns | 4 scales ]
// whose fields all take part in the scores, and whose [shared | own] are also the values:
//     p = softmax(scale * (q_latent . [own, sketch] + q_rope . k_rope)),  out = p [own]
//
// Tokens stand in the rows of the scores' product, query rows (token, head) in its columns: a warpgroup multiplies 64 tokens
// by ROWS query rows, so few heads cost little. Codes go from the raw row straight into the registers that wgmma takes its
// left operand from:
//     scores  S [64 tokens, ROWS] = K [64, columns] Q^T            left: codes as float16 from registers
// For the values there are two forms. Up to 288 wide (ROW_VALUES), the warps that unpack a tile for its scores also store its
// 8-bit columns to shared memory, and a warpgroup that unpacks nothing multiplies them:
//     values  O [ROWS, columns]  += P [64, 64 tokens] V            both from shared memory
// Wider sums do not fit that warpgroup's registers; there it unpacks the raw rows again, turned, for
//     values  O [64 columns, ROWS] += V^T [64, 64 tokens] P        left: codes, turned by ldmatrix.trans, from registers
//
// A code becomes float16 by standing in the mantissa of a power of two, which has to be subtracted: from the codes, or, where a
// sum has codes of one kind, from the sum. Every code is exact in float16. The sketch has a sum of its own, which its scale
// multiplies in float32; with up to 32 query rows (kSplit) so has the rotary key. Where bytes of two scales, or bytes and key,
// share a sum, their scales come in as factors of at most 1 relative to a power of two that the sum is multiplied by.
// Probabilities are weighted by the factor that is left to the values: such a power of two, or the only scale.
//
// A block is a warpgroup that copies raw rows into a ring of half tiles, two that compute scores and probabilities of alternate
// tiles, and one that adds up values of all tiles. Plan, parts and merging are those of latent_decode.cu.
//
// Compiled with the macros of sketched.py's SketchedVariant; wgmma_half and wgmma_bf16 come from wgmma.py.

constexpr int kTile = 64;                                   // tokens a tile
constexpr int kHalf = kTile / 2;                            // tokens a stage of the ring
constexpr int kRows = ROWS;                                 // query rows a block
constexpr int kPart = kRows / 2;                            // accumulators a thread has of 64 x ROWS
constexpr bool kSplit = kRows <= 32;
constexpr bool kTwoScales = SHARED > 0 && OWN > 0;
// Shared and own columns have a sum each where a step holds one kind and the values need no scaled codes.
constexpr bool kApart = kSplit && kTwoScales && !ROW_VALUES && SHARED % 16 == 0;
constexpr bool kScaleCodes = !kSplit || (kTwoScales && !kApart);             // whether codes are multiplied by their scale's factor
// Whose codes keep what makes float16 of them: their sums begin with the query times that, negative.
constexpr bool kSketchAbove = SKETCH > 0, kRopeAbove = kSplit && ROPE_BITS == 8;
constexpr bool kBytesAbove = kSplit && !ROW_VALUES && !kScaleCodes;             // values by query rows take what scores unpacked
// Columns are unpacked 32 at a time (a group), and multiplied 16 at a time (a step): sketch, rotary key, 8-bit codes.
constexpr int kOwnSteps = LATENT / 16, kOwnGroups = (kOwnSteps + 1) / 2;
constexpr int kSketchGroups = (SKETCH + 31) / 32;           // codes behind the last meet a query of zeros
constexpr int kRopeGroups = ROPE / 32;
constexpr int kOwnGroup = kSketchGroups + kRopeGroups;      // the first group of 8-bit codes
constexpr int kGroups = kOwnGroup + kOwnGroups;
constexpr int kRopeStep = 2 * kSketchGroups, kOwnStep = kRopeStep + 2 * kRopeGroups, kSteps = kOwnStep + kOwnSteps;
// What sums begin with: of sketch, rotary key, and one or two kinds of bytes.
constexpr int kSketchStart = 0, kRopeStart = kSketchStart + kSketchAbove, kBytesStart = kRopeStart + kRopeAbove;
constexpr int kOwnStart = kBytesStart + kBytesAbove, kStarts = kOwnStart + (kBytesAbove && kApart);
constexpr int kPanelBytes = kTile * 128;                    // 64 columns of a tile's values
constexpr int kQPanelBytes = kRows * 128;                   // 64 columns of the query
constexpr int kQBytes = (kSteps + 3) / 4 * kQPanelBytes > 10240 ? (kSteps + 3) / 4 * kQPanelBytes : 10240;
// A tile's probabilities, [query row][token] in float16. As a left operand they have 64 rows.
constexpr int kProbabilityBytes = (ROW_VALUES ? 64 : kRows) * 128;
constexpr int kRopeOffset = LATENT, kSketchOffset = LATENT + ROPE * ROPE_BITS / 8;
// An odd number of 16-byte pieces: then the eight rows of a matrix that ldmatrix reads lie in different banks.
constexpr int kStride = ROW_BYTES / 16 % 2 ? ROW_BYTES : ROW_BYTES + 16;
constexpr int kStageBytes = kHalf * kStride;
constexpr int kBlocks = (LATENT + 63) / 64;                 // blocks of 64 value columns
constexpr int kValueBytes = ROW_VALUES ? kBlocks * kPanelBytes : 0;             // of a tile
constexpr int kRingOffset = kQBytes + 2 * kProbabilityBytes + 2 * kValueBytes;  // in dynamic shared memory
constexpr int kScaleColumn = kBlocks * 64;                  // all columns of a partial result share a row's scale
constexpr int kConsumerThreads = 256;                       // the threads that compute scores, and merge
constexpr int kAllThreads = kConsumerThreads + 128;
static_assert(LATENT % 16 == 0 && ROPE % 32 == 0 && ROW_BYTES % 16 == 0 && SKETCH % 8 == 0, "pieces of 16 bytes");
static_assert(SHARED % 4 == 0 && kRows % 16 == 0 && kRows <= 64 && STAGES >= 4, "sizes the registers allow");
