/* cpu/ops.h: the micro-kernels that an instruction set supplies. Blocking, masks and threads are ISA-free (forward.c,
 * backward.c); everything that touches more than a row's bookkeeping goes through this table.
 *
 * Operands of products belong to the table: fp32, or bfloat16 in tables that serve bfloat16 tensors only. The left operand
 * is rows of a plain matrix. The right operand comes in panels of NR columns:
 *   fp32   each [k][NR]; a row-major matrix is the special case panel stride = NR
 *   bf16   each [k / 32] tiles of [16][NR = 16][2]: pairs of k side by side (ops_bf16.h)
 * and what turns tensors into operands, or a tile of S into one, is therefore in the table as well. */
#ifndef FA_CPU_OPS_H
#define FA_CPU_OPS_H

#include "../common/internal.h"

enum {
    FA_MAX_CHANNELS = 256,
    FA_ROW_PAD = 32,            /* operands and results of products may have this many rows more, up to the next multiple */
    FA_PIECE = 16,              /* dropout bytes come in 16x16 pieces (common/philox.h) */
};

struct fa_left  { const void *ptr; int64_t row; };           /* element (i, p) at ptr[i row + p] */
struct fa_right { const void *ptr; int64_t row, panel; };    /* panel j / NR at ptr[j / NR panel], its k-th row at ptr[k row] */
struct fa_result { float *ptr; int64_t row; };

/* A block of S is m rows by n keys, worked on `strip` rows at a time. */
struct fa_cpu_blocks { int64_t m, n, strip; };

/* Where softmax_backward leaves a strip's operands. */
struct fa_gradients { void *p, *ds, *ds_sum; bool keep_ds; };

/* What else there is to the scores of a strip, one pointer a row: a bias of any dtype but float64, and a mask. */
struct fa_score_terms {
    const void *bias[FA_ROW_PAD];
    const uint8_t *mask[FA_ROW_PAD];
    enum fa_dtype dtype;
    bool has_bias, has_mask;
};

struct fa_cpu_ops {
    const char *isa;
    int64_t nr;                         /* columns of a panel */
    int64_t element;                    /* bytes of an operand's element */
    int64_t pad;                        /* channels of operands, and columns of S, are padded with zeros to this */
    int64_t row_panel;                  /* panel stride of what load_right makes */
    struct fa_cpu_blocks forward, backward;

    /* dst (rows, ld), a left operand, <- src (rows, n) of any dtype but float64; channels n..ld become 0. */
    void (*load_rows)(void *dst, int64_t ld, const void *src, enum fa_dtype dtype, int64_t stride, int64_t rows, int64_t n);
    /* dst, the right operand of a product that sums over these rows: row stride ld, panel stride row_panel. */
    void (*load_right)(void *dst, int64_t ld, const void *src, enum fa_dtype dtype, int64_t stride, int64_t rows, int64_t n);
    /* dst, the right operand of a product that sums over channels, <- the transpose of left operand src (rows, ld): panels
     * of k padded rows; rows up to the next multiple of NR become 0. */
    void (*pack_transposed)(void *dst, const void *src, int64_t ld, int64_t rows, int64_t k);
    /* dst (k, ld) <- the transpose of left operand src (rows, src_ld), for sum_rows; NULL where that takes src itself. */
    void (*pack_columns)(void *dst, int64_t ld, const void *src, int64_t src_ld, int64_t rows, int64_t k);
    /* dst (n,) of dtype <- factor * src (n,). */
    void (*store_row)(void *dst, enum fa_dtype dtype, const float *src, int64_t n, float factor);

    /* dst (rows, stride) of dtype <- src (rows, n), past the caches: for what is larger than they are. */
    void (*stream_rows)(void *dst, enum fa_dtype dtype, int64_t stride, struct fa_result src, int64_t rows, int64_t n);

