// ---- scales -------------------------------------------------------------------------------------------------------

// A token's scales relative to the power of its eight tokens, each twice in a register.
struct Factors {
    u32 shared, own, sketch, rope;                          // float16; rope: bfloat16 where the key is
};

// The largest of a row's bfloat16 scales. The sketch's scale counts 1/16, because levels are smaller than bytes.
__device__ __forceinline__ float largest_scale(uint2 raw) {
    float largest = 0.f;
    if (SHARED > 0) largest = fmaxf(largest, __uint_as_float(raw.x << 16));
    if (OWN > 0) largest = fmaxf(largest, __uint_as_float(raw.x & 0xFFFF0000u));
    if (SKETCH > 0) largest = fmaxf(largest, __uint_as_float(raw.y << 16) * 0.0625f);
    if (ROPE_BITS == 8) largest = fmaxf(largest, __uint_as_float(raw.y & 0xFFFF0000u));
    return largest;
}

// The bits of the power of two that brings the largest scale to between 2^4 and 2^5: 1152 times that is below 2^16.
__device__ __forceinline__ u32 power_of(float largest) {
    return min(max(__float_as_uint(largest) & 0x7F800000u, 0x06000000u), 0x7E000000u) - (4u << 23);
}

__device__ __forceinline__ Factors factors_of(uint2 raw, float inverse) {
    const float shared = __uint_as_float(raw.x << 16) * inverse, own = __uint_as_float(raw.x & 0xFFFF0000u) * inverse;
    const float sketch = __uint_as_float(raw.y << 16) * inverse, rope = __uint_as_float(raw.y & 0xFFFF0000u) * inverse;
    return {pack_half(shared, shared), pack_half(own, own), pack_half(sketch, sketch),
            ROPE_BITS == 8 ? pack_half(rope, rope) : pack_bf16(inverse, inverse)};
}

// ---- fill: raw rows to unpacked tiles -----------------------------------------------------------------------------
//
// A warp unpacks eight rows of each tile, as two quads of four. Eight lanes take one piece each of a row, so that a memory request
// covers up to 128 adjacent bytes. Raw rows wait in the warp's part of shared memory: as soon as a tile's keys have been unpacked,
// the next tile's keys are copied in their place, and the values likewise. gather.cuh says when rows may be read.

constexpr int kQuads = 2, kWarpRows = kTile / kFillWarps;

// Walks the tiles of all segments. The lanes of a warp together look up the slots of the warp's rows in kTogether tiles.
struct Walk {
    static constexpr int kTogether = 32 / kWarpRows;
    Segments s;
    int tile, end;                                               // `tile` is the first of the tiles looked up last
    int page, token;                                             // those of the lane's row; the token is -1 beyond the last

    __device__ __forceinline__ explicit Walk(const Params& p) : s(p), tile(s.first_tile), end(0) { settle(); }
    __device__ __forceinline__ void settle() {
        for (; s.more(); s.next(), tile = 0) {
            end = s.end_tile();
            if (tile < end) break;
        }
    }
    __device__ __forceinline__ void look_up(const Params& p, int warp, int lane) {
        token = (tile + lane / kWarpRows) * kTile + warp * kWarpRows + lane % kWarpRows;
        if (!s.more() || token >= s.length) token = -1;
        // The slot is computed from the page when it is needed; computing it here would wait for the load.
        page = token < 0 ? 0 : __ldcg(p.page_indices + s.start + (token >> p.page_bits));
    }
    __device__ __forceinline__ int slot(const Params& p) const {
        return token < 0 ? -1 : page << p.page_bits | (token & ((1 << p.page_bits) - 1));
    }
    // The number of tiles that were looked up: 0 at the end.
    __device__ __forceinline__ int count() const { return s.more() ? min(end - tile, kTogether) : 0; }
    // Whether these tiles have rows of this step's own tokens.
    __device__ __forceinline__ bool newest(const Params& p) const { return (tile + kTogether) * kTile > s.length - p.query_len; }
    __device__ __forceinline__ void next() {
        if ((tile += kTogether) < end) return;
        s.next(), tile = 0;
        settle();
    }
};

