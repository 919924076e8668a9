/* cuda/sm80/fwd_hdim64.cu: the forward kernels of head-dim bucket 64. */
#include "forward.cuh"
#include "instance.cuh"

FA_SM80_INSTANCES(forward, 64)
