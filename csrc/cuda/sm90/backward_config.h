/* cuda/sm90/backward_config.h: tiles of the backward pass, by head-dim bucket. No row, no kernel. */
#ifndef FA_SM90_BACKWARD_CONFIG_H
#define FA_SM90_BACKWARD_CONFIG_H

/* BLOCK_M queries at a time; GROUPS consumer warpgroups of 64 keys each, or, with two ROLES, both of the same 64 keys. K and V
 * stay in registers with KV_REGISTERS. BULK_DQ: dq leaves through shared memory. Registers a thread of the consumers' and the producer's. */
template <int M, int G, int R, bool KV, bool BULK> struct sm90_backward_row {
    enum : int { BLOCK_M = M, GROUPS = G, ROLES = R, BLOCK_N = 64 * G / R, KV_REGISTERS = KV, BULK_DQ = BULK, REGISTERS = G == 3 ? 160 : KV ? 232 : 240, PRODUCER_REGISTERS = G == 3 ? 32 : KV ? 40 : 24 };
};

template <int D, bool PLAIN> struct sm90_backward_tile;
#ifndef R64G
#define R64G 2
#define R64K true
#define R64M 64
#endif
#ifndef BULKQ
#define BULKQ true
#endif
/*                                                        BLOCK_M  GROUPS  ROLES  KV_REGISTERS  BULK_DQ */
template <bool PLAIN> struct sm90_backward_tile< 64, PLAIN> : sm90_backward_row<PLAIN ? R64M : 64, R64G, 1, R64K, BULKQ> {};
template <bool PLAIN> struct sm90_backward_tile< 96, PLAIN> : sm90_backward_row<64, 2, 1, false, BULKQ> {};
template <bool PLAIN> struct sm90_backward_tile<128, PLAIN> : sm90_backward_row<64, 2, 1, false, BULKQ> {};
template <bool PLAIN> struct sm90_backward_tile<192, PLAIN> : sm90_backward_row<64, 2, 2, false, false> {};
template <bool PLAIN> struct sm90_backward_tile<256, PLAIN> : sm90_backward_row<64, 2, 2, false, false> {};

#endif
