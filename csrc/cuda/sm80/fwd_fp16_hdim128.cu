/* cuda/sm80/fwd_fp16_hdim128.cu: the forward kernels of fp16 and head-dim bucket 128, and where launch.c finds them and those of bf16. */
#include "forward.cuh"
#include "instance.cuh"

FA_SM80_INSTANCES(forward, fp16, FA_FLOAT16, 128)
FA_SM80_FIND(forward, 128)