__device__ __forceinline__ void copy_piece(u32 target, const u8* source, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "l"(policy) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until the older of this lane's two groups of copies (a tile's keys, a tile's values) has completed.
__device__ __forceinline__ void wait_for_oldest_copies() {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncwarp();
}
// Copies pieces [kFirst, kEnd) of a row with eight lanes; a lane's first piece is at `target` and `source`.
template <int kFirst, int kEnd> __device__ __forceinline__ void copy_pieces(u32 target, const u8* source, int piece, u64 policy) {
#pragma unroll
    for (int i = kFirst; i < kEnd; i += 8)
        if (i + 8 <= kEnd || i + piece < kEnd) copy_piece(target + i * 16, source + i * 16, policy);
}

// The addresses at which a lane stores. The row turns a chunk's place in a panel, for wgmma's swizzle. A lane that has no piece in
// a group reads the first piece and stores nothing.
struct Lane {
    static constexpr int kKeys = OwnChunks::kCount % 8;          // the chunk of a panel at which keys begin
    int piece, row;                                              // row: the lane's row of the first quad, in a tile
    u32 value, key;                                              // chunk `piece` of a group of eight whole pieces
    u32 last_value[2], last_rope[2], last_sketch[4];             // each chunk of the lane's piece, in a group of fewer

    __device__ __forceinline__ u32 at(int chunk) const {
        return chunk / 8 * kPanelBytes + row * 128 + ((chunk % 8 ^ row % 8) << 4);
    }
    // The piece that the lane takes of a group of `count` pieces.
    __device__ __forceinline__ int piece_of(int count) const { return piece < count ? piece : 0; }
    template <typename Field> __device__ __forceinline__ u32 last(int field, int k) const {
        constexpr int kGroup = Field::kGroups > 0 ? Field::kGroups - 1 : 0;
        const int mine = piece_of(Field::pieces(kGroup));
        if (mine == Field::whole(kGroup)) return at(field + Field::kWhole * 4 + k);
        return at(field + Field::place(kGroup, k) + mine);
    }
    __device__ __forceinline__ Lane(int warp, int lane) : piece(lane % 8), row(warp * kWarpRows + lane / 8) {
        value = at(piece), key = at(kKeys + piece);
#pragma unroll
        for (int k = 0; k < 2; ++k) last_value[k] = last<OwnChunks>(0, k);
#pragma unroll
        for (int k = 0; k < 16 / ROPE_BITS; ++k) last_rope[k] = last<RopeChunks>(OwnChunks::kCount, k);
#pragma unroll
        for (int k = 0; k < 4 && SKETCH > 0; ++k) last_sketch[k] = last<SketchChunks>(OwnChunks::kCount + RopeChunks::kCount, k);
    }
    // The address of chunk `k` of the lane's piece in group `group` of a field whose first chunk is `field`.
    template <typename Field>
    __device__ __forceinline__ u32 place(u32 stage, int field, int group, int k, int quad, const u32* last) const {
        const bool full = Field::whole(group) == 8;
        const u32 address = full ? (field ? key : value) : last[k];
        const u32 turned = quad ? address ^ 64 : address;        // four rows further on
        return stage + turned + quad * 512 + (full ? (field + Field::place(group, k)) / 8 * kPanelBytes : 0);
    }
};

// Stores eight bytes as a chunk; each four have one scale.
__device__ __forceinline__ void store_bytes(u32 address, u32 first, u32 second, u32 first_scale, u32 second_scale, u32 power) {
    const u32 first_bias = bias_of(first_scale), second_bias = bias_of(second_scale);
    store_shared4(address, scaled_bytes<0, 1>(first, first_scale, first_bias, power),
                  scaled_bytes<2, 3>(first, first_scale, first_bias, power),
                  scaled_bytes<0, 1>(second, second_scale, second_bias, power),
                  scaled_bytes<2, 3>(second, second_scale, second_bias, power));
}

// The lane's pieces of a raw row's keys. A lane without a piece holds the first one.
struct RawKeys {
    uint4 rope[RopeChunks::kGroups], sketch[SketchChunks::kGroups > 0 ? SketchChunks::kGroups : 1];

    __device__ __forceinline__ void load(u32 row, const Lane& lane) {
#pragma unroll
        for (int group = 0; group < RopeChunks::kGroups; ++group)
            rope[group] = load_shared4(row + kRopeOffset + (group * 8 + lane.piece_of(RopeChunks::pieces(group))) * 16);
#pragma unroll
        for (int group = 0; group < SketchChunks::kGroups; ++group) {
            const u32 at = row + kSketchOffset + (group * 8 + lane.piece_of(SketchChunks::pieces(group))) * 4 * BITS;
            if (BITS == 4) sketch[group] = load_shared4(at);
            else sketch[group] = make_uint4(load_shared(at), load_shared(at + 4), BITS == 3 ? load_shared(at + 8) : 0, 0);
        }
    }
    // Unpacks the pieces into the tile at `stage`.
    __device__ __forceinline__ void store(u32 stage, const Lane& lane, int quad, const Factors& f,
                                          const Constants& constants) const {
#pragma unroll
        for (int group = 0; group < RopeChunks::kGroups; ++group) {
            const uint4& x = rope[group];
            if (lane.piece >= RopeChunks::pieces(group)) continue;
            const auto place = [&](int k) {
                return lane.place<RopeChunks>(stage, OwnChunks::kCount, group, k, quad, lane.last_rope);
            };
            if (ROPE_BITS == 16) {
                store_shared4(place(0), multiply_bf16(x.x, f.rope), multiply_bf16(x.y, f.rope), multiply_bf16(x.z, f.rope),
                              multiply_bf16(x.w, f.rope));
            } else {
                store_bytes(place(0), x.x, x.y, f.rope, f.rope, constants.power);
                store_bytes(place(1), x.z, x.w, f.rope, f.rope, constants.power);
            }
        }
#pragma unroll
        for (int group = 0; group < SketchChunks::kGroups; ++group) {
            constexpr int kField = OwnChunks::kCount + RopeChunks::kCount;
            const u32 words[4] = {sketch[group].x, sketch[group].y, sketch[group].z, sketch[group].w};
            const int whole = SketchChunks::whole(group), pieces = SketchChunks::pieces(group);
            const bool partial = whole < pieces && lane.piece == whole;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int bit = 8 * BITS * k;
                const u32 codes = __funnelshift_r(words[bit / 32], words[min(bit / 32 + 1, 3)], bit % 32);
                const u32 target = lane.place<SketchChunks>(stage, kField, group, k, quad, lane.last_sketch);
                u32 pair[4];
                levels_of<BITS>(codes, constants.powers, pair);
                if (lane.piece < pieces && (k < 2 || !partial))
                    store_shared4(target, multiply_half(pair[0], f.sketch), multiply_half(pair[1], f.sketch),
                                  multiply_half(pair[2], f.sketch), multiply_half(pair[3], f.sketch));
            }
        }
    }
};

