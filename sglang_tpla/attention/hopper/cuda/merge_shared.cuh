// The block's share of a merge. A block helps to merge at most one request, that of its part's last segment.
struct Shared {
    int request, share, shares, first_split, splits;
    u32 target;                // the value of `arrived` once all partial results are stored
};
