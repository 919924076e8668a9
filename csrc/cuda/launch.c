/* cuda/launch.c: the host side of the kernels for sm_80 and newer: their row of the kernel table.
 *
 *     forward     main kernel, over splits of the keys if tiles are few | combine, if split | fill, if packed | dmask
 *     backward    prepare | main kernel | convert | bias gradient | fill, if packed or seqused_k
 *     both start with pack, if there is a mask
 *
 * A call becomes a plan: the compiled kernel, its arguments, its pieces of the workspace. The plan is a pure function of
 * the call, the device and FLASH_ATTN_SMEM_KB, so that results are too. Nothing here waits for the device, reads its memory
 * or keeps state, so calls can be captured into CUDA graphs; the exception is FLASH_ATTN_DEBUG=1, which checks values. */
#include <stdlib.h>

#include "../common/philox.h"
#include "device.h"
#include "launch.h"

#define LOG2E 1.44269504088896340736

/* Below this, row and key numbers and sums of two of them are exact in 32 bits. */
#define ROW_LIMIT  ((int64_t)1 << 30)
#define GRID_LIMIT ((int64_t)INT32_MAX)

enum { LARGEST_HEAD_DIM = 256, SMALLEST_CAPABILITY = 80, SMALLEST_BLOCK = 8, LARGEST_BLOCK = 128, ALIGNMENT = 128,
       MOST_SPLITS = 32, LEAST_KEYS_PER_SPLIT = 256, RESERVED_SHARED_BYTES = 1024, DEFAULT_SHARED_BYTES = 48 << 10,
       MASK_PAD = 128, NARROW_BLOCKS = 1 << 20, FILL_BLOCKS = 1024, MOST_BLOCKS_PER_GAP = 64 };

struct plan {
    struct fa_cuda_kernel kernel;   /* its shared memory with the bias tiles */
    struct fa_cuda_args args;
    int64_t bytes;                  /* of workspace */
};

static int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }
static int64_t pad(int64_t n, int64_t to) { return blocks_of(n, to) * to; }
static int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }
static int64_t most(int64_t x, int64_t y) { return x > y ? x : y; }

/* ---- which kernel ---- */

struct bucket { int channels; fa_cuda_find *forward, *backward; };

static const struct bucket half_buckets[] = {
    {  32, fa_sm80_forward_32,  fa_sm80_backward_32 },
    {  64, fa_sm80_forward_64,  fa_sm80_backward_64 },
    {  96, fa_sm80_forward_96,  fa_sm80_backward_96 },
    { 128, fa_sm80_forward_128, fa_sm80_backward_128 },
    { 192, fa_sm80_forward_192, fa_sm80_backward_192 },
    { LARGEST_HEAD_DIM, fa_sm80_forward_256, fa_sm80_backward_256 },
};
static const struct bucket fp32_buckets[] = {
    {  64, fa_sm80_fp32_forward_64,  fa_sm80_fp32_backward_64 },
    { 128, fa_sm80_fp32_forward_128, fa_sm80_fp32_backward_128 },
    { LARGEST_HEAD_DIM, fa_sm80_fp32_forward_256, fa_sm80_fp32_backward_256 },
};

static const struct bucket *bucket_of(const struct fa_params *p)
{
    const struct bucket *bucket = p->dtype == FA_FLOAT32 ? fp32_buckets : half_buckets;
    while (bucket->channels < most(p->d, p->d_v)) bucket++;
    return bucket;
}

bool fa_cuda_has_score_mod(const struct fa_params *p)
{
    return p->softcap > 0 || p->alibi || p->scale <= 0;
}

enum fa_variant fa_cuda_variant(const struct fa_params *p)
{
    if (fa_keep256(p->dropout_p) < 256) return FA_DROPOUT;
    return fa_cuda_has_score_mod(p) || p->bias.ptr || p->mask.ptr ? FA_SCORE_MOD : FA_PLAIN;
}

/* The sm80 family has a kernel for dropout alone. */
static enum fa_variant sm80_variant(const struct fa_params *p)
{
    const enum fa_variant variant = fa_cuda_variant(p);
    return variant == FA_DROPOUT && !fa_cuda_has_score_mod(p) && !p->bias.ptr && !p->mask.ptr ? FA_PLAIN_DROPOUT : variant;
}

