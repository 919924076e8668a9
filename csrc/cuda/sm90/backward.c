/* cuda/sm90/backward.c: the backward pass on Hopper, from a call to its launches.
 *
 *     pack, if masked | prepare | main kernel | convert, unless that made dq | bias gradient | fill, if packed or seqused_k
 *
 * All but the main kernel are those of sm_80. The plan is a pure function of the call and the device. */
#include "../device.h"
#include "backward_args.h"
#include "kernels.h"

enum { SECTION_BYTES = 16 << 20, BIAS_ROWS = 64 };

static const struct bucket { int channels; fa_sm90_find_backward *find; } buckets[] = {
    { 64, fa_sm90_backward_64 }, { 96, fa_sm90_backward_96 }, { 128, fa_sm90_backward_128 }, { 192, fa_sm90_backward_192 },
    { 256, fa_sm90_backward_256 },
};

static const struct bucket *bucket_of(const struct fa_params *p)
{
    const int64_t channels = p->d > p->d_v ? p->d : p->d_v;
    const struct bucket *bucket = buckets;
    while (bucket->channels < channels) bucket++;
    return bucket;
}

struct plan {
    const struct fa_cuda_kernel *kernel;        /* blocks = 1: they may take tickets */
    const struct fa_cuda_kernel *bias_gradient; /* NULL: sm80's, or none is wanted */
    struct fa_sm90_backward_args args;
    int64_t bytes;
};

const struct fa_cuda_kernel *fa_sm90_backward_kernel(const struct fa_params *p)
{
    const struct fa_cuda_args a = fa_cuda_arguments(p);
    if (fa_sm90_is_added(p)) return (bucket_of(p)->channels == 64 ? fa_sm90_added_backward_64 : fa_sm90_added_backward_128)(p->dtype);
    return bucket_of(p)->find(p->dtype, a.score_mod, a.keep256 < 256);
}

static bool is_bounded(const struct fa_cuda_args *a) { return a->window_left >= 0 || a->window_right >= 0; }
static bool is_ragged(const struct fa_params *p) { return p->cu_q || p->cu_k || p->seqused_k; }

/* Heads whose key tiles run side by side. Where tiles differ in length as many as L2 holds of q, dout and dq_accum, so that the
 * longest come first; else one after the other. */
static int section_of(const struct fa_cuda_args *a)
{
    const int64_t heads = a->p.b * a->p.hk, row = 2 * (a->p.d + a->p.d_v) + 4 * a->d_bucket;
    const int64_t section = SECTION_BYTES / (row * a->p.sq * a->group + 1);
    if (a->batch_fastest) return (int)a->p.b;               /* sequences that share a bias side by side */
    if (!is_bounded(a)) return 1;
    return (int)(section < 1 ? 1 : section > heads ? heads : section);
}

static int64_t dbias_tiles(const struct fa_params *p, const struct fa_cuda_kernel *kernel)
{
    return (p->dbias.stride_b ? p->b : 1) * (p->dbias.stride_h ? p->h : 1) * ((p->sq + kernel->block_m - 1) / kernel->block_m)
         * ((p->sk + kernel->block_n - 1) / kernel->block_n);
}

/* The kernel for the gradient of a bias with an element for each query and key, 16 bytes at a time, and enough tiles to fill the device. */
static const struct fa_cuda_kernel *bias_gradient_kernel(const struct fa_cuda_args *a, const struct fa_cuda_device *device)
{
    const struct fa_scores *t = &a->p.dbias;
    const struct fa_cuda_kernel *kernel = (a->d_bucket == 64 ? fa_sm90_bias_gradient_64 : fa_sm90_bias_gradient_128)(a->p.dtype);
    const bool vectors = t->stride_k == 1 && t->stride_q && (uintptr_t)t->ptr % 16 == 0 && (t->stride_q | t->stride_h | t->stride_b) % 8 == 0;
    return t->ptr && vectors && dbias_tiles(&a->p, kernel) >= device->multiprocessors ? kernel : NULL;
}

/* Blocks that take key tiles one by one load the next one's keys and queries while this one's results leave, and where they run on all
 * multiprocessors make dq of the sums too. Up to d = 128, blocks that add to dq in turn (deterministic) have one key tile, since the threads
 * that add for them know of no other; so do those of sequences with lengths of their own, for which tickets were not measured. */
static void plan_order(struct plan *plan, const struct fa_cuda_device *device)
{
    struct fa_cuda_args *a = &plan->args.a;
    const int64_t heads = a->p.b * a->p.hk, tiles = heads * a->n_tiles;
    const bool ragged = is_ragged(&a->p);
    plan->args.tickets = plan->kernel->blocks && (a->d_bucket > 128 || (!a->p.deterministic && !ragged));
    a->counts = plan->args.tickets ? FA_TICKETS + (int)heads : 0;
    a->dq_is_made = plan->args.tickets && !ragged && tiles >= device->multiprocessors && a->aligned_dq && a->p.d == a->d_bucket;
}

static int64_t blocks_of(const struct plan *plan, const struct fa_cuda_device *device)
{
    const int64_t tiles = plan->args.a.p.b * plan->args.a.p.hk * plan->args.a.n_tiles;
    return plan->args.tickets && tiles > device->multiprocessors ? device->multiprocessors : tiles;
}