// The lane's pieces of a raw row's values.
struct RawValues {
    uint4 codes[OwnChunks::kGroups];

    __device__ __forceinline__ void load(u32 row, const Lane& lane) {
#pragma unroll
        for (int group = 0; group < OwnChunks::kGroups; ++group)
            codes[group] = load_shared4(row + (group * 8 + lane.piece_of(OwnChunks::pieces(group))) * 16);
    }
    __device__ __forceinline__ void store(u32 stage, const Lane& lane, int quad, const Factors& f,
                                          const Constants& constants) const {
#pragma unroll
        for (int group = 0; group < OwnChunks::kGroups; ++group) {
            const u32 x[4] = {codes[group].x, codes[group].y, codes[group].z, codes[group].w};
            const int first = group * 128, column = first + lane.piece_of(OwnChunks::pieces(group)) * 16;
            u32 scale[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool shared = (SHARED % 16 ? column + 4 * i : column) < SHARED;
                scale[i] = OWN == 0 || first + 128 <= SHARED ? f.shared : first >= SHARED ? f.own : shared ? f.shared : f.own;
            }
#pragma unroll
            for (int k = 0; k < 2 && lane.piece < OwnChunks::pieces(group); ++k)
                store_bytes(lane.place<OwnChunks>(stage, 0, group, k, quad, lane.last_value), x[2 * k], x[2 * k + 1], scale[2 * k],
                            scale[2 * k + 1], constants.power);
        }
    }
};

