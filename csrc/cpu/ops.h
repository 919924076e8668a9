/* cpu/ops.h: the micro-kernels that an instruction set supplies. Blocking, masks and threads are ISA-free (forward.c,
 * backward.c); everything that touches more than a row's bookkeeping goes through this table.
 *
 * Operands of products are fp32. The left operand is rows (or, for P^T and dS^T, columns) of a plain matrix. The right
 * operand comes in panels of NR columns, each [k][NR]; a row-major matrix is the special case panel stride = NR. An
 * instruction set with its own operand format (AMX tiles) changes load_rows, pack_transposed and gemm together. */
#ifndef FA_CPU_OPS_H
#define FA_CPU_OPS_H

#include "../common/internal.h"

#define FA_CHANNEL_PAD 16       /* channels of fp32 copies, and columns of S, are padded with zeros to this */
enum {
    FA_MAX_CHANNELS = 256,
    FA_PIECE = 16,              /* dropout bytes come in 16x16 pieces (common/philox.h) */
};

struct fa_left  { const float *ptr; int64_t row, col; };     /* element (i, p) at ptr[i row + p col]; row or col is 1 */
struct fa_right { const float *ptr; int64_t row, panel; };   /* element (p, j) at ptr[j / NR panel + p row + j % NR] */
struct fa_result { float *ptr; int64_t row; };

struct fa_cpu_ops {
    const char *isa;
    int64_t nr;

    /* dst (rows, ld) fp32 <- src (rows, n) of any dtype but float64; channels n..ld become 0. */
    void (*load_rows)(float *dst, int64_t ld, const void *src, enum fa_dtype dtype, int64_t stride, int64_t rows, int64_t n);
    /* dst (n,) of dtype <- factor * src (n,). */
    void (*store_row)(void *dst, enum fa_dtype dtype, const float *src, int64_t n, float factor);
    /* dst: panels [k padded][NR] of the transpose of src (rows, ld); rows up to the next multiple of NR become 0. */
    void (*pack_transposed)(float *dst, const float *src, int64_t ld, int64_t rows, int64_t k);

    /* C (m, n) = A (m, k) B (k, n), or += if accumulate; n counts whole vectors: a multiple of FA_CHANNEL_PAD. */
    void (*gemm)(struct fa_result c, struct fa_left a, struct fa_right b, int64_t m, int64_t n, int64_t k, bool accumulate);

    /* Row by row over S (rows, n), n a multiple of FA_CHANNEL_PAD: the online softmax. S <- exp2(scale S - scale m);
     * max, sum and the rows of O (rows, channels) are brought up to date with the new maximum. */
    void (*online_softmax)(struct fa_result s, int64_t rows, int64_t n, float scale, float *max, float *sum,
                           struct fa_result o, int64_t channels);
    /* P = exp2(scale (S - lse)), dS = P (Z dP - delta) D, P Z. In place: S becomes P Z, dP becomes dS; Z and D may be NULL. */
    void (*softmax_backward)(struct fa_result s, struct fa_result dp, int64_t rows, int64_t n, float scale,
                             const float *lse, const float *delta, const float *z, const float *d);

    /* S <- outer tanh(inner S); derivative, if wanted, <- 1 - tanh^2, laid out as S. */
    void (*softcap)(struct fa_result s, int64_t rows, int64_t n, float inner, float outer, float *derivative);
    void (*scale)(struct fa_result s, int64_t rows, int64_t n, float factor);
    void (*multiply)(struct fa_result s, int64_t rows, int64_t n, const float *z);
    /* s_j -= slope |distance - j| for j in [0, n). */
    void (*alibi_row)(float *s, int64_t n, float slope, float distance);
    /* S <- factor S + bias, (rows, n) of any dtype but float64 at `stride`, which may be 0; n is any. */
    void (*add_bias)(struct fa_result s, int64_t rows, int64_t n, float factor, const void *bias, enum fa_dtype dtype, int64_t stride);
    /* S <- -inf where the mask, a byte an element, is 0. */
    void (*apply_mask)(struct fa_result s, int64_t rows, int64_t n, const uint8_t *mask, int64_t stride);
    float (*dot)(const float *x, const float *y, int64_t n);

    /* z (16, 16) <- 0 or kept, the dropout mask of one piece of S. */
    void (*dropout_piece)(float *z, uint64_t seed, uint64_t offset, uint32_t batch_head, uint32_t piece_i, uint32_t piece_j,
                          int keep256, float kept);
};

/* The best table that this CPU runs, capped by FLASH_ATTN_CPU_ISA (generic, avx2, avx512). */
const struct fa_cpu_ops *fa_cpu_ops(void);

/* Each level of the walk, for the checker: NULL where the machine or the build lacks it. */
enum fa_cpu_level { FA_CPU_GENERIC, FA_CPU_AVX2, FA_CPU_AVX512, FA_CPU_LEVELS };
const struct fa_cpu_ops *fa_cpu_ops_at(enum fa_cpu_level level);

#endif
