/* cuda/sm80/bwd_bf16_hdim96.cu: the backward kernels of bf16 and head-dim bucket 96. */
#include "backward.cuh"
#include "instance.cuh"

FA_SM80_INSTANCES(backward, bf16, FA_BFLOAT16, 96)
