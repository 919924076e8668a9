/* cuda/sm80/fwd_bf16_hdim256.cu: the forward kernels of bf16 and head-dim bucket 256. */
#include "forward.cuh"
#include "instance.cuh"

FA_SM80_INSTANCES(forward, bf16, FA_BFLOAT16, 256)
