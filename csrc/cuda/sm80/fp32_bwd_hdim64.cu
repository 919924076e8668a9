/* cuda/sm80/fp32_bwd_hdim64.cu: the backward kernels of fp32 tensors, head-dim bucket 64. */
#include "fp32_backward.cuh"

FA_SM80_FP32_INSTANCES(backward, 64)
