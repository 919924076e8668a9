/* cuda/sm80/bwd_hdim64.cu: the backward kernels of head-dim bucket 64. */
#include "backward.cuh"
#include "instance.cuh"

FA_SM80_INSTANCES(backward, 64)
