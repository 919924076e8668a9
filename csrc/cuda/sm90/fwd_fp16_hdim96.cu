/* cuda/sm90/fwd_fp16_hdim96.cu: the forward kernels of head-dim bucket 96 for fp16. */
#include "instance.cuh"

FA_SM90_FORWARD(fp16, FA_FLOAT16, 96)
