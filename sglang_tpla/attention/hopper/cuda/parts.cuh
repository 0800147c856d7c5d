// ---- the part of a block ------------------------------------------------------------------------------------------

__device__ __forceinline__ int4 part_row(const Params& p, int part) {
    return __ldcg(reinterpret_cast<const int4*>(p.part_begin) + 2 * part);
}

// Walks the (request, tile range) segments of part blockIdx.x; all warpgroups walk the same list.
struct Segments {
    const Params& p;
    int request, last_request, last_tile, first_tile, before, length, start;

    __device__ __forceinline__ explicit Segments(const Params& params) : p(params) {
        const int4 begin = part_row(p, blockIdx.x), end = part_row(p, blockIdx.x + 1);
        request = begin.x, first_tile = begin.y, before = begin.z, last_request = end.x, last_tile = end.y, length = begin.w;
        start = __ldcg(p.part_begin + 8 * blockIdx.x + 4);
    }
    __device__ __forceinline__ bool more() const {
        return request < last_request || (request == last_request && first_tile < last_tile);
    }
    __device__ __forceinline__ int end_tile() const {
        return request == last_request ? last_tile : (length + kTile - 1) / kTile;
    }
    __device__ __forceinline__ void next() {
        ++request, first_tile = 0, before = 0;
        if (more()) length = __ldcg(p.lengths + request), start = __ldcg(p.page_starts + request);
    }
};
