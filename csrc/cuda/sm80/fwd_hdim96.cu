/* cuda/sm80/fwd_hdim96.cu: the forward kernels of head-dim bucket 96. */
#include "forward.cuh"
#include "instance.cuh"

FA_SM80_INSTANCES(forward, 96)
