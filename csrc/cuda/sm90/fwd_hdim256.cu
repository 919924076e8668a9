/* cuda/sm90/fwd_hdim256.cu: the forward kernels of head-dim bucket 256. */
#include "instance.cuh"

FA_SM90_FORWARD(256)