/* Shared memory that a block may take: the device's, or less where FLASH_ATTN_SMEM_KB pretends a smaller device. */
int fa_cuda_shared_limit(const struct fa_cuda_device *device)
{
    const char *text = getenv("FLASH_ATTN_SMEM_KB");
    const int64_t pretended = text ? strtol(text, NULL, 10) : 0;
    return pretended > 0 ? (int)least(pretended << 10, device->shared_per_block) : device->shared_per_block;
}

/* The default tile where as many blocks of it fit a multiprocessor as it is meant for, else the small one if that is so of it, else
 * the first that fits at all; NULL where neither does. */
static const struct fa_cuda_kernel *find_kernel(enum fa_pass pass, const struct fa_params *p, const struct fa_cuda_device *device)
{
    fa_cuda_find *find = pass == FA_FORWARD ? bucket_of(p)->forward : bucket_of(p)->backward;
    const struct fa_cuda_kernel *fits = NULL;
    for (int small = 0; small < 2; small++) {
        const struct fa_cuda_kernel *kernel = find(p->dtype, sm80_variant(p), small);
        if (kernel->shared_bytes > fa_cuda_shared_limit(device)) continue;
        if (kernel->blocks * (kernel->shared_bytes + RESERVED_SHARED_BYTES) <= device->shared_per_multiprocessor) return kernel;
        if (!fits) fits = kernel;
    }
    return fits;
}

/* ---- the plan ---- */

static bool is_aligned(const struct fa_params *p, const struct fa_tensor *t)
{
    const int64_t chunk = 16 / (int64_t)fa_sizeof(p->dtype);
    return (uintptr_t)t->ptr % 16 == 0 && t->stride_b % chunk == 0 && t->stride_s % chunk == 0 && t->stride_h % chunk == 0;
}

/* Whether bias tiles can come through shared memory by cp.async, and there is room. */
static bool can_stage_bias(const struct fa_params *p, const struct fa_cuda_kernel *kernel, const struct fa_cuda_device *device)
{
    const struct fa_scores *t = &p->bias;
    return t->ptr && t->dtype == p->dtype && t->dtype != FA_FLOAT32 && t->stride_k == 1 && (uintptr_t)t->ptr % 16 == 0
        && t->stride_b % 8 == 0 && t->stride_h % 8 == 0 && t->stride_q % 8 == 0
        && kernel->shared_bytes + kernel->bias_bytes <= fa_cuda_shared_limit(device);
}

static int window_of(int64_t bound) { return bound < 0 || bound >= ROW_LIMIT ? -1 : (int)bound; }

struct fa_cuda_args fa_cuda_arguments(const struct fa_params *p)
{
    const int keep256 = fa_keep256(p->dropout_p), bucket = bucket_of(p)->channels;
    return (struct fa_cuda_args){
        .p = *p, .group = (int)(p->h / p->hk),
        .window_left = window_of(p->window_left), .window_right = window_of(p->window_right),
        .scale = (float)p->scale, .softcap = (float)p->softcap,
        .score_mod = fa_cuda_has_score_mod(p),
        .exponent_scale = (float)(fa_cuda_has_score_mod(p) || p->bias.ptr ? LOG2E : p->scale * LOG2E),
        .lse_scale = p->bias.ptr ? 1.0f : (float)(fa_cuda_has_score_mod(p) ? LOG2E : p->scale * LOG2E),
        .lse_exponent = p->bias.ptr ? (float)LOG2E : 1.0f,
        .bias_scale = fa_cuda_has_score_mod(p) ? 1.0f : (float)p->scale,
        .batch_fastest = p->bias.ptr && p->b > 1 && p->bias.stride_b == 0 && (p->bias.stride_h != 0 || p->h == 1),
        .keep256 = keep256, .kept = 256.0f / (float)keep256,
        .aligned_q = is_aligned(p, &p->q), .aligned_k = is_aligned(p, &p->k), .aligned_v = is_aligned(p, &p->v),
        .aligned_out = is_aligned(p, &p->out), .aligned_dout = is_aligned(p, &p->dout), .aligned_dq = is_aligned(p, &p->dq),
        .aligned_dk = is_aligned(p, &p->dk), .aligned_dv = is_aligned(p, &p->dv),
        .whole_q = is_aligned(p, &p->q) && p->d == bucket, .whole_k = is_aligned(p, &p->k) && p->d == bucket,
        .whole_v = is_aligned(p, &p->v) && p->d_v == bucket, .whole_dout = is_aligned(p, &p->dout) && p->d_v == bucket,
        .d_bucket = bucket, .splits = 1,
    };
}

