/* cuda/sm90/bias_gradient_hdim128.cu: the bias gradient of head-dim bucket 128. */
#include "bias_gradient.cuh"
#include "kernels.h"

FA_SM90_BIAS_GRADIENT(128)
