/* cuda/sm80/fp32_fwd_hdim64.cu: the forward kernels of fp32 tensors, head-dim bucket 64. */
#include "fp32_forward.cuh"

FA_SM80_FP32_INSTANCES(forward, 64)