/* The next piece of the workspace; NULL while only its size is wanted. */
static void *take(const struct fa_cuda_args *a, int64_t bytes, int64_t *taken)
{
    char *base = a->p.workspace, *piece = base ? base + *taken : NULL;
    *taken += pad(bytes, ALIGNMENT);
    return piece;
}

static int64_t elements_of(const struct fa_scores *t, const struct fa_params *p)
{
    return (t->stride_b ? p->b : 1) * (t->stride_h ? p->h : 1) * (t->stride_q ? p->sq : 1) * (t->stride_k ? p->sk : 1);
}

/* A float64 bias is read from an fp32 copy. */
static void plan_narrow_bias(struct plan *plan)
{
    const struct fa_params *p = &plan->args.p;
    const struct fa_scores wide = p->bias;
    if (!wide.ptr || wide.dtype != FA_FLOAT64) return;
    const int64_t keys = wide.stride_k ? p->sk : 1, rows = wide.stride_q ? p->sq : 1, heads = wide.stride_h ? p->h : 1;
    plan->args.wide_bias = wide;
    plan->args.p.bias = (struct fa_scores){
        .ptr = take(&plan->args, most(1, elements_of(&wide, p)) * (int64_t)sizeof(float), &plan->bytes), .dtype = FA_FLOAT32,
        .stride_b = wide.stride_b ? heads * rows * keys : 0, .stride_h = wide.stride_h ? rows * keys : 0,
        .stride_q = wide.stride_q ? keys : 0, .stride_k = wide.stride_k ? 1 : 0,
    };
}

/* How well `splits` of each tile fill whole waves of `slots` blocks. */
static double wave_efficiency(int64_t tiles, int64_t splits, int64_t slots)
{
    return (double)(tiles * splits) / (double)pad(tiles * splits, slots);
}

/* Few tiles and many keys: several blocks share a tile's keys. The smallest number that fills the device nearly as well as the
 * best one, with enough keys each to pay for the merge. */
static int choose_splits(const struct plan *plan, const struct fa_cuda_device *device)
{
    const struct fa_cuda_kernel *kernel = &plan->kernel;
    const struct fa_cuda_args *a = &plan->args;
    const int64_t resident = device->shared_per_multiprocessor / (kernel->shared_bytes + RESERVED_SHARED_BYTES);
    const int64_t slots = device->multiprocessors * most(1, least(kernel->blocks, resident));
    const int64_t tiles = a->p.b * a->p.h * a->m_tiles;
    const bool bounded = a->window_left >= 0 && a->window_right >= 0;
    const int64_t visible = bounded ? (int64_t)a->window_left + a->window_right + kernel->block_m : a->p.sk;
    const int64_t key_tiles = least(a->n_tiles, blocks_of(visible, kernel->block_n) + bounded);
    const int64_t limit = least(MOST_SPLITS, key_tiles * kernel->block_n / LEAST_KEYS_PER_SPLIT);
    double best = 0;
    if (tiles == 0 || 10 * tiles >= 8 * slots) return 1;
    for (int64_t splits = 1; splits <= limit; splits++) {
        const double efficiency = wave_efficiency(tiles, splits, slots);
        if (efficiency > best) best = efficiency;
    }
    for (int64_t splits = 1; splits <= limit; splits++)
        if (wave_efficiency(tiles, splits, slots) >= 0.85 * best)
            return (int)blocks_of(key_tiles, blocks_of(key_tiles, splits));     /* none of them without keys */
    return 1;
}

static int64_t mask_planes(const struct fa_cuda_args *a)
{
    return (a->mask.plane_b ? a->p.b : 1) * (a->mask.plane_h ? a->p.h : 1);
}

