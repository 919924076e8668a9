/* cuda/sm90/bwd_hdim96.cu: the backward kernels of head-dim bucket 96. */
#include "backward_instance.cuh"

FA_SM90_BACKWARD(96)
