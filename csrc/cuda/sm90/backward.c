/* cuda/sm90/backward.c: the host side of the backward pass on Hopper: what it serves, its plan, its launch.
 *
 *     prepare | main kernel | convert | fill, if packed or seqused_k        (all but the main kernel are those of sm_80) */
#include "../launch.h"
#include "backward_args.h"
#include "sm90.h"

enum { CAPABILITY = 90, CHANNELS_PER_CHUNK = 8, SECTION_BYTES = 32 << 20 };

typedef const struct fa_cuda_kernel *find_kernel(enum fa_dtype dtype, bool score_mod, bool dropout);

find_kernel fa_sm90_backward_64, fa_sm90_backward_96, fa_sm90_backward_128, fa_sm90_backward_192, fa_sm90_backward_256;

static const struct bucket { int channels; find_kernel *find; } buckets[] = {
    {  64, fa_sm90_backward_64 },
    {  96, fa_sm90_backward_96 },
    { 128, fa_sm90_backward_128 },
    { 192, fa_sm90_backward_192 },
    { 256, fa_sm90_backward_256 },
};
enum { BUCKETS = sizeof buckets / sizeof *buckets };

static const struct bucket *bucket_of(const struct fa_params *p)
{
    const int64_t d = p->d > p->d_v ? p->d : p->d_v;
    for (int n = 0; n < BUCKETS; n++)
        if (d <= buckets[n].channels) return &buckets[n];
    return NULL;
}

/* TMA wants strides that are multiples of 16 bytes and not 0. */
static bool is_readable(const struct fa_params *p, const struct fa_tensor *t, int64_t rows, int64_t heads)
{
    return fa_cuda_is_aligned(p, t) && (rows <= 1 || t->stride_s > 0) && (heads <= 1 || t->stride_h > 0)
           && (p->b <= 1 || p->cu_q || t->stride_b > 0);
}

bool fa_sm90_backward_supports(const struct fa_params *p, struct fa_error *why)
{
    const struct fa_cuda_device *device = fa_cuda_device(p->device_index, why);
    const struct bucket *bucket = bucket_of(p);
    enum fa_status status = FA_OK;
    if (!device) return false;
    if (device->capability != CAPABILITY)
        status = fa_fail(why, FA_UNSUPPORTED, "needs a GPU of compute capability 9.0, cuda:%d has %d.%d", (int)p->device_index,
                         device->capability / 10, device->capability % 10);
    else if (p->dtype != FA_FLOAT16 && p->dtype != FA_BFLOAT16)
        status = fa_fail(why, FA_UNSUPPORTED, "serves float16 and bfloat16");
    else if (p->bias.ptr || p->mask.ptr)
        status = fa_fail(why, FA_UNSUPPORTED, "serves no attn_bias and no attn_mask");
    else if (!bucket)
        status = fa_fail(why, FA_UNSUPPORTED, "serves head dimensions up to %d backward, got %lld for q and k, %lld for v",
                         buckets[BUCKETS - 1].channels, (long long)p->d, (long long)p->d_v);
    else if (p->d % CHANNELS_PER_CHUNK || p->d_v % CHANNELS_PER_CHUNK)
        status = fa_fail(why, FA_UNSUPPORTED, "serves head dimensions that 8 divides, got %lld for q and k, %lld for v",
                         (long long)p->d, (long long)p->d_v);
    else if (!is_readable(p, &p->q, p->sq, p->h) || !is_readable(p, &p->dout, p->sq, p->h)
             || !is_readable(p, &p->k, p->sk, p->hk) || !is_readable(p, &p->v, p->sk, p->hk))
        status = fa_fail(why, FA_UNSUPPORTED, "serves q, k, v and dout whose rows start at multiples of 16 bytes, each its own");
    return !status;
}

struct plan {
    const struct fa_cuda_kernel *kernel;
    struct fa_sm90_backward_args args;
    int64_t bytes;
};

/* Heads that share L2: those whose q, dout and dq_accum fill SECTION_BYTES. */
static int section_of(const struct fa_cuda_args *a)
{
    const int64_t heads = a->p.b * a->p.hk, row = 2 * (a->p.d + a->p.d_v) + 4 * a->d_bucket;
    const int64_t section = SECTION_BYTES / (row * a->p.sq * a->group + 1);
    return (int)(section < 1 ? 1 : section > heads ? heads : section);
}

static void make_plan(const struct fa_params *p, struct plan *plan)
{
    const struct bucket *bucket = bucket_of(p);
    struct fa_cuda_args *a = &plan->args.a;
    *a = fa_cuda_arguments(p);
    a->d_bucket = bucket->channels;
    plan->kernel = bucket->find(p->dtype, a->score_mod, a->keep256 < 256);
    a->m_tiles = (int)((p->sq + plan->kernel->block_m - 1) / plan->kernel->block_m);
    a->n_tiles = (int)((p->sk + plan->kernel->block_n - 1) / plan->kernel->block_n);
    plan->bytes = fa_cuda_plan_backward(a);
    plan->args.section = section_of(a);
}

int64_t fa_sm90_backward_workspace(const struct fa_params *p)
{
    struct fa_params sizes = *p;
    struct plan plan;
    sizes.workspace = NULL;
    make_plan(&sizes, &plan);
    return plan.bytes;
}

static enum fa_status encode(struct fa_tensor_map *map, const struct fa_params *p, const struct fa_tensor *t, bool keys, int64_t d, int rows,
                             struct fa_error *error)
{
    const bool packed = keys ? p->cu_k : p->cu_q;
    const int64_t length = keys ? (packed ? p->total_k : p->sk) : packed ? p->total_q : p->sq;
    return fa_tensor_map_encode(map, p->dtype, t, d, length, keys ? p->hk : p->h, packed ? 1 : p->b, rows, error);
}

enum fa_status fa_sm90_backward(const struct fa_params *p, struct fa_error *error)
{
    struct plan plan;
    int previous;
    enum fa_status status = fa_cuda_enter(p->device_index, &previous, error);
    if (status) return status;
    make_plan(p, &plan);
    if (p->debug) status = fa_cuda_check_values(p, error);
    /* A thread new to CUDA, as autograd's, has no context before this, and the driver's encoder wants one. */
    if (!status) status = fa_cuda_status(cudaSetDevice((int)p->device_index), "cudaSetDevice", error);
    if (!status) status = encode(&plan.args.q, p, &p->q, false, p->d, plan.kernel->block_m, error);
    if (!status) status = encode(&plan.args.k, p, &p->k, true, p->d, plan.kernel->block_n, error);
    if (!status) status = encode(&plan.args.v, p, &p->v, true, p->d_v, plan.kernel->block_n, error);
    if (!status) status = encode(&plan.args.dout, p, &p->dout, false, p->d_v, plan.kernel->block_m, error);
    if (!status) status = fa_cuda_run_backward(plan.kernel, &plan.args, &plan.args.a, error);
    fa_cuda_leave(p->device_index, previous);
    return status;
}
