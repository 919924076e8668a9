/* cuda/sm80/fwd_hdim256.cu: the forward kernels of head-dim bucket 256. */
#include "forward.cuh"
#include "instance.cuh"

FA_SM80_INSTANCES(forward, 256)
