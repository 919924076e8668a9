/* cuda/sm80/fwd_hdim192.cu: the forward kernels of head-dim bucket 192. */
#include "forward.cuh"
#include "instance.cuh"

FA_SM80_INSTANCES(forward, 192)
