/* cuda/sm90/bias_gradient_hdim64.cu: the bias gradient of head-dim bucket 64. */
#include "bias_gradient.cuh"
#include "kernels.h"

FA_SM90_BIAS_GRADIENT(64)
