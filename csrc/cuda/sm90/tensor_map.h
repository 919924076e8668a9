/* cuda/sm90/tensor_map.h: how a kernel tells TMA what a tensor looks like. */
#ifndef FA_SM90_TENSOR_MAP_H
#define FA_SM90_TENSOR_MAP_H

#include "../../flash_attn.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The driver's CUtensorMap, without its header. */
struct
#ifdef __cplusplus
alignas(64)
#endif
fa_tensor_map {
#ifndef __cplusplus
    _Alignas(64)
#endif
    uint64_t opaque[16];
};

/* Describes t (b, s, h, d) to TMA, with coordinates (channel, row, head, batch) and boxes of box_rows rows of 128 bytes,
 * swizzled. Needs an aligned pointer and strides (16 bytes); rows past s and channels past d read as 0. */
enum fa_status fa_tensor_map_encode(struct fa_tensor_map *map, enum fa_dtype dtype, const struct fa_tensor *t,
                                    int64_t d, int64_t s, int64_t h, int64_t b, int box_rows, struct fa_error *error);

/* Rows of 32-bit words, a multiple of 4 of them, in planes that follow each other: coordinates (word, row, plane, 0), boxes of
 * 4 words x box_rows rows, not swizzled. */
enum fa_status fa_tensor_map_encode_words(struct fa_tensor_map *map, const uint32_t *words, int64_t per_row, int64_t rows, int64_t planes,
                                          int box_rows, struct fa_error *error);

#ifdef __cplusplus
}
#endif
#endif
