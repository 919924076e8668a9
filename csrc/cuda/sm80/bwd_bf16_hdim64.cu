/* cuda/sm80/bwd_bf16_hdim64.cu: the backward kernels of bf16 and head-dim bucket 64. */
#include "backward.cuh"
#include "instance.cuh"

FA_SM80_INSTANCES(backward, bf16, FA_BFLOAT16, 64)
