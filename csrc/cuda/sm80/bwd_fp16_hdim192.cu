/* cuda/sm80/bwd_fp16_hdim192.cu: the backward kernels of fp16 and head-dim bucket 192, and where launch.c finds them and those of bf16. */
#include "backward.cuh"
#include "instance.cuh"

FA_SM80_INSTANCES(backward, fp16, FA_FLOAT16, 192)
FA_SM80_FIND(backward, 192)
