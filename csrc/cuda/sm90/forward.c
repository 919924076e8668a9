/* cuda/sm90/forward.c: the forward pass on Hopper, from a call to its launches.
 *
 *     counter = 0, if tiles differ in length | pack, if masked | main kernel | fill, if packed | dmask
 *
 * The plan is a pure function of the call and the device. Blocks are as many as multiprocessors have room for, and each works off
 * tiles until there are none: every gridDim.x-th where all are equally long, else the next from a counter, longest first. */
#include "../device.h"
#include "added_args.h"
#include "kernels.h"

#define LEAST_EFFICIENCY 0.9
#define BRIEF_COST 1.04                         /* d 64: of a score in the kernel for short sequences, to one in the usual kernel */
#define BRIEF_BOUNDED_COST 0.92                 /* the same where keys are hidden: fewer masks */
#define SMALL_COST 1.3                          /* and in the kernel for few queries */

enum { WARP_ROWS = 16, BIAS_ROWS = 64, COUNTER_BYTES = 128, SECTION_BYTES = 32 << 20, MANY_TILES = 15, BRIEF_KEYS = 4096,
       SMALL_KEYS = 1024, BRIEF_QUERIES = 4096, BRIEF_TILES = 2 * 132 };

static int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

static bool is_bounded(const struct fa_params *p) { return p->window_left >= 0 || p->window_right >= 0; }

/* Scores that tiles of this kernel compute for one head. */
static double work_of(const struct fa_params *p, const struct fa_cuda_kernel *kernel)
{
    const int64_t m = kernel->block_m, n = kernel->block_n;
    double work = 0;
    for (int64_t i = 0; i < p->sq; i += m) {
        const int64_t first = p->window_left < 0 ? 0 : i + p->sk - p->sq - p->window_left;
        const int64_t last = p->window_right < 0 ? p->sk : (i + m < p->sq ? i + m : p->sq) + p->sk - p->sq + p->window_right;
        const int64_t blocks = blocks_of(last < p->sk ? last : p->sk, n) - (first > 0 ? first / n : 0);
        work += (double)(m * n * (blocks > 1 ? blocks : 1));
    }
    return work;
}

const struct fa_cuda_kernel *fa_sm90_forward_kernel(const struct fa_params *p)
{
    static const struct { int channels; fa_sm90_find *fp16, *bf16; } buckets[] = {
        {  64, fa_sm90_forward_fp16_64,  fa_sm90_forward_bf16_64 },
        {  96, fa_sm90_forward_fp16_96,  fa_sm90_forward_bf16_96 },
        { 128, fa_sm90_forward_fp16_128, fa_sm90_forward_bf16_128 },
        { 192, fa_sm90_forward_fp16_192, fa_sm90_forward_bf16_192 },
        { 256, fa_sm90_forward_fp16_256, fa_sm90_forward_bf16_256 } };
    const int64_t channels = p->d > p->d_v ? p->d : p->d_v;
    int n = 0;
    if (fa_sm90_is_added(p)) return (channels <= 64 ? fa_sm90_added_64 : fa_sm90_added_128)(p->dtype);
    while (buckets[n].channels < channels) n++;
    fa_sm90_find *find = p->dtype == FA_FLOAT16 ? buckets[n].fp16 : buckets[n].bf16;
    const enum fa_variant variant = fa_cuda_variant(p);
    if (variant == FA_DROPOUT && !fa_cuda_has_score_mod(p)) return find(FA_PLAIN_DROPOUT, FA_SM90_USUAL);
    const struct fa_cuda_kernel *kernel = find(variant, FA_SM90_USUAL);
    const struct fa_cuda_kernel *brief = find(FA_PLAIN, FA_SM90_BRIEF), *small = find(FA_PLAIN, FA_SM90_SMALL);
    if (variant != FA_PLAIN || brief->block_m == kernel->block_m || p->sk > BRIEF_KEYS || p->sq > BRIEF_QUERIES) return kernel;
    /* Few of its large tiles would leave multiprocessors idle. */
    const bool fills = p->b * p->h * blocks_of(p->sq, brief->block_m) >= BRIEF_TILES;
    const double usual = work_of(p, kernel);
    const double briefly = fills ? work_of(p, brief) * (is_bounded(p) ? BRIEF_BOUNDED_COST : BRIEF_COST) : usual;
    if (p->sk <= SMALL_KEYS && SMALL_COST * work_of(p, small) < (usual < briefly ? usual : briefly)) return small;
    return briefly < usual ? brief : kernel;
}

static bool is_ragged(const struct fa_params *p) { return p->cu_q || p->cu_k || p->seqused_k; }

/* Heads whose keys and values fit L2 together: whole groups of query heads, a power of two of them. */
static int64_t section_of(const struct fa_params *p)
{
    const int64_t head_bytes = p->sk * (p->d + p->d_v) * (int64_t)fa_sizeof(p->dtype);
    int64_t heads = 1;
    while (2 * heads * head_bytes <= SECTION_BYTES && heads < p->b * p->hk) heads *= 2;
    return heads * (p->h / p->hk);
}

/* How much of the device is busy when units of one length go round. */
static double efficiency(int64_t units, int64_t blocks) { return (double)units / (double)(blocks_of(units, blocks) * blocks); }

/* Whether tiles differ in length. */
static bool is_uneven(const struct fa_params *p) { return is_bounded(p) || is_ragged(p) || p->mask.ptr; }

/* Tiles of one length go round. Causal tiles grow with their number: a head's longest and shortest make a pair, pairs are of one
 * length and go round too, where they fill the device. Elsewhere a counter hands tiles out, longest first. */
