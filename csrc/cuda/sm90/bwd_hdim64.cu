/* cuda/sm90/bwd_hdim64.cu: the backward kernels of head-dim bucket 64. */
#include "backward_instance.cuh"

FA_SM90_BACKWARD(64)
