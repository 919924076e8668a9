/* cuda/sm80/bwd_hdim96.cu: the backward kernels of head-dim bucket 96. */
#include "backward.cuh"
#include "instance.cuh"

FA_SM80_INSTANCES(backward, 96)
