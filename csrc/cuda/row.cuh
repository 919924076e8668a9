/* cuda/row.cuh: rows of tensors for the helper kernels: eight lanes share a row, eight channels at a time each. */
#ifndef FA_ROW_CUH
#define FA_ROW_CUH

#include "launch.h"
#include "sequence.cuh"

enum : int { HELPER_THREADS = 256, ROW_LANES = 8, CHUNK = 8, HELPER_ROWS = HELPER_THREADS / ROW_LANES };

template <enum fa_dtype T> struct element { using type = uint16_t; };
template <> struct element<FA_FLOAT32> { using type = float; };

template <enum fa_dtype T> FA_DEVICE float to_float(typename element<T>::type x)
{
    if constexpr (T == FA_FLOAT32) return x;
    else return unpack<T>(x);
}
template <enum fa_dtype T> FA_DEVICE typename element<T>::type from_float(float x)
{
    if constexpr (T == FA_FLOAT32) return x;
    else return (uint16_t)pack<T>(x, 0.0f);
}

/* Up to eight elements of a row; those that do not exist (from `left` on) are 0. */
template <enum fa_dtype T>
FA_DEVICE void load_chunk(float (&x)[CHUNK], const typename element<T>::type *from, int left, bool aligned)
{
    constexpr int VECTORS = sizeof(*from) * CHUNK / 16, PER_VECTOR = CHUNK / VECTORS;
    if (aligned && left >= CHUNK) {
        #pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            const uint4 raw = ((const uint4 *)from)[v];
            const auto *values = (const typename element<T>::type *)&raw;
            #pragma unroll
            for (int e = 0; e < PER_VECTOR; e++) x[v * PER_VECTOR + e] = to_float<T>(values[e]);
        }
    } else {
        #pragma unroll
        for (int e = 0; e < CHUNK; e++) x[e] = e < left ? to_float<T>(from[e]) : 0.0f;
    }
}

template <enum fa_dtype T>
FA_DEVICE void store_chunk(typename element<T>::type *to, const float (&x)[CHUNK], int left, bool aligned)
{
    constexpr int VECTORS = sizeof(*to) * CHUNK / 16, PER_VECTOR = CHUNK / VECTORS;
    if (aligned && left >= CHUNK) {
        #pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            uint4 raw;
            auto *values = (typename element<T>::type *)&raw;
            #pragma unroll
            for (int e = 0; e < PER_VECTOR; e++) values[e] = from_float<T>(x[v * PER_VECTOR + e]);
            ((uint4 *)to)[v] = raw;
        }
    } else {
        #pragma unroll
        for (int e = 0; e < CHUNK; e++)
            if (e < left) to[e] = from_float<T>(x[e]);
    }
}

/* Zeroes a row: all its lanes together. */
template <enum fa_dtype T> FA_DEVICE void zero_row(typename element<T>::type *to, int channels, bool aligned, int lane)
{
    const float zero[CHUNK] = {};
    for (int c = lane * CHUNK; c < channels; c += ROW_LANES * CHUNK) store_chunk<T>(to + c, zero, channels - c, aligned);
}

template <enum fa_dtype T> FA_DEVICE typename element<T>::type *row_at(const fa_tensor &t, int b, int64_t row, int head)
{
    return (typename element<T>::type *)t.ptr + b * t.stride_b + row * t.stride_s + head * t.stride_h;
}

/* Sum over the lanes of a row. */
FA_DEVICE float row_sum(float x)
{
    #pragma unroll
    for (int mask = 1; mask < ROW_LANES; mask *= 2) x += shuffle_xor(x, mask);
    return x;
}

/* Which row of which head this thread of block `block` works on, in a grid of b h ceil(rows / block_rows) blocks; the first of several,
 * which are HELPER_ROWS apart. */
struct helper_row { int b, head, i, lane; };

FA_DEVICE helper_row helper_row_of(const fa_cuda_args &a, int block, int rows, int block_rows)
{
    const int per_head = (rows + block_rows - 1) / block_rows, batch_head = block / per_head;
    return { batch_head / (int)a.p.h, batch_head % (int)a.p.h,
             (int)(block % per_head * block_rows + threadIdx.x / ROW_LANES), (int)(threadIdx.x % ROW_LANES) };
}

FA_DEVICE helper_row helper_row_of(const fa_cuda_args &a, int rows) { return helper_row_of(a, (int)blockIdx.x, rows, HELPER_ROWS); }

/* Defines fa_cuda_<name>: the kernel name<T> of each type, `rows` rows a block. */
#define FA_CUDA_HELPER(name, rows) \
    extern "C" const struct fa_cuda_kernel *fa_cuda_##name(enum fa_dtype dtype) \
    { \
        static const struct fa_cuda_kernel kernels[] = { \
            { (const void *)name##_kernel<FA_FLOAT32>, HELPER_THREADS, 0, rows, 0, 0 }, \
            { (const void *)name##_kernel<FA_FLOAT16>, HELPER_THREADS, 0, rows, 0, 0 }, \
            { (const void *)name##_kernel<FA_BFLOAT16>, HELPER_THREADS, 0, rows, 0, 0 } }; \
        return &kernels[dtype]; \
    }

#endif
