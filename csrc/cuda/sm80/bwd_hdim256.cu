/* cuda/sm80/bwd_hdim256.cu: the backward kernels of head-dim bucket 256. */
#include "backward.cuh"
#include "instance.cuh"

FA_SM80_INSTANCES(backward, 256)
