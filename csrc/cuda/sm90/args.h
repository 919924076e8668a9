/* cuda/sm90/args.h: what a Hopper kernel gets: the call, its tensors as TMA sees them, and the order of the tiles. Plain C. */
#ifndef FA_SM90_ARGS_H
#define FA_SM90_ARGS_H

#include "../args.h"
#include "tensor_map.h"

struct fa_sm90_forward_args {
    struct fa_tensor_map q, k, v, out;
    struct fa_cuda_args a;
    int  units;                     /* pieces of work that blocks take one at a time: one tile, or a head's longest left and shortest */
    int  section;                   /* heads (b h) whose tiles are worked off together, longest first; 0: pairs of tiles */
    bool store;                     /* TMA can write out: whole rows of a warp go by it */
    int *counter;                   /* units handed out beyond the first of each block; NULL: every gridDim.x-th */
};

#endif