/* Bits and flags of attn_mask: along an index with stride 0 there is one of them. */
void fa_cuda_plan_mask(enum fa_pass pass, struct fa_cuda_args *a, int block_m, int block_n, int64_t *bytes)
{
    struct fa_cuda_mask *m = &a->mask;
    const struct fa_scores *t = &a->p.mask;
    if (!t->ptr) return;
    m->plane_h = t->stride_h ? 1 : 0;
    m->plane_b = !t->stride_b ? 0 : t->stride_h ? (int)a->p.h : 1;
    m->rows = t->stride_q ? (int)a->p.sq : 1;
    m->words = t->stride_k ? (int)(pad(a->p.sk, MASK_PAD) / 32) : 1;
    m->block_m = block_m, m->block_n = block_n;
    m->outer_is_keys = pass == FA_BACKWARD;
    m->outer = m->outer_is_keys ? (m->words > 1 ? a->n_tiles : 1) : (m->rows > 1 ? a->m_tiles : 1);
    m->tile_words = m->outer_is_keys ? (m->rows > 1 ? (int)blocks_of(a->m_tiles, 32) : 1) : (m->words > 1 ? (int)blocks_of(a->n_tiles, 32) : 1);
    m->bits = take(a, mask_planes(a) * m->rows * m->words * (int64_t)sizeof(uint32_t), bytes);
    m->some = take(a, mask_planes(a) * m->outer * m->tile_words * (int64_t)sizeof(uint32_t), bytes);
    m->all = take(a, mask_planes(a) * m->outer * m->tile_words * (int64_t)sizeof(uint32_t), bytes);
}

static void plan_forward(struct plan *plan, const struct fa_cuda_device *device)
{
    struct fa_cuda_args *a = &plan->args;
    const int64_t rows = a->p.h * (a->p.cu_q ? a->p.total_q : a->p.b * a->p.sq);
    a->splits = choose_splits(plan, device);
    if (a->splits == 1) return;
    a->partial_out = take(a, a->splits * rows * a->d_bucket * (int64_t)sizeof(float), &plan->bytes);
    a->partial_lse = take(a, a->splits * rows * 2 * (int64_t)sizeof(float), &plan->bytes);
}

/* Tiles of dbias that blocks own: one along an index that is summed over. */
static int64_t dbias_tiles(const struct fa_params *p, const struct fa_cuda_kernel *kernel)
{
    const struct fa_scores *t = &p->dbias;
    return (t->stride_b ? p->b : 1) * (t->stride_h ? p->h : 1) * (t->stride_q ? blocks_of(p->sq, kernel->block_m) : 1)
         * (t->stride_k ? blocks_of(p->sk, kernel->block_n) : 1);
}

/* Few tiles: several blocks share the visits of each, as many as fill the device. */
void fa_cuda_plan_bias_gradient(struct fa_cuda_args *a, const struct fa_cuda_device *device, int64_t *bytes)
{
    const struct fa_cuda_kernel *kernel = fa_sm80_bias_gradient(a->p.dtype);
    const int64_t tiles = dbias_tiles(&a->p, kernel), slots = device->multiprocessors * (int64_t)kernel->blocks;
    const int64_t scores = a->p.b * a->p.h * blocks_of(a->p.sq, kernel->block_m) * blocks_of(a->p.sk, kernel->block_n);
    a->parts = 1;
    if (!a->p.dbias.ptr || tiles == 0 || scores == 0 || 2 * tiles > slots) return;
    a->parts = (int)least(scores / tiles, slots / tiles);
    if (a->parts > 1) a->partial_dbias = take(a, a->parts * elements_of(&a->p.dbias, &a->p) * (int64_t)sizeof(float), bytes);
}

void fa_cuda_plan_backward(struct fa_cuda_args *a, int row_pad, int64_t *bytes)
{
    const int64_t padded = a->p.cu_q ? pad(a->p.total_q, row_pad) + row_pad * a->p.b : pad(a->p.sq, row_pad);
    const int64_t rows = padded * a->p.h * (a->p.cu_q ? 1 : a->p.b);
    a->row_pad = row_pad;
    a->padded_rows = (int)padded;
    a->dq_accum = take(a, rows * a->d_bucket * (int64_t)sizeof(float), bytes);
    a->lse2 = take(a, rows * (int64_t)sizeof(float), bytes);
    a->delta = take(a, rows * (int64_t)sizeof(float), bytes);
    a->counters = take(a, a->counts * (int64_t)sizeof(int), bytes);
    if (a->p.deterministic) a->turns = take(a, rows / 16 * (int64_t)sizeof(int), bytes);
}

