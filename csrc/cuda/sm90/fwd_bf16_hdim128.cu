/* cuda/sm90/fwd_bf16_hdim128.cu: the forward kernels of head-dim bucket 128 for bf16. */
#include "instance.cuh"

FA_SM90_FORWARD(bf16, FA_BFLOAT16, 128)
