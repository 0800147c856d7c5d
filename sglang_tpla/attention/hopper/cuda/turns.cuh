// ---- consumers of MODE_ROWS: turns at the tensor cores ------------------------------------------------------------

// In its turn a warpgroup queues the values of a tile and the scores of the next back to back, then passes the turn: the other
// warpgroup's products follow without a gap, while this warpgroup computes probabilities. If a turn were passed earlier, the
// products of both would mix and delay the scores, for which the softmax waits. Group 0 has the first turn.
__device__ __forceinline__ void attend_in_turns(u32 q_rows, const QueryRegisters& query, const Stretch& t,
                                                const int (&limit)[2], float scale_log2, float (&o)[kOut], Softmax& state,
                                                int group, int lane) {
    float s[32], factor[2];
    u32 probability[16], stage = t.base % STAGES, phase = (t.base / STAGES) & 1;
    int first_token = t.first_token;
    if (group == 1) pass_turn(group);
    barrier_wait(t.full + 8 * stage, phase);
    fence_async_proxy();
    take_turn(group);
    scores(s, q_rows, query, t.ring + stage * kStageBytes);
    if (group == 0 || t.tiles > 1) pass_turn(group);               // each turn that is taken was passed once
    wgmma_wait<0>();
    pin(s);
    soften(s, state, factor, scale_log2, first_token, limit, first_token + kTile > t.unmasked, lane);
    pack_probability(probability, s);
    for (int j = 1; j < t.tiles; ++j) {
        const u32 current = stage;
        if (++stage == STAGES) stage = 0, phase ^= 1;
        pin(o);
        pin(probability);
        take_turn(group);
        add_values(o, probability, t.ring + current * kStageBytes);
        barrier_wait(t.full + 8 * stage, phase);
        fence_async_proxy();
        scores(s, q_rows, query, t.ring + stage * kStageBytes);
        if (group == 0 || j + 1 < t.tiles) pass_turn(group);
        wgmma_wait<1>();
        pin(o);
        pin(probability);
        if (lane == 0) barrier_arrive(t.empty + 8 * current);
        wgmma_wait<0>();
        pin(s);
        first_token += kTile;
        soften(s, state, factor, scale_log2, first_token, limit, first_token + kTile > t.unmasked, lane);
        rescale(o, factor);
        pack_probability(probability, s);
    }
    pin(o);
    pin(probability);
    add_values(o, probability, t.ring + stage * kStageBytes);
    wgmma_wait<0>();
    pin(o);
    pin(probability);
    if (lane == 0) barrier_arrive(t.empty + 8 * stage);
}
