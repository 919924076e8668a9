/* cuda/sm90/fwd_hdim192.cu: the forward kernels of head-dim bucket 192. */
#include "instance.cuh"

FA_SM90_FORWARD(192)
