// The request that this block helps to merge: at most one, that of the part's last segment.
struct Shared {
    int request, share, shares, first_split, splits;
    u32 target;                // value of `arrived` when all partial results are stored
};
