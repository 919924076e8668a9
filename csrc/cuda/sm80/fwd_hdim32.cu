/* cuda/sm80/fwd_hdim32.cu: the forward kernels of head-dim bucket 32. */
#include "forward.cuh"
#include "instance.cuh"

FA_SM80_INSTANCES(forward, 32)