static void schedule(struct fa_sm90_forward_args *f, int64_t blocks)
{
    const struct fa_params *p = &f->a.p;
    const int64_t heads = p->b * p->h, pairs = heads * blocks_of(f->a.m_tiles, 2);
    const bool grows = p->window_left < 0 && p->window_right >= 0 && !is_ragged(p), even = f->a.m_tiles % 2 == 0 || f->a.m_tiles >= MANY_TILES;
    f->units = (int)(heads * f->a.m_tiles);
    f->section = 1;
    if (grows && even && efficiency(pairs, blocks) >= LEAST_EFFICIENCY) {
        f->section = 0;
        f->units = (int)pairs;
    } else if (is_uneven(p) && !(grows && f->a.m_tiles == 1)) {
        f->section = (int)section_of(p);
        f->counter = p->workspace;
    }
    /* Sequences that share a bias side by side: numbered first, a section has all of them. */
    if (fa_sm90_is_added(p) && f->section == 0) {
        f->section = (int)section_of(p);
        f->units = (int)(heads * f->a.m_tiles);
        f->counter = p->workspace;
    }
    if (f->a.batch_fastest) f->section = (int)(blocks_of(f->section, p->b) * p->b);
}

/* The tiles of a call, and its pieces of the workspace; their size comes back. */
static int64_t plan(const struct fa_cuda_kernel *kernel, struct fa_cuda_args *a)
{
    int64_t bytes = is_uneven(&a->p) ? COUNTER_BYTES : 0;
    a->m_tiles = (int)blocks_of(a->p.sq, kernel->block_m);
    a->n_tiles = (int)blocks_of(a->p.sk, kernel->block_n);
    fa_cuda_plan_mask(FA_FORWARD, a, kernel->block_m, kernel->block_n, &bytes);
    return bytes;
}

int64_t fa_sm90_forward_workspace(const struct fa_params *p)
{
    struct fa_cuda_args a = fa_cuda_arguments(p);
    a.p.workspace = NULL;
    return plan(fa_sm90_forward_kernel(p), &a);
}

static enum fa_status describe(const struct fa_params *p, const struct fa_cuda_kernel *kernel, struct fa_sm90_forward_args *f,
                               struct fa_error *error)
{
    const int64_t q_rows = p->cu_q ? p->total_q : p->sq, k_rows = p->cu_k ? p->total_k : p->sk;
    const int64_t q_batch = p->cu_q ? 1 : p->b, k_batch = p->cu_k ? 1 : p->b;
    enum fa_status status = fa_tensor_map_encode(&f->q, p->dtype, &p->q, p->d, q_rows, p->h, q_batch, kernel->block_m, error);
    if (!status) status = fa_tensor_map_encode(&f->k, p->dtype, &p->k, p->d, k_rows, p->hk, k_batch, kernel->block_n, error);
    if (!status) status = fa_tensor_map_encode(&f->v, p->dtype, &p->v, p->d_v, k_rows, p->hk, k_batch, kernel->block_n, error);
    f->store = f->a.aligned_out && p->out.stride_b >= 0 && p->out.stride_s >= 0 && p->out.stride_h >= 0;
    if (!status && f->store) status = fa_tensor_map_encode(&f->out, p->dtype, &p->out, p->d_v, q_rows, p->h, q_batch, WARP_ROWS, error);
    return status;
}

static enum fa_status describe_bias(const struct fa_params *p, struct fa_sm90_added_args *g, struct fa_error *error)
{
    const struct fa_tensor rows = fa_sm90_bias_rows(p);
    g->bias_b = rows.stride_b != 0, g->bias_h = rows.stride_h != 0;
    if (!rows.ptr) return FA_OK;
    return fa_tensor_map_encode(&g->bias, p->dtype, &rows, p->sk, p->sq, g->bias_h ? p->h : 1, g->bias_b ? p->b : 1, BIAS_ROWS, error);
}

static enum fa_status run(const struct fa_params *p, const struct fa_cuda_device *device, struct fa_error *error)
{
    const struct fa_cuda_kernel *kernel = fa_sm90_forward_kernel(p);
    struct fa_sm90_added_args g = { .f.a = fa_cuda_arguments(p) };      /* f alone is what the kernels without additions take */
    struct fa_sm90_forward_args *f = &g.f;
    plan(kernel, &f->a);
    const int room = device->multiprocessors * kernel->blocks;
    schedule(f, room);
    const int blocks = f->units < room ? f->units : room;
    enum fa_status status = describe(p, kernel, f, error);
    if (!status) status = describe_bias(p, &g, error);
    if (f->units == blocks) f->counter = NULL;
    if (!status && f->counter) status = fa_cuda_status(cudaMemsetAsync(f->counter, 0, sizeof *f->counter, p->stream), "cudaMemsetAsync", error);
    if (!status) status = fa_cuda_launch_mask(&f->a, error);
    if (!status) status = fa_cuda_launch("launch of the forward kernel", kernel, blocks, 1, &g, p->stream, error);
    if (!status && p->cu_q) status = fa_cuda_launch_fill(fa_cuda_fill_forward, &f->a, error);
    if (!status && p->s_dmask) status = fa_cuda_launch_rows("launch of the dmask kernel", fa_cuda_dmask, p->dmask_sq, &f->a, error);
    return status;
}

enum fa_status fa_sm90_forward(const struct fa_params *p, struct fa_error *error)
{
    const struct fa_cuda_device *device = fa_cuda_device(p->device_index, error);
    int previous;
    enum fa_status status = device ? fa_cuda_enter(p->device_index, &previous, error) : FA_FAILED;
    if (status) return status;
    if (p->debug) status = fa_cuda_check_values(p, error);
    if (!status) status = run(p, device, error);
    fa_cuda_leave(p->device_index, previous);
    return status;
}
