/* cuda/sm80/fp32_fwd_hdim256.cu: the forward kernels of fp32 tensors, head-dim bucket 256. */
#include "fp32_forward.cuh"

FA_SM80_FP32_INSTANCES(forward, 256)
