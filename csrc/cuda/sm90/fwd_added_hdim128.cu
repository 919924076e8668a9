/* cuda/sm90/fwd_added_hdim128.cu: the forward kernels of head-dim bucket 128 for biases and masks. */
#include "added_instance.cuh"

FA_SM90_ADDED(128)
