/* cuda/sm90/backward_args.h: what the backward kernels of sm_90 get. Plain C. */
#ifndef FA_SM90_BACKWARD_ARGS_H
#define FA_SM90_BACKWARD_ARGS_H

#include "../args.h"
#include "tensor_map.h"

/* fa_cuda_args.counters: the next key tile, the next piece of dq to be made, then for each head of k its key tiles whose sums are there. */
enum { FA_TILE_TICKET, FA_PIECE_TICKET, FA_TICKETS };

struct fa_sm90_backward_args {
    struct fa_tensor_map q, k, v, dout;     /* boxes of BLOCK_M rows; of k and v, of a block's keys */
    struct fa_cuda_args a;
    int section;                            /* heads whose key tiles run side by side, so that L2 holds what they share */
    bool tickets;                           /* blocks take key tiles in their order, as they have time; else block n has tile n */
    struct fa_tensor_map bias;              /* boxes of 64 queries x 64 keys, for the kernels that take one */
    int bias_b, bias_h;                     /* 0: the same along this index */
    struct fa_tensor_map mask;              /* boxes of BLOCK_M queries x 4 words */
    bool mask_boxes;                        /* the mask's bits come in them: it has rows and words */
};

#endif
