// ---- values, turned -----------------------------------------------------------------------------------------------
//
// Without ROW_VALUES, one warpgroup adds up O [64 columns, kRows] for each of kBlocks blocks from the raw rows.

struct Values {
    float o[kBlocks][kPart];                                     // columns 16 warp + lane / 4 * 2 and the next of each block

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
            for (int i = 0; i < kPart; ++i) o[b][i] = 0.f;
    }
};

// Adds V^T P of a tile to O, 32 tokens and a block of 64 columns at a time, 16 columns for each warp. Frees the raw rows.
__device__ __forceinline__ void add_values(const u16 (&ratios)[2][kTile], float (&o)[kBlocks][kPart], const u32 (&stages)[2],
                                           const u32 (&empty)[2], u32 probability, u32 power, int warp, int lane) {
    const u32 rows[2] = {stages[0] + lane * kStride + warp * 16, stages[1] + lane * kStride + warp * 16};
    const u64 weights = descriptor(probability, 16);
    u32 raw[3][4], a[2][8] = {}, ratio[2][4], bias[2][4];
    load_turned4(raw[0], rows[0]);
    load_turned4(raw[1], rows[1 / kBlocks] + 1 % kBlocks * 64);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) pin(o[b]);
#pragma unroll
    for (int at = 0; at < 2 * kBlocks; ++at) {
        const int half = at / kBlocks, block = at % kBlocks, next = at + 2;
        if (kTwoScales && block == 0) {
#pragma unroll
            for (int which = 0; which < 2; ++which)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    ratio[which][i] = *reinterpret_cast<const u32*>(&ratios[which][32 * half + 8 * i + 2 * (lane % 4)]);
                    bias[which][i] = bias_of(ratio[which][i]);
                }
        }
        if (next < 2 * kBlocks) load_turned4(raw[next % 3], rows[next / kBlocks] + next % kBlocks * 64);
        if (at >= 2) {
            wgmma_wait<1>();
            pin(a[at % 2]);
        }
        const bool shared = block * 64 + warp * 16 + lane / 4 * 2 < SHARED;
        // A warp may have no column in the last block; zeros take less power than the bytes there.
        const bool there = LATENT % 64 == 0 || block + 1 < kBlocks || block * 64 + warp * 16 < LATENT;
#pragma unroll
        for (int i = 0; i < 8; ++i) a[at % 2][i] = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {                            // 8 tokens each
            if (!there) break;
            const u32 bytes = raw[at % 3][i];
            u32 first, second;
            if (kTwoScales) {
                const bool of_shared = block * 64 + 64 <= SHARED || (block * 64 < SHARED && shared);
                const u32 scale = of_shared ? ratio[0][i] : ratio[1][i], minus = of_shared ? bias[0][i] : bias[1][i];
                first = scaled_bytes<0, 2>(bytes, scale, minus, power), second = scaled_bytes<1, 3>(bytes, scale, minus, power);
            } else {
                first = half_of_bytes<0, 2>(bytes, power), second = half_of_bytes<1, 3>(bytes, power);
            }
            a[at % 2][i / 2 * 4 + i % 2 * 2] = first, a[at % 2][i / 2 * 4 + i % 2 * 2 + 1] = second;
        }
        if (block + 1 == kBlocks) {                              // the raw rows of this half have been read
            __syncwarp();
            if (lane == 0) barrier_arrive(empty[half]);
        }
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32* r = a[at % 2] + 4 * i;
            wgmma_half(o[block], r[0], r[1], r[2], r[3], weights + ((2 * half + i) * 32 >> 4), 1);
        }
        wgmma_commit();
    }
    wgmma_wait<0>();
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) pin(o[b]);
#pragma unroll
    for (int i = 0; i < 2; ++i) pin(a[i]);
}

