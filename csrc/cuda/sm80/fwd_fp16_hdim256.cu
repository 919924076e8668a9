/* cuda/sm80/fwd_fp16_hdim256.cu: the forward kernels of fp16 and head-dim bucket 256, and where launch.c finds them and those of bf16. */
#include "forward.cuh"
#include "instance.cuh"

FA_SM80_INSTANCES(forward, fp16, FA_FLOAT16, 256)
FA_SM80_FIND(forward, 256)