static void make_plan(const struct fa_params *p, const struct fa_cuda_device *device, struct plan *plan)
{
    struct fa_cuda_args *a = &plan->args.a;
    *a = fa_cuda_arguments(p);
    a->d_bucket = fa_sm90_is_added(p) && bucket_of(p)->channels > 64 ? 128 : bucket_of(p)->channels;
    a->bias_staged = p->bias.ptr;                           /* its layout is one that could be */
    plan->kernel = fa_sm90_backward_kernel(p);
    a->m_tiles = (int)((p->sq + plan->kernel->block_m - 1) / plan->kernel->block_m);
    a->n_tiles = (int)((p->sk + plan->kernel->block_n - 1) / plan->kernel->block_n);
    plan->bytes = 0;
    plan->args.bias_b = p->bias.stride_b != 0, plan->args.bias_h = p->bias.stride_h != 0;
    plan->args.section = section_of(a);
    plan_order(plan, device);
    fa_cuda_plan_mask(FA_BACKWARD, a, plan->kernel->block_m, plan->kernel->block_n, &plan->bytes);
    fa_cuda_plan_backward(a, plan->kernel->block_m, &plan->bytes);
    plan->bias_gradient = bias_gradient_kernel(a, device);
    if (!plan->bias_gradient) fa_cuda_plan_bias_gradient(a, device, &plan->bytes);
}

int64_t fa_sm90_backward_workspace(const struct fa_params *p)
{
    struct fa_params sizes = *p;
    struct fa_error unused;
    struct plan plan;
    const struct fa_cuda_device *device = fa_cuda_device(p->device_index, &unused);
    if (!device) return 0;
    sizes.workspace = NULL;
    make_plan(&sizes, device, &plan);
    return plan.bytes;
}

static enum fa_status encode(struct fa_tensor_map *map, const struct fa_params *p, const struct fa_tensor *t, bool keys,
                             int64_t d, int rows, struct fa_error *error)
{
    const bool packed = keys ? p->cu_k : p->cu_q;
    const int64_t length = keys ? (packed ? p->total_k : p->sk) : packed ? p->total_q : p->sq;
    return fa_tensor_map_encode(map, p->dtype, t, d, length, keys ? p->hk : p->h, packed ? 1 : p->b, rows, error);
}

static enum fa_status encode_mask(struct plan *plan, struct fa_error *error)
{
    const struct fa_cuda_mask *m = &plan->args.a.mask;
    const int64_t planes = (m->plane_b ? plan->args.a.p.b : 1) * (m->plane_h ? plan->args.a.p.h : 1);
    return fa_tensor_map_encode_words(&plan->args.mask, m->bits, m->words, m->rows, planes, plan->kernel->block_m, error);
}

/* As many blocks as multiprocessors: each works off tiles until there are none. */
static enum fa_status launch_bias_gradient(const struct plan *plan, const struct fa_cuda_device *device, struct fa_error *error)
{
    const int64_t tiles = dbias_tiles(&plan->args.a.p, plan->bias_gradient);
    return fa_cuda_launch("launch of the bias gradient kernel", plan->bias_gradient, tiles < device->multiprocessors ? tiles : device->multiprocessors,
                          1, &plan->args, plan->args.a.p.stream, error);
}

enum fa_status fa_sm90_backward(const struct fa_params *p, struct fa_error *error)
{
    const struct fa_cuda_device *device = fa_cuda_device(p->device_index, error);
    const struct fa_tensor bias = fa_sm90_bias_rows(p);
    struct plan plan;
    int previous;
    enum fa_status status = device ? fa_cuda_enter(p->device_index, &previous, error) : FA_FAILED;
    if (status) return status;
    make_plan(p, device, &plan);
    if (p->debug) status = fa_cuda_check_values(p, error);
    if (!status) status = encode(&plan.args.q, p, &p->q, false, p->d, plan.kernel->block_m, error);
    if (!status) status = encode(&plan.args.k, p, &p->k, true, p->d, plan.kernel->block_n, error);
    if (!status) status = encode(&plan.args.v, p, &p->v, true, p->d_v, plan.kernel->block_n, error);
    if (!status) status = encode(&plan.args.dout, p, &p->dout, false, p->d_v, plan.kernel->block_m, error);
    if (!status && bias.ptr) status = fa_tensor_map_encode(&plan.args.bias, p->dtype, &bias, p->sk, p->sq, plan.args.bias_h ? p->h : 1,
                                                           plan.args.bias_b ? p->b : 1, BIAS_ROWS, error);
    plan.args.mask_boxes = plan.args.a.mask.rows > 1 && plan.args.a.mask.words > 1;
    if (!status && plan.args.mask_boxes) status = encode_mask(&plan, error);
    struct fa_cuda_args others = plan.args.a;               /* what the kernels of sm_80 get */
    if (plan.bias_gradient) others.p.dbias.ptr = NULL;
    if (!status) status = fa_cuda_run_backward(plan.kernel, blocks_of(&plan, device), &plan.args, true, &others, error);
    if (!status && plan.bias_gradient) status = launch_bias_gradient(&plan, device, error);
    fa_cuda_leave(p->device_index, previous);
    return status;
}
