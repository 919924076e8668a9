/* cuda/sm80/bwd_hdim32.cu: the backward kernels of head-dim bucket 32. */
#include "backward.cuh"
#include "instance.cuh"

FA_SM80_INSTANCES(backward, 32)
