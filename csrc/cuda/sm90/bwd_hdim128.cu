/* cuda/sm90/bwd_hdim128.cu: the backward kernels of head-dim bucket 128. */
#include "backward_instance.cuh"

FA_SM90_BACKWARD(128)
