/* cuda/sm90/fwd_hdim128.cu: the forward kernels of head-dim bucket 128. */
#include "instance.cuh"

FA_SM90_FORWARD(128)
