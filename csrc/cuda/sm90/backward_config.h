/* cuda/sm90/backward_config.h: tiles of the backward pass, by head-dim bucket; `PLAIN`: neither score mods nor dropout. No row, no
 * kernel. What was tried beside them, and by how much it lost: benchmarks/results/hopper-backward-tuning.md. */
#ifndef FA_SM90_BACKWARD_CONFIG_H
#define FA_SM90_BACKWARD_CONFIG_H

/* BLOCK_M queries at a time. Two consumer warpgroups: of 64 keys each, or, with two ROLES, both of the same 64. KV_REGISTERS: K and V
 * stay in registers as left operands. BULK_DQ: dq leaves through shared memory, else by red.v4 from registers. SPARE: consumers can do with
 * 232 registers, so that the producer's warps, which make dq, have more under way. */
template <int M, int R, bool KV, bool BULK, bool SPARE> struct sm90_backward_row {
    enum : int {
        BLOCK_M = M, GROUPS = 2, ROLES = R, BLOCK_N = 64 * GROUPS / R, KV_REGISTERS = KV, BULK_DQ = BULK,
        REGISTERS = SPARE ? 232 : 240, PRODUCER_REGISTERS = SPARE ? 40 : 24,    /* a thread */
        ADDED = 0,
    };
};

template <int D, bool PLAIN> struct sm90_backward_tile;
/*                                                                            BLOCK_M  ROLES  KV_REGISTERS  BULK_DQ  SPARE      KB */
template <>             struct sm90_backward_tile< 64, true>  : sm90_backward_row<128, 1, false, true,  true> {};         /*  195 */
template <>             struct sm90_backward_tile< 64, false> : sm90_backward_row< 64, 1, true,  true,  true> {};         /*  129 */
template <bool PLAIN> struct sm90_backward_tile< 96, PLAIN>   : sm90_backward_row< 64, 1, false, true,  true> {};         /*  209 */
template <bool PLAIN> struct sm90_backward_tile<128, PLAIN>   : sm90_backward_row< 64, 1, false, true,  false> {};        /*  225 */
template <bool PLAIN> struct sm90_backward_tile<192, PLAIN>   : sm90_backward_row< 64, 2, false, false, true> {};         /*  177 */
template <bool PLAIN> struct sm90_backward_tile<256, PLAIN>   : sm90_backward_row< 64, 2, false, false, false> {};        /*  225 */

/* For calls with attn_bias or attn_mask: with room for two stages of bias. */
template <int M, bool KV, bool BULK> struct sm90_added_backward_row : sm90_backward_row<M, 1, KV, BULK, KV> { enum : int { ADDED = 1 }; };
template <int D> struct sm90_added_backward_tile;
template <> struct sm90_added_backward_tile< 64> : sm90_added_backward_row< 64, true, true> {};         /*  161 */
template <> struct sm90_added_backward_tile<128> : sm90_added_backward_row< 64, false, false> {};       /*  193 */

#endif
