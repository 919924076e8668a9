/* cuda/device.c: facts of the GPUs, asked once (device.h), and their part of fa_info. */
#include <stdatomic.h>
#include <stdio.h>

#include "device.h"

/* The CUDA release that a binary is built with needs a driver of its own generation. */
#define CUDA_MAJOR (CUDART_VERSION / 1000)
#define CUDA_MINOR (CUDART_VERSION % 1000 / 10)
#define OLDEST_DRIVER (CUDA_MAJOR >= 13 ? 580 : 525)

enum { DEVICES = 64 };

enum fa_status fa_cuda_status(cudaError_t code, const char *call, struct fa_error *error)
{
    int driver = 0;
    if (code == cudaSuccess) return FA_OK;
    if (code != cudaErrorInsufficientDriver)
        return fa_fail(error, FA_FAILED, "%s failed: %s (%s)", call, cudaGetErrorString(code), cudaGetErrorName(code));
    cudaDriverGetVersion(&driver);
    return fa_fail(error, FA_FAILED, "%s failed: flash_attn was built with CUDA %d.%d and needs an NVIDIA driver of version "
                   "%d or newer; the one here serves CUDA %d.%d (0.0: there is none). Update it, reinstall flash_attn where "
                   "an nvcc of that CUDA is found, or pass CPU tensors, which work on this machine", call, CUDA_MAJOR,
                   CUDA_MINOR, OLDEST_DRIVER, driver / 1000, driver % 1000 / 10);
}

static enum fa_status ask(int index, struct fa_cuda_device *facts, struct fa_error *error)
{
    int major = 0, minor = 0;
    const struct { enum cudaDeviceAttr attribute; int *value; } questions[] = {
        { cudaDevAttrComputeCapabilityMajor, &major },
        { cudaDevAttrComputeCapabilityMinor, &minor },
        { cudaDevAttrMultiProcessorCount, &facts->multiprocessors },
        { cudaDevAttrMaxSharedMemoryPerBlockOptin, &facts->shared_per_block },
        { cudaDevAttrMaxSharedMemoryPerMultiprocessor, &facts->shared_per_multiprocessor },
    };
    enum fa_status status = FA_OK;
    for (size_t n = 0; !status && n < sizeof questions / sizeof *questions; n++)
        status = fa_cuda_status(cudaDeviceGetAttribute(questions[n].value, questions[n].attribute, index),
                                "cudaDeviceGetAttribute", error);
    facts->capability = 10 * major + minor;
    return status;
}

/* Two threads that ask for the first time write the same values. */
const struct fa_cuda_device *fa_cuda_device(int64_t index, struct fa_error *error)
{
    static struct { struct fa_cuda_device facts; atomic_bool known; } cache[DEVICES];
    if (index < 0 || index >= DEVICES) {
        fa_fail(error, FA_UNSUPPORTED, "the device index must lie between 0 and %d, got %lld", DEVICES - 1, (long long)index);
        return NULL;
    }
    if (!atomic_load_explicit(&cache[index].known, memory_order_acquire)) {
        struct fa_cuda_device facts;
        if (ask((int)index, &facts, error)) return NULL;
        cache[index].facts = facts;
        atomic_store_explicit(&cache[index].known, true, memory_order_release);
    }
    return &cache[index].facts;
}

enum fa_status fa_cuda_enter(int64_t index, int *previous, struct fa_error *error)
{
    enum fa_status status = fa_cuda_status(cudaGetDevice(previous), "cudaGetDevice", error);
    if (status || *previous == index) return status;
    return fa_cuda_status(cudaSetDevice((int)index), "cudaSetDevice", error);
}

void fa_cuda_leave(int64_t index, int previous)
{
    if (previous != index) cudaSetDevice(previous);
}

size_t fa_cuda_info(char *text, size_t size)
{
    int devices = 0, driver = 0;
    const cudaError_t code = cudaGetDeviceCount(&devices);
    cudaDriverGetVersion(&driver);
    int length = snprintf(text, size, "CUDA %d.%d, built for %s; driver for CUDA %d.%d%s; %s\n", CUDA_MAJOR, CUDA_MINOR,
                          FA_CUDA_ARCHS, driver / 1000, driver % 1000 / 10, driver ? "" : " (none)",
                          code ? cudaGetErrorString(code) : "devices:");
    for (int n = 0; n < devices && length >= 0; n++) {
        struct cudaDeviceProp device;
        char line[sizeof device.name + 128];
        if (cudaGetDeviceProperties(&device, n)) break;
        const int added = snprintf(line, sizeof line, "  cuda:%d %s, capability %d.%d, %d KB of shared memory a block\n",
                                   n, device.name, device.major, device.minor, (int)(device.sharedMemPerBlockOptin >> 10));
        if (text && (size_t)length < size) snprintf(text + length, size - (size_t)length, "%s", line);
        length += added;
    }
    return length > 0 ? (size_t)length : 0;
}
