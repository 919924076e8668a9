/* cuda/sm80/fp32_bwd_hdim128.cu: the backward kernels of fp32 tensors, head-dim bucket 128. */
#include "fp32_backward.cuh"

FA_SM80_FP32_INSTANCES(backward, 128)
