/* cuda/sm80/bwd_hdim192.cu: the backward kernels of head-dim bucket 192. */
#include "backward.cuh"
#include "instance.cuh"

FA_SM80_INSTANCES(backward, 192)
