/* cuda/sm90/fwd_added_hdim64.cu: the forward kernels of head-dim bucket 64 for biases and masks. */
#include "added_instance.cuh"

FA_SM90_ADDED(64)