// Unpacks a warp's part of every tile. `raw`: the warp's raw rows; `warp`: its number among kFillWarps.
__device__ __forceinline__ void fill(const Params& p, Fixed& fixed, u32 ring, u32 raw, int warp, int lane_number) {
    const Lane lane(warp, lane_number);
    const u64 policy = read_once();
    const int sub = lane_number / 8;
    // The loads are volatile: constants known to be uniform would have to be moved to the lanes' registers for every use.
    const Constants constants = fixed.constants.loaded();
    Walk walk(p);
    walk.look_up(p, warp, lane_number);
    // The next tile to copy is the first of `left` tiles whose slots are in `slots`, from lane `first_row` on. The walk is at the
    // tiles after those.
    int slots = -1, left = 0, first_row = 0;
    u32 beyond = 0;                                              // a bit for each quad: the lane's row is beyond the last
    const u8* rows[kQuads];
    const auto move_on = [&]() {
        if (left == 0) {
            left = walk.count(), first_row = 0;
            if (left == 0) return false;
            slots = walk.slot(p);
            if (walk.newest(p)) wait_for_predecessor();
            walk.next();
            walk.look_up(p, warp, lane_number);
        }
        beyond = 0;
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) {
            const int slot = __shfl_sync(0xffffffff, slots, first_row + quad * 4 + sub);
            rows[quad] = p.kv + (long long)max(slot, 0) * p.kv_stride + lane.piece * 16;
            beyond |= (u32)slot >> 31 << quad;
        }
        --left, first_row += kWarpRows;
        return true;
    };
    const u32 row = raw + sub * ROW_BYTES, target = row + lane.piece * 16;
    const auto copy_keys = [&]() {
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad)
            copy_pieces<kRopeOffset / 16, ROW_BYTES / 16>(target + quad * 4 * ROW_BYTES, rows[quad], lane.piece, policy);
    };
    const auto copy_values = [&]() {
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad)
            copy_pieces<0, LATENT / 16>(target + quad * 4 * ROW_BYTES, rows[quad], lane.piece, policy);
    };
    // The reader fences: a fence of the writer would wait for the rows in flight.
    const auto arrive = [&](u64* full) {
        __syncwarp();
        if (lane_number == 0) barrier_arrive(shared_address(full));
    };
    bool more = move_on();
    if (more) copy_keys();
    commit_copies();
    if (more) copy_values();
    commit_copies();
#pragma unroll 1
    for (Stage at; more; at.next()) {
        const u32 stage = ring + at.slot * kStageBytes;
        RawKeys keys[kQuads];
        RawValues values[kQuads];
        wait_for_oldest_copies();
        uint2 scales[kQuads] = {load_shared2(row + ROW_BYTES - 8), load_shared2(row + 5 * ROW_BYTES - 8)};
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) keys[quad].load(row + quad * 4 * ROW_BYTES, lane);
        // Rows beyond the last token unpack slot 0 with scales of 0, which gives finite values; their scores are masked.
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad)
            if (beyond >> quad & 1) scales[quad] = make_uint2(0, 0);
        float largest = fmaxf(largest_scale(scales[0]), largest_scale(scales[1]));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 8));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 16));
        const u32 power = power_of(largest);
        const float inverse = __uint_as_float(0x7F000000u - power);
        const Factors factors[kQuads] = {factors_of(scales[0], inverse), factors_of(scales[1], inverse)};
        barrier_wait(shared_address(fixed.keys_empty + at.slot), at.phase ^ 1);
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) keys[quad].store(stage, lane, quad, factors[quad], constants);
        arrive(fixed.keys_full + at.slot);
        more = move_on();
        if (more) copy_keys();
        commit_copies();
        wait_for_oldest_copies();
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) values[quad].load(row + quad * 4 * ROW_BYTES, lane);
        barrier_wait(shared_address(fixed.values_empty + at.slot), at.phase ^ 1);
        if (lane_number == 0)
            fixed.eights[at.slot][warp] = {__uint_as_float(power), (float)((int)(power >> 23) - 127), inverse, 0.f};
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) values[quad].store(stage, lane, quad, factors[quad], constants);
        arrive(fixed.values_full + at.slot);
        if (more) copy_values();
        commit_copies();
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}
