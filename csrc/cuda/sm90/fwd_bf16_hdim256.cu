/* cuda/sm90/fwd_bf16_hdim256.cu: the forward kernels of head-dim bucket 256 for bf16. */
#include "instance.cuh"

FA_SM90_FORWARD(bf16, FA_BFLOAT16, 256)