// Adds up a segment's tiles in the warpgroup of values. `done` counts the tiles of each warpgroup of scores over all segments.
__device__ __forceinline__ void gather_values(Fixed& fixed, const Segment& c, u32 (&done)[2], Values& v) {
    const u32 empty = shared_address(fixed.empty), used = shared_address(fixed.used);
    const u32 power = load_shared(shared_address(&fixed.constants.power));
    const int column = 2 * (c.lane % 4);
    u32 stamp = 0xffffffffu;                                     // no tile's stamp: the first tile sets the reference
    for (int row = c.warp * 32 + c.lane; row < kRows; row += 128) fixed.applied[row] = negative_infinity();
    Stage first(2 * c.base), second(2 * c.base + 1);
    for (int j = 0; j < c.tiles; ++j, first.advance<2>(), second.advance<2>()) {
        const int from = j & 1;
        const u32 now = wait_for_tile(fixed, from, done);
        if (now != stamp) {
            stamp = now;
            sync_group(2);                                       // `applied` is written
#pragma unroll
            for (int i = 0; i < kRows / 4; ++i) {
                const int row = i / 2 * 8 + column + i % 2;
                const float before = fixed.applied[row], top = next_reference(before, fixed.published[from][row]);
                const float factor = before == negative_infinity() ? 0.f : exp2_fast(before - top);
#pragma unroll
                for (int b = 0; b < kBlocks; ++b)
#pragma unroll
                    for (int k = 0; k < 2; ++k) v.o[b][i / 2 * 4 + 2 * k + i % 2] *= factor;
            }
            sync_group(2);                                       // `applied` has been read
            for (int row = c.warp * 32 + c.lane; row < kRows; row += 128)
                fixed.applied[row] = next_reference(fixed.applied[row], fixed.published[from][row]);
        }
        const u32 stages[2] = {c.ring + first.slot * kStageBytes, c.ring + second.slot * kStageBytes};
        const u32 empties[2] = {empty + 8 * first.slot, empty + 8 * second.slot};
        add_values(fixed.ratio[from], v.o, stages, empties, c.probability + from * kProbabilityBytes, power, c.warp, c.lane);
        if (c.lane == 0) barrier_arrive(used + 8 * from);
    }
}

// Writes a segment to the output if it is the whole request, else as a partial result, in which each row is scaled by its largest
// value. One thread per row computes the row's address and scale: if all threads did, the code would be much longer, and a block,
// which runs it once, would mostly wait for its instructions.
__device__ __forceinline__ void store(const Params& p, Fixed& fixed, const Values& v, int request, int split, bool whole, int warp,
                                      int lane) {
    const int first_column = warp * 16 + lane / 4 * 2;
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
        float x = 0.f;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
            if (b * 64 + first_column < LATENT)
                x = fmaxf(x, fmaxf(fabsf(v.o[b][i / 2 * 4 + i % 2]), fabsf(v.o[b][i / 2 * 4 + 2 + i % 2])));
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 4));
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 8));
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 16));
        if (lane < 4) fixed.largest_values(warp)[i / 2 * 8 + 2 * lane + i % 2] = x;
    }
    sync_group(2);
    for (int row = warp * 32 + lane; row < kRows; row += 128) {
        const int global_row = blockIdx.y * kRows + row;
        const float top = fixed.applied[row], total = total_of(fixed, row, top);
        float largest = 0.f;
#pragma unroll
        for (int k = 0; k < 4; ++k) largest = fmaxf(largest, fixed.largest_values(k)[row]);
        const bool there = global_row < p.query_len * p.heads;
        if (!whole && there) store_sums(p, split, global_row, top, total, largest);
        fixed.applied[row] = whole ? (total > 0.f ? reciprocal(total) : 0.f) : largest > 1e-37f ? reciprocal(largest) : 0.f;
        fixed.target[row] = there ? target_of(p, request, split, global_row, whole) : nullptr;
    }
    sync_group(2);
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
        const int row = i / 2 * 8 + 2 * (lane % 4) + i % 2;
        u16* target = fixed.target[row];
        const float scale = fixed.applied[row];
        if (!target) continue;
        const auto store_columns = [&](const auto& pack) {
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
                const int at = b * 64 + first_column;
                if (at >= LATENT) continue;
                const float* o = v.o[b] + i / 2 * 4 + i % 2;
                *reinterpret_cast<u32*>(target + at) = pack(o[0] * scale, o[2] * scale);
            }
        };
        if (whole) store_columns(pack_bf16);
        else store_columns(pack_half);
    }
}
