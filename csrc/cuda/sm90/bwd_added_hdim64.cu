/* cuda/sm90/bwd_added_hdim64.cu: the backward kernels of head-dim bucket 64 for biases and masks. */
#include "backward_added_instance.cuh"

FA_SM90_ADDED_BACKWARD(64)
