/* cuda/sm80/fwd_fp16_hdim192.cu: the forward kernels of fp16 and head-dim bucket 192, and where launch.c finds them and those of bf16. */
#include "forward.cuh"
#include "instance.cuh"

FA_SM80_INSTANCES(forward, fp16, FA_FLOAT16, 192)
FA_SM80_FIND(forward, 192)
