/* cuda/sm90/args.h: what a Hopper kernel gets: the call, its tensors as TMA sees them, and the order of the tiles. Plain C. */
#ifndef FA_SM90_ARGS_H
#define FA_SM90_ARGS_H

#include "../args.h"
#include "tensor_map.h"

struct fa_sm90_forward_args {
    struct fa_tensor_map q, k, v;
    struct fa_cuda_args a;
    int  tiles;                     /* b h m_tiles */
    int  section;                   /* heads (b h) whose tiles are worked off together, longest first */
    int *counter;                   /* tiles handed out beyond the first of each block; NULL: every gridDim.x-th */
};

#endif
