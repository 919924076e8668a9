/* cuda/sm80/fwd_hdim128.cu: the forward kernels of head-dim bucket 128. */
#include "forward.cuh"
#include "instance.cuh"

FA_SM80_INSTANCES(forward, 128)