static enum fa_status make_plan(enum fa_pass pass, const struct fa_params *p, struct plan *plan, struct fa_error *error)
{
    const struct fa_cuda_device *device = fa_cuda_device(p->device_index, error);
    if (!device) return FA_FAILED;
    plan->bytes = 0;
    plan->args = fa_cuda_arguments(p);
    plan->kernel = *find_kernel(pass, p, device);
    plan->args.bias_staged = can_stage_bias(p, &plan->kernel, device);
    if (plan->args.bias_staged) plan->kernel.shared_bytes += plan->kernel.bias_bytes;
    plan->args.m_tiles = (int)blocks_of(p->sq, plan->kernel.block_m);
    plan->args.n_tiles = (int)blocks_of(p->sk, plan->kernel.block_n);
    plan_narrow_bias(plan);
    fa_cuda_plan_mask(pass, &plan->args, plan->kernel.block_m, plan->kernel.block_n, &plan->bytes);
    if (pass == FA_FORWARD) {
        plan_forward(plan, device);
    } else {
        fa_cuda_plan_backward(&plan->args, plan->kernel.block_m, &plan->bytes);
        fa_cuda_plan_bias_gradient(&plan->args, device, &plan->bytes);
    }
    return FA_OK;
}

static int64_t workspace(enum fa_pass pass, const struct fa_params *p)
{
    struct fa_params sizes = *p;
    struct fa_error unused;
    struct plan plan;
    sizes.workspace = NULL;
    return make_plan(pass, &sizes, &plan, &unused) ? 0 : plan.bytes;
}

/* ---- the launches ---- */

/* One kernel in the call's stream; none where there is nothing to do. `overlaps`: it may start while the one before it ends. */
static enum fa_status launch(const char *name, const struct fa_cuda_kernel *kernel, int64_t blocks, int splits, const void *args,
                             void *stream, bool overlaps, struct fa_error *error)
{
    struct cudaLaunchAttribute_st overlap = {
        .id = cudaLaunchAttributeProgrammaticStreamSerialization, .val.programmaticStreamSerializationAllowed = 1 };
    const struct cudaLaunchConfig_st config = {
        .gridDim = { (unsigned)blocks, (unsigned)splits, 1 }, .blockDim = { (unsigned)kernel->threads, 1, 1 },
        .dynamicSmemBytes = (size_t)kernel->shared_bytes, .stream = stream, .attrs = &overlap, .numAttrs = overlaps };
    void *values[] = { (void *)args };
    enum fa_status status = FA_OK;
    if (blocks == 0) return FA_OK;
    if (kernel->shared_bytes > DEFAULT_SHARED_BYTES)
        status = fa_cuda_status(cudaFuncSetAttribute(kernel->function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     kernel->shared_bytes), "cudaFuncSetAttribute", error);
    if (status) return status;
    return fa_cuda_status(cudaLaunchKernelExC(&config, kernel->function, values), name, error);
}

enum fa_status fa_cuda_launch(const char *name, const struct fa_cuda_kernel *kernel, int64_t blocks, int splits,
                              const void *args, void *stream, struct fa_error *error)
{
    return launch(name, kernel, blocks, splits, args, stream, false, error);
}

/* A helper kernel over `rows` rows of every head. */
static enum fa_status launch_rows(const char *name, fa_cuda_helper *helper, int64_t rows, const struct fa_cuda_args *args,
                                  bool overlaps, struct fa_error *error)
{
    const struct fa_cuda_kernel *kernel = helper(args->p.dtype);
    return launch(name, kernel, args->p.b * args->p.h * blocks_of(rows, kernel->block_m), 1, args, args->p.stream, overlaps, error);
}

