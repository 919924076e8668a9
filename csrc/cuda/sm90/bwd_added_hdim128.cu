/* cuda/sm90/bwd_added_hdim128.cu: the backward kernels of head-dim bucket 128 for biases and masks. */
#include "backward_added_instance.cuh"

FA_SM90_ADDED_BACKWARD(128)
