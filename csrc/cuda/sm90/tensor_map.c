/* cuda/sm90/tensor_map.c: encodes TMA descriptors by the driver's own function, found at run time: nothing links libcuda. */
#include <assert.h>
#include <cuda.h>

#include "../device.h"
#include "tensor_map.h"

static_assert(sizeof(struct fa_tensor_map) == sizeof(CUtensorMap) && _Alignof(struct fa_tensor_map) == 64, "the driver's map");

enum { ENCODE_SINCE = 12000, BOX_BYTES = 128, BOX_WORDS = 4 };

typedef CUresult encode_tiled(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *,
                              const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* Found once: the driver does not change. Two threads that race write the same pointer. NULL with a message where it has none. */
static encode_tiled *find_encode(struct fa_error *error)
{
    static encode_tiled *found;
    encode_tiled *encode = __atomic_load_n(&found, __ATOMIC_RELAXED);
    enum cudaDriverEntryPointQueryResult result;
    void *address = NULL;
    if (encode) return encode;
    if (fa_cuda_status(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, ENCODE_SINCE, cudaEnableDefault, &result),
                       "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)", error)) return NULL;
    if (!address) fa_fail(error, FA_FAILED, "the driver has no cuTensorMapEncodeTiled, which came with CUDA 12.0");
    encode = (encode_tiled *)address;
    __atomic_store_n(&found, encode, __ATOMIC_RELAXED);
    return encode;
}

/* A thread new to CUDA, as autograd's may be, has no context before cudaSetDevice. */
static CUresult encode_here(struct fa_tensor_map *map, CUtensorMapDataType type, void *ptr, const cuuint64_t (*dims)[4],
                            const cuuint64_t (*strides)[3], const cuuint32_t (*box)[4], CUtensorMapSwizzle swizzle, encode_tiled *encode)
{
    const cuuint32_t steps[4] = { 1, 1, 1, 1 };
    CUresult result = CUDA_ERROR_INVALID_CONTEXT;
    int device;
    for (int attempt = 0; attempt < 2 && result == CUDA_ERROR_INVALID_CONTEXT; attempt++) {
        if (attempt && (cudaGetDevice(&device) || cudaSetDevice(device))) break;
        result = encode((CUtensorMap *)map, type, 4, ptr, *dims, *strides, *box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    }
    return result;
}

enum fa_status fa_tensor_map_encode(struct fa_tensor_map *map, enum fa_dtype dtype, const struct fa_tensor *t,
                                    int64_t d, int64_t s, int64_t h, int64_t b, int box_rows, struct fa_error *error)
{
    const cuuint64_t size = fa_sizeof(dtype), row = (cuuint64_t)d * size, aligned_row = (row + 15) / 16 * 16;
    const cuuint64_t dims[4] = { (cuuint64_t)d, (cuuint64_t)s, (cuuint64_t)h, (cuuint64_t)b };
    const cuuint64_t strides[3] = {             /* of an index that is always 0, any will do */
        s > 1 ? (cuuint64_t)t->stride_s * size : aligned_row, h > 1 ? (cuuint64_t)t->stride_h * size : aligned_row,
        b > 1 ? (cuuint64_t)t->stride_b * size : aligned_row };
    const cuuint32_t box[4] = { (cuuint32_t)(BOX_BYTES / size), (cuuint32_t)box_rows, 1, 1 };
    const CUtensorMapDataType type = dtype == FA_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                   : dtype == FA_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    encode_tiled *encode = find_encode(error);
    if (!encode) return FA_FAILED;
    const CUresult result = encode_here(map, type, t->ptr, &dims, &strides, &box, CU_TENSOR_MAP_SWIZZLE_128B, encode);
    if (result == CUDA_SUCCESS) return FA_OK;
    return fa_fail(error, FA_FAILED, "cuTensorMapEncodeTiled: error %d for a tensor of (%lld, %lld, %lld, %lld) at %p", (int)result,
                   (long long)b, (long long)s, (long long)h, (long long)d, t->ptr);
}

enum fa_status fa_tensor_map_encode_words(struct fa_tensor_map *map, const uint32_t *words, int64_t per_row, int64_t rows, int64_t planes,
                                          int box_rows, struct fa_error *error)
{
    const cuuint64_t row = (cuuint64_t)per_row * sizeof *words, dims[4] = { (cuuint64_t)per_row, (cuuint64_t)rows, (cuuint64_t)planes, 1 };
    const cuuint64_t strides[3] = { row, row * (cuuint64_t)rows, row * (cuuint64_t)(rows * planes) };
    const cuuint32_t box[4] = { BOX_WORDS, (cuuint32_t)box_rows, 1, 1 };
    encode_tiled *encode = find_encode(error);
    if (!encode) return FA_FAILED;
    const CUresult result = encode_here(map, CU_TENSOR_MAP_DATA_TYPE_UINT32, (void *)words, &dims, &strides, &box, CU_TENSOR_MAP_SWIZZLE_NONE, encode);
    if (result == CUDA_SUCCESS) return FA_OK;
    return fa_fail(error, FA_FAILED, "cuTensorMapEncodeTiled: error %d for %lld planes of %lld rows of %lld words at %p", (int)result,
                   (long long)planes, (long long)rows, (long long)per_row, (const void *)words);
}
