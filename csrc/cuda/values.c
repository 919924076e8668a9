/* cuda/values.c: FLASH_ATTN_DEBUG=1: checks cu_seqlens and seqused_k in device memory as check.c does on the CPU, by a copy. */
#include <stdlib.h>

#include "device.h"

static enum fa_status check_capture(const struct fa_params *p, struct fa_error *error)
{
    enum cudaStreamCaptureStatus capture;
    enum fa_status status = fa_cuda_status(cudaStreamIsCapturing(p->stream, &capture), "cudaStreamIsCapturing", error);
    if (status || capture == cudaStreamCaptureStatusNone) return status;
    return fa_fail(error, FA_UNSUPPORTED, "FLASH_ATTN_DEBUG=1 reads cu_seqlens and seqused_k on the host, which a stream "
                   "under capture cannot do; unset it to capture a CUDA graph");
}

/* Copies `count` numbers to `host` and lets *values point there; an absent tensor stays absent. */
static enum fa_status fetch(const int32_t **values, int32_t *host, int64_t count, void *stream, struct fa_error *error)
{
    if (!*values || count == 0) return FA_OK;
    const cudaError_t code = cudaMemcpyAsync(host, *values, (size_t)count * sizeof *host, cudaMemcpyDeviceToHost, stream);
    *values = host;
    return fa_cuda_status(code, "cudaMemcpyAsync", error);
}

enum fa_status fa_cuda_check_values(const struct fa_params *p, struct fa_error *error)
{
    struct fa_params on_host = *p;
    const int64_t count = p->b + 1;
    if (!p->cu_q && !p->cu_k && !p->seqused_k) return FA_OK;
    enum fa_status status = check_capture(p, error);
    int32_t *host = status ? NULL : malloc(3 * (size_t)count * sizeof *host);
    if (!status && !host) status = fa_fail(error, FA_FAILED, "no memory for %lld sequence offsets", (long long)count);
    if (!status) status = fetch(&on_host.cu_q, host, count, p->stream, error);
    if (!status) status = fetch(&on_host.cu_k, host + count, count, p->stream, error);
    if (!status) status = fetch(&on_host.seqused_k, host + 2 * count, p->b, p->stream, error);
    if (!status) status = fa_cuda_status(cudaStreamSynchronize(p->stream), "cudaStreamSynchronize", error);
    if (!status) status = fa_check_sequences(&on_host, error);
    free(host);
    return status;
}
