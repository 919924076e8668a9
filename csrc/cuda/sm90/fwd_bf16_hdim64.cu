/* cuda/sm90/fwd_bf16_hdim64.cu: the forward kernels of head-dim bucket 64 for bf16. */
#include "instance.cuh"

FA_SM90_FORWARD(bf16, FA_BFLOAT16, 64)