enum fa_status fa_cuda_launch_rows(const char *name, fa_cuda_helper *helper, int64_t rows, const struct fa_cuda_args *args,
                                   struct fa_error *error)
{
    return launch_rows(name, helper, rows, args, false, error);
}

/* Blocks for the gaps before, between and after the sequences; how long the gaps are only the device knows. */
enum fa_status fa_cuda_launch_fill(fa_cuda_helper *helper, const struct fa_cuda_args *args, struct fa_error *error)
{
    const int64_t gaps = args->p.b + 1, each = most(1, least(MOST_BLOCKS_PER_GAP, FILL_BLOCKS / gaps));
    return fa_cuda_launch("launch of the fill kernel", helper(args->p.dtype), gaps * each, 1, args, args->p.stream, error);
}

/* The mask as bits, and the flags of its tiles: a byte of them a block, or one word where all inner tiles are alike. */
enum fa_status fa_cuda_launch_mask(const struct fa_cuda_args *a, struct fa_error *error)
{
    const struct fa_cuda_mask *m = &a->mask;
    const int64_t groups = (m->outer_is_keys ? m->rows : m->words) == 1 ? 1 : m->tile_words * 4;
    if (!m->bits || a->m_tiles == 0 || a->n_tiles == 0) return FA_OK;
    return fa_cuda_launch("launch of the pack kernel", fa_cuda_pack(a->p.dtype), mask_planes(a) * m->outer * groups, 1, a, a->p.stream, error);
}

/* What the kernels read in place of a float64 bias and of the mask. */
static enum fa_status launch_scores(const struct fa_cuda_args *a, struct fa_error *error)
{
    const struct fa_cuda_kernel *narrow = fa_cuda_narrow(a->p.dtype);
    const int64_t elements = a->wide_bias.ptr ? elements_of(&a->wide_bias, &a->p) : 0;
    const enum fa_status status = fa_cuda_launch("launch of the narrow kernel", narrow,
                                                 least(blocks_of(elements, narrow->block_m), NARROW_BLOCKS), 1, a, a->p.stream, error);
    return status ? status : fa_cuda_launch_mask(a, error);
}

static enum fa_status run_forward(const struct plan *plan, struct fa_error *error)
{
    const struct fa_cuda_args *a = &plan->args;
    const int64_t tiles = a->p.b * a->p.h * a->m_tiles;
    enum fa_status status = launch_scores(a, error);
    if (!status) status = fa_cuda_launch("launch of the forward kernel", &plan->kernel, tiles, a->splits, a, a->p.stream, error);
    if (!status && a->splits > 1) status = fa_cuda_launch_rows("launch of the combine kernel", fa_cuda_combine, a->p.sq, a, error);
    if (!status && a->p.cu_q) status = fa_cuda_launch_fill(fa_cuda_fill_forward, a, error);
    if (!status && a->p.s_dmask) status = fa_cuda_launch_rows("launch of the dmask kernel", fa_cuda_dmask, a->p.dmask_sq, a, error);
    return status;
}

static enum fa_status launch_bias_gradient(const struct fa_cuda_args *a, struct fa_error *error)
{
    const struct fa_cuda_kernel *kernel = fa_sm80_bias_gradient(a->p.dtype), *sum = fa_sm80_bias_parts(a->p.dtype);
    enum fa_status status = fa_cuda_launch("launch of the bias gradient kernel", kernel, dbias_tiles(&a->p, kernel), a->parts, a, a->p.stream, error);
    if (status || a->parts == 1) return status;
    return fa_cuda_launch("launch of the bias parts kernel", sum, blocks_of(elements_of(&a->p.dbias, &a->p), sum->block_m), 1, a, a->p.stream, error);
}

enum fa_status fa_cuda_run_backward(const struct fa_cuda_kernel *kernel, int64_t blocks, const void *args, bool overlaps,
                                    const struct fa_cuda_args *a, struct fa_error *error)
{
    enum fa_status status = launch_scores(a, error);
    if (!status) status = fa_cuda_launch_rows("launch of the prepare kernel", fa_cuda_prepare, pad(a->p.sq, a->row_pad), a, error);
    if (!status) status = launch("launch of the backward kernel", kernel, blocks, 1, args, a->p.stream, overlaps, error);
    if (!status && !a->dq_is_made) status = launch_rows("launch of the convert kernel", fa_cuda_convert, a->p.sq, a, overlaps, error);
    if (!status && a->p.dbias.ptr) status = launch_bias_gradient(a, error);
    if (!status && (a->p.cu_q || a->p.cu_k || a->p.seqused_k)) status = fa_cuda_launch_fill(fa_cuda_fill_backward, a, error);
    return status;
}

