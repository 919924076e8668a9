/* cuda/sm80/bwd_hdim128.cu: the backward kernels of head-dim bucket 128. */
#include "backward.cuh"
#include "instance.cuh"

FA_SM80_INSTANCES(backward, 128)
