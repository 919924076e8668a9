/* cuda/sm90/fwd_fp16_hdim192.cu: the forward kernels of head-dim bucket 192 for fp16. */
#include "instance.cuh"

FA_SM90_FORWARD(fp16, FA_FLOAT16, 192)
