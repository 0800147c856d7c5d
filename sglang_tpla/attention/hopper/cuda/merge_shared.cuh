// The request whose merge this block has a share in: at most one, that of the part's last segment.
struct Shared {
    int request, share, shares;
    u32 target;                // value of `arrived` when all partial results are stored
};
