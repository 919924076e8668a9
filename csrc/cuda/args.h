/* cuda/args.h: what a launch hands to a kernel: the call, and what the host worked out of it once. Plain C. */
#ifndef FA_CUDA_ARGS_H
#define FA_CUDA_ARGS_H

#include "../flash_attn.h"

/* Compile-time variants, each able to do all before it. Lengths, windows and causal bounds are in every one. The last:
 * dropout with neither score mod nor bias nor mask, as training has it. */
enum fa_variant { FA_PLAIN, FA_SCORE_MOD, FA_DROPOUT, FA_VARIANTS, FA_PLAIN_DROPOUT = FA_VARIANTS, FA_SM80_VARIANTS };
#define FA_HAS_MODS(variant)    ((variant) == FA_SCORE_MOD || (variant) == FA_DROPOUT)
#define FA_HAS_DROPOUT(variant) ((variant) >= FA_DROPOUT)

/* attn_mask as the kernels read it, see mask.cuh: a bit a key, and a bit a tile. Size 1 and step 0: the same along this index. */
struct fa_cuda_mask {
    uint32_t *bits;                 /* (planes, rows, words): bit j % 32 of word j / 32: query sees key j; 0 beyond sk. NULL: no mask */
    uint32_t *some, *all;           /* (planes, outer, tile_words): bit per inner tile: some key, or every key, of it is visible */
    int plane_b, plane_h;           /* the plane of (b, head) is b plane_b + head plane_h */
    int rows, words;
    bool outer_is_keys;             /* backward: a row of flags is of a key tile, its bits are of query tiles; forward: the reverse */
    int outer, tile_words;
    int block_m, block_n;
};

struct fa_cuda_args {
    struct fa_params p;
    int   group;                    /* query heads per key/value head */
    int   m_tiles, n_tiles;         /* of the longest sequence */
    int   window_left, window_right;/* negative: unlimited */
    float scale, softcap;
    bool  score_mod;                /* scores pass through modify_score: softcap, ALiBi, or scale <= 0 */
    float exponent_scale;           /* P = exp2(exponent_scale * score - ...): score is q.k, or in natural units with a score mod or bias */
    float lse_scale, lse_exponent;  /* backward: P = exp2(lse_exponent (lse_scale score - lse2)), see prepare.cu */
    float bias_scale;               /* score = bias_scale * (q.k, or what modify_score made of it) + bias */
    bool  bias_staged;              /* bias tiles come through shared memory: in the data's type, rows aligned, and there is room */
    bool  batch_fastest;            /* neighbouring blocks share head and tile, not sequence: the bias is the same for all sequences */
    struct fa_cuda_mask mask;
    struct fa_scores wide_bias;     /* attn_bias in float64: p.bias is a copy in fp32, contiguous, by narrow.cu */
    int   keep256;
    float kept;                     /* 256 / keep256 */
    bool  whole_q, whole_k, whole_v, whole_dout;    /* rows aligned to 16 bytes, of d_bucket channels */
    bool  aligned_q, aligned_k, aligned_v, aligned_out, aligned_dout, aligned_dq, aligned_dk, aligned_dv;
    int   d_bucket;                 /* channels of a row of dq_accum and of partial outputs */

    int   splits;                   /* forward: over the keys */
    float *partial_out;             /* (splits, rows, d_bucket): normalised */
    void *partial_lse;              /* (splits, rows) float2, see combine.cu: rows = sum over sequences and heads, index (b h) or (h, total) as lse */

    int   row_pad, padded_rows;     /* backward: rows per head (packed) or per sequence and head, see dq_layout.cuh */
    float *dq_accum;                /* (padded rows, d_bucket) fp32, in the order of dq_layout.cuh */
    bool  dq_is_made;               /* the main kernel turns the sums into dq */
    int   *counters, counts;        /* sm90: `counts` ints that start at 0, see sm90/backward_args.h */
    float *lse2, *delta;            /* (padded rows,); lse as prepare.cu has it, +inf where every P is 0, padding included */
    int   *turns;                   /* (padded rows / 16,), with p.deterministic: key tiles that have added to a row tile's dq */

    int   parts;                    /* bias gradient: blocks that share the sum of one tile, see bias_gradient.cuh */
    float *partial_dbias;           /* (parts, elements of dbias), where parts > 1 */
};

/* One compiled kernel and the tile it works on; `blocks` of them should share a multiprocessor. Staged bias tiles take bias_bytes on
 * top of shared_bytes. */
struct fa_cuda_kernel { const void *function; int threads, shared_bytes, block_m, block_n, blocks, bias_bytes; };

#endif
