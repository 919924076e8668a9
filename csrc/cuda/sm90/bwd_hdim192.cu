/* cuda/sm90/bwd_hdim192.cu: the backward kernels of head-dim bucket 192. */
#include "backward_instance.cuh"

FA_SM90_BACKWARD(192)
