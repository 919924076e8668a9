/* cuda/sm90/fwd_hdim96.cu: the forward kernels of head-dim bucket 96. */
#include "instance.cuh"

FA_SM90_FORWARD(96)
