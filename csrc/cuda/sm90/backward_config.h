/* cuda/sm90/backward_config.h: tiles of the backward pass, by head-dim bucket. No row, no kernel. */
#ifndef FA_SM90_BACKWARD_CONFIG_H
#define FA_SM90_BACKWARD_CONFIG_H

/* BLOCK_M queries at a time; GROUPS consumer warpgroups of 64 keys each, whose K and V stay in registers with KV_REGISTERS;
 * registers a thread of theirs and of the producer's. */
template <int M, int G, bool KV> struct sm90_backward_row {
    enum : int { BLOCK_M = M, GROUPS = G, KV_REGISTERS = KV, REGISTERS = G == 2 ? 240 : 160, PRODUCER_REGISTERS = G == 2 ? 24 : 32 };
};

template <int D> struct sm90_backward_tile;
/*                                                       BLOCK_M  GROUPS  KV_REGISTERS */
#ifndef R64G
#define R64G 2
#define R64K true
#endif
template <> struct sm90_backward_tile< 64> : sm90_backward_row<64, R64G, R64K> {};
template <> struct sm90_backward_tile<128> : sm90_backward_row<64, 2, false> {};

#endif