    /* C (m, n) = A (m, k) B (k, n), or += if accumulate; n and k are multiples of `pad`, but fp32's k is any. */
    void (*gemm)(struct fa_result c, struct fa_left a, struct fa_right b, int64_t m, int64_t n, int64_t k, bool accumulate);
    /* Sums (keys, channels) += P^T X over the rows of a block; p as softmax_backward left it, X of load_rows or pack_columns
     * with row stride x.row. The sums lie as the table likes, c.row floats apart, until store_sums. */
    void (*sum_rows)(struct fa_result c, struct fa_left p, struct fa_left x, int64_t keys, int64_t channels, int64_t rows);
    void (*store_sums)(void *dst, enum fa_dtype dtype, int64_t stride, struct fa_result c, int64_t keys, int64_t n, float factor);

    /* Row by row over S (rows, n), n a multiple of `pad`: the online softmax. P <- Z exp2(scale (S - max)), a left operand
     * with S's row stride, which may be S itself if it has fp32's size; max, sum and the rows of O (rows, channels) are brought
     * up to date with the new maximum (bfloat16: with one that lies at most 2^8 below it). Z, laid out as S, may be NULL. */
    void (*online_softmax)(struct fa_result s, int64_t rows, int64_t n, float scale, float *max, float *sum,
                           struct fa_result o, int64_t channels, const float *z, void *p);
    /* P = exp2(scale (S - lse)), dS = P (Z dP - delta) D; Z and D, laid out as S, may be NULL. P Z and dS are left as operands
     * in t: ds for dQ = dS K; p and ds_sum for sum_rows. fp32 works in place: S becomes p, dP becomes ds and ds_sum. With keep_ds
     * dP always becomes dS, in bfloat16's tables without its factor D. */
    void (*softmax_backward)(struct fa_result s, struct fa_result dp, int64_t rows, int64_t n, float scale,
                             const float *lse, const float *delta, const float *z, const float *d, struct fa_gradients t);

    /* gemm and online_softmax in one; gemms and softmax_backward in one: for at most FA_ROW_PAD rows of scores factor (Q K^T) +
     * terms, n a multiple of `pad`. False: the caller is to take the separate steps instead; of its operands only P may have
     * been written, and max moved from -inf. NULL where a table has no such thing. With ds that is dS before it is rounded, ld
     * floats a row as the operands. */
    bool (*softmax_of_products)(struct fa_left q, struct fa_right k, int64_t m, int64_t n, int64_t d, float factor,
                                const struct fa_score_terms *terms, float scale, float *max, float *sum, struct fa_result o,
                                int64_t channels, struct fa_left p);
    bool (*gradients_of_products)(struct fa_left q, struct fa_right k, struct fa_left dout, struct fa_right v, int64_t m, int64_t n,
                                  int64_t d, int64_t dv, float factor, const struct fa_score_terms *terms, float scale,
                                  const float *lse, const float *delta, float *ds, struct fa_gradients t, int64_t ld);

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
    /* Of two rows of left operands. */
    float (*dot)(const void *x, const void *y, int64_t n);
    float (*sum)(const float *x, int64_t n);
    /* to (n,) <- x + y; n is any, and to may be either. */
    void (*add_row)(float *to, const float *x, const float *y, int64_t n);

    /* z (16, 16) <- 0 or kept, the dropout mask of one piece of S. */
    void (*dropout_piece)(float *z, uint64_t seed, uint64_t offset, uint32_t batch_head, uint32_t piece_i, uint32_t piece_j,
                          int keep256, float kept);

    /* Around a thread's work: AMX has tile registers to set up, and to give back. NULL where there is nothing to do. */
    void (*enter)(void);
    void (*leave)(void);
};

/* The best table that this CPU has for tensors of a dtype, capped by FLASH_ATTN_CPU_ISA (generic, avx2, avx512, avx512_bf16, amx). */
const struct fa_cpu_ops *fa_cpu_ops(enum fa_dtype dtype);

/* Each level of the walk, for the checker: NULL where the machine or the build lacks it. */
enum fa_cpu_level { FA_CPU_GENERIC, FA_CPU_AVX2, FA_CPU_AVX512, FA_CPU_AVX512_BF16, FA_CPU_AMX, FA_CPU_LEVELS };
const struct fa_cpu_ops *fa_cpu_ops_at(enum fa_cpu_level level);

#endif
