/* cuda/sm90/added_args.h: what the forward kernel for biases and masks gets. Plain C. */
#ifndef FA_SM90_ADDED_ARGS_H
#define FA_SM90_ADDED_ARGS_H

#include "args.h"

struct fa_sm90_added_args {
    struct fa_sm90_forward_args f;
    struct fa_tensor_map bias;      /* boxes of 64 queries x 64 keys */
    int bias_b, bias_h;             /* 0: the same along this index */
};

#endif
