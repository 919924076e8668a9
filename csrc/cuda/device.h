/* cuda/device.h: what launch.c must know of a GPU, and CUDA's errors in words that a user can act on. */
#ifndef FA_CUDA_DEVICE_H
#define FA_CUDA_DEVICE_H

#include <cuda_runtime_api.h>

#include "../common/internal.h"

struct fa_cuda_device {
    int capability;                 /* 10 major + minor */
    int multiprocessors;
    int shared_per_block;           /* bytes that a block may ask for */
    int shared_per_multiprocessor;
};

/* Facts of a device, asked once in the life of the process. NULL with a message where CUDA refuses. */
const struct fa_cuda_device *fa_cuda_device(int64_t index, struct fa_error *error);

/* Makes the device current and says which was; nothing is touched where it is current already. */
enum fa_status fa_cuda_enter(int64_t index, int *previous, struct fa_error *error);
void fa_cuda_leave(int64_t index, int previous);

/* FA_OK, or FA_FAILED with the call and CUDA's text. A driver that is too old gets the way out. */
enum fa_status fa_cuda_status(cudaError_t code, const char *call, struct fa_error *error);

/* values.c: the values that the kernels would clamp, checked on the host. Waits for the stream. */
enum fa_status fa_cuda_check_values(const struct fa_params *p, struct fa_error *error);

#endif
