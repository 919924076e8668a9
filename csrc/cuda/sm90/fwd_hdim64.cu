/* cuda/sm90/fwd_hdim64.cu: the forward kernels of head-dim bucket 64. */
#include "instance.cuh"

FA_SM90_FORWARD(64)
