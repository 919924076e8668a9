/* cuda/sm90/fwd_fp16_hdim64.cu: the forward kernels of head-dim bucket 64 for fp16. */
#include "instance.cuh"

FA_SM90_FORWARD(fp16, FA_FLOAT16, 64)
