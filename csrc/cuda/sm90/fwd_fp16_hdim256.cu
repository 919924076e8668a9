/* cuda/sm90/fwd_fp16_hdim256.cu: the forward kernels of head-dim bucket 256 for fp16. */
#include "instance.cuh"

FA_SM90_FORWARD(fp16, FA_FLOAT16, 256)