static enum fa_status run(enum fa_pass pass, const struct fa_params *p, struct fa_error *error)
{
    struct plan plan;
    int previous;
    enum fa_status status = make_plan(pass, p, &plan, error);
    if (!status) status = fa_cuda_enter(p->device_index, &previous, error);
    if (status) return status;
    if (p->debug) status = fa_cuda_check_values(p, error);
    const int64_t key_tiles = plan.args.p.b * plan.args.p.hk * plan.args.n_tiles;
    if (!status) status = pass == FA_FORWARD ? run_forward(&plan, error)
                                             : fa_cuda_run_backward(&plan.kernel, key_tiles, &plan.args, false, &plan.args, error);
    fa_cuda_leave(p->device_index, previous);
    return status;
}

/* ---- the row of the kernel table ---- */

enum fa_status fa_cuda_check_sizes(const struct fa_params *p, struct fa_error *why)
{
    const int64_t queries = p->cu_q ? most(p->sq, p->total_q) : p->sq;
    const int64_t longest = most(most(p->sq, p->sk), p->s_dmask ? p->dmask_sq : 0);
    if (p->d > LARGEST_HEAD_DIM || p->d_v > LARGEST_HEAD_DIM)
        return fa_fail(why, FA_UNSUPPORTED, "serves head dimensions up to %d, got %lld for q and k, %lld for v; pass CPU tensors",
                       LARGEST_HEAD_DIM, (long long)p->d, (long long)p->d_v);
    if (queries >= ROW_LIMIT || p->sk >= ROW_LIMIT || p->b >= ROW_LIMIT / LARGEST_BLOCK)
        return fa_fail(why, FA_UNSUPPORTED, "serves fewer than 2^30 queries and keys in fewer than 2^23 sequences, got %lld, "
                       "%lld and %lld; split the call", (long long)queries, (long long)p->sk, (long long)p->b);
    if (p->b * p->h > GRID_LIMIT / (blocks_of(longest, SMALLEST_BLOCK) + LARGEST_BLOCK))
        return fa_fail(why, FA_UNSUPPORTED, "serves fewer than 2^31 tiles of %d rows, got batch size %lld x %lld heads x %lld "
                       "rows; split the batch", SMALLEST_BLOCK, (long long)p->b, (long long)p->h, (long long)longest);
    return FA_OK;
}

static bool supports(enum fa_pass pass, const struct fa_params *p, struct fa_error *why)
{
    const struct fa_cuda_device *device;
    if (p->dtype == FA_FLOAT64) {
        fa_fail(why, FA_UNSUPPORTED, "serves float32, float16 and bfloat16; cast q, k and v, or pass CPU tensors");
        return false;
    }
    if (fa_cuda_check_sizes(p, why) || !(device = fa_cuda_device(p->device_index, why))) return false;
    if (device->capability < SMALLEST_CAPABILITY) {
        fa_fail(why, FA_UNSUPPORTED, "needs a GPU of compute capability 8.0 or more, cuda:%d has %d.%d; pass CPU tensors",
                (int)p->device_index, device->capability / 10, device->capability % 10);
        return false;
    }
    if (find_kernel(pass, p, device)) return true;
    fa_fail(why, FA_UNSUPPORTED, "needs more than the %d KB of shared memory that a block may take on cuda:%d "
            "(FLASH_ATTN_SMEM_KB lowers it); pass CPU tensors", fa_cuda_shared_limit(device) >> 10, (int)p->device_index);
    return false;
}

static enum fa_status forward(const struct fa_params *p, struct fa_error *error) { return run(FA_FORWARD, p, error); }
static enum fa_status backward(const struct fa_params *p, struct fa_error *error) { return run(FA_BACKWARD, p, error); }

const struct fa_kernel fa_kernel_sm80 = { "sm80", supports, workspace, forward, backward };
