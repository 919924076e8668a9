/* cuda/sm90/bwd_hdim256.cu: the backward kernels of head-dim bucket 256. */
#include "backward_instance.cuh"

FA_SM90_BACKWARD(256)
