/* check_cpu.c: every instruction set against the definition, and timed beside it, without Python or torch.
 *
 *     make checkasm                       all levels that this CPU has
 *
 * First each micro-kernel of cpu/ops.h: AVX2 and AVX-512 must agree with generic C, and show their speed. Then whole
 * calls through flash_attn.h with random shapes and features: each level must agree with common/reference.c. Prints one
 * line per check and level; exits with the number of failures. */
#define _GNU_SOURCE
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../../csrc/cpu/plan.h"
#include "../../csrc/common/convert.h"
#include "../../csrc/common/philox.h"

static int failures;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static float uniform(float low, float high) { return low + (high - low) * (float)drand48(); }
static int64_t between(int64_t low, int64_t high) { return low + (int64_t)(drand48() * (double)(high - low + 1)); }

static float *random_floats(int64_t n, float low, float high)
{
    float *x = aligned_alloc(64, (size_t)fa_pad(4 * n + 64, 64));
    for (int64_t i = 0; i < n; i++) x[i] = uniform(low, high);
    return x;
}

static float *copy_floats(const float *x, int64_t n)
{
    float *y = aligned_alloc(64, (size_t)fa_pad(4 * n + 64, 64));
    memcpy(y, x, (size_t)(4 * n));
    return y;
}

/* Largest |x - y| / (1 + |y|); places of NaN and infinities must agree. */
static double difference(const float *x, const float *y, int64_t n)
{
    double worst = 0;
    for (int64_t i = 0; i < n; i++) {
        if (isnan(x[i]) && isnan(y[i])) continue;
        if (x[i] == y[i]) continue;
        const double gap = fabs((double)x[i] - y[i]) / (1 + fabs((double)y[i]));
        if (!(gap <= worst)) worst = isnan(gap) ? INFINITY : gap;
    }
    return worst;
}

static void report(const char *check, const char *level, double worst, double bound, double per_second, const char *unit)
{
    const bool good = worst <= bound;
    failures += !good;
    printf("%-26s %-8s %9.2e %s", check, level, worst, good ? "ok  " : "FAIL");
    if (per_second > 0) printf("  %8.1f %s", per_second * 1e-9, unit);
    putchar('\n');
}

/* Seconds of one call: the best of several batches of about a millisecond. */
#define SECONDS(call)                                                   \
    ({                                                                  \
        double best_ = 1e9;                                             \
        for (int batch_ = 0; batch_ < 5; batch_++) {                    \
            int64_t calls_ = 0;                                         \
            const double start_ = now();                                \
            double spent_;                                              \
            do { call; calls_++; spent_ = now() - start_; } while (spent_ < 1e-3); \
            if (spent_ / (double)calls_ < best_) best_ = spent_ / (double)calls_;  \
        }                                                               \
        best_;                                                          \
    })

enum { M = 96, N = 192, D = 128 };

static void check_gemm(const struct fa_cpu_ops *ops, const struct fa_cpu_ops *definition)
{
    float *a = random_floats(N * N, -1, 1), *b = random_floats(N * N, -1, 1), *start = random_floats(N * N, -1, 1);
    double worst = 0;
    for (int trial = 0; trial < 60; trial++) {
        const int64_t m = between(1, M), n = 16 * between(1, N / 16), k = between(1, M);
        const bool transposed = trial & 1, accumulate = trial & 2;
        const struct fa_left left = transposed ? (struct fa_left){ a, 1, N } : (struct fa_left){ a, N, 1 };
        float *c[2] = { copy_floats(start, N * N), copy_floats(start, N * N) };
        const struct fa_cpu_ops *both[2] = { definition, ops };
        for (int i = 0; i < 2; i++)
            both[i]->gemm((struct fa_result){ c[i], N }, left, (struct fa_right){ b, N, both[i]->nr }, m, n, k, accumulate);
        worst = fmax(worst, difference(c[1], c[0], N * N));
        free(c[0]);
        free(c[1]);
    }
    float *c = random_floats(N * N, 0, 1);
    const double s = SECONDS(ops->gemm((struct fa_result){ c, N }, (struct fa_left){ a, N, 1 }, (struct fa_right){ b, N, ops->nr },
                                       M, N, D, false));
    report("gemm", ops->isa, worst, 1e-5, 2.0 * M * N * D / s, "GFLOP/s");
    free(a); free(b); free(c); free(start);
}

static void check_softmax(const struct fa_cpu_ops *ops, const struct fa_cpu_ops *definition)
{
    float *s = random_floats(M * N, -40, 40), *o = random_floats(M * D, -1, 1);
    for (int64_t j = 0; j < N; j++) s[j] = -INFINITY;                   /* a row that sees nothing */
    s[N + 5] = -INFINITY;
    float *result[2][4];
    const struct fa_cpu_ops *both[2] = { definition, ops };
    for (int i = 0; i < 2; i++) {
        float *max = random_floats(M, -1, 1), *sum = random_floats(M, 1, 2);
        for (int64_t r = 0; r < M; r++) max[r] = r % 3 ? -INFINITY : 7, sum[r] = r % 3 ? 0 : 2;
        result[i][0] = copy_floats(s, M * N);
        result[i][1] = copy_floats(o, M * D);
        result[i][2] = max;
        result[i][3] = sum;
        both[i]->online_softmax((struct fa_result){ result[i][0], N }, M, N, 0.7f, max, sum, (struct fa_result){ result[i][1], D }, D);
    }
    double worst = difference(result[1][0], result[0][0], M * N);
    worst = fmax(worst, difference(result[1][1], result[0][1], M * D));
    worst = fmax(worst, difference(result[1][2], result[0][2], M));
    worst = fmax(worst, difference(result[1][3], result[0][3], M));
    const double seconds = SECONDS(ops->online_softmax((struct fa_result){ result[1][0], N }, M, N, 0.7f, result[1][2], result[1][3],
                                                       (struct fa_result){ result[1][1], D }, D));
    report("online_softmax", ops->isa, worst, 2e-5, M * N / seconds, "Gscore/s");
    for (int i = 0; i < 2; i++) for (int j = 0; j < 4; j++) free(result[i][j]);
    free(s); free(o);
}

static void check_softmax_backward(const struct fa_cpu_ops *ops, const struct fa_cpu_ops *definition)
{
    float *s = random_floats(M * N, -10, 0), *dp = random_floats(M * N, -1, 1), *z = random_floats(M * N, 0, 2);
    float *lse = random_floats(M, 0, 3), *delta = random_floats(M, -1, 1);
    lse[3] = INFINITY;
    const struct fa_cpu_ops *both[2] = { definition, ops };
    double worst = 0;
    for (int variant = 0; variant < 4; variant++) {
        float *x[2], *g[2];
        for (int i = 0; i < 2; i++) {
            x[i] = copy_floats(s, M * N), g[i] = copy_floats(dp, M * N);
            both[i]->softmax_backward((struct fa_result){ x[i], N }, (struct fa_result){ g[i], N }, M, N, 1.2f, lse, delta,
                                      variant & 1 ? z : NULL, variant & 2 ? z : NULL);
        }
        worst = fmax(worst, fmax(difference(x[1], x[0], M * N), difference(g[1], g[0], M * N)));
        for (int i = 0; i < 2; i++) free(x[i]), free(g[i]);
    }
    const double seconds = SECONDS(ops->softmax_backward((struct fa_result){ s, N }, (struct fa_result){ dp, N }, M, N, 1.2f,
                                                         lse, delta, NULL, NULL));
    report("softmax_backward", ops->isa, worst, 2e-5, M * N / seconds, "Gscore/s");
    free(s); free(dp); free(z); free(lse); free(delta);
}

/* tanh and ALiBi against libm in double, not only against each other. */
static void check_score_rows(const struct fa_cpu_ops *ops)
{
    float *s = random_floats(N, -60, 60), *t = copy_floats(s, N), *derivative = random_floats(N, 0, 0);
    for (int64_t j = 0; j < 32; j++) s[j] = t[j] = ldexpf(uniform(-1, 1), -(int)j);
    ops->softcap((struct fa_result){ t, N }, 1, N, 0.1f, 30, derivative);
    double worst = 0;
    for (int64_t j = 0; j < N; j++) {
        const double exact = 30 * tanh(0.1f * (double)s[j]), scale = fabs(exact) + 1e-30;
        worst = fmax(worst, fabs(t[j] - exact) / scale);
    }
    report("softcap", ops->isa, worst, 1e-6, N / SECONDS(ops->softcap((struct fa_result){ t, N }, 1, N, 0.1f, 30, NULL)), "Gscore/s");

    memcpy(t, s, N * sizeof *t);
    ops->alibi_row(t, N, 0.3f, 77);
    worst = 0;
    for (int64_t j = 0; j < N; j++) worst = fmax(worst, fabs(t[j] - (s[j] - 0.3f * fabs(77.0 - (double)j))));
    report("alibi", ops->isa, worst, 1e-5, 0, NULL);
    free(s); free(t); free(derivative);
}

/* A bias against plain C in double, a mask bit for bit; both with a tail, and nothing written beyond it. */
static void check_bias_and_mask(const struct fa_cpu_ops *ops)
{
    enum { ROWS = 7, COUNT = 77, PADDED = 80 };
    float *s = random_floats(ROWS * N, -9, 9), *bias = random_floats(ROWS * N, -3, 3);
    uint8_t stored[4 * ROWS * N], mask[ROWS * N];
    double worst = 0, wrong = 0;
    bias[5] = -INFINITY;
    for (int i = 0; i < ROWS * N; i++) mask[i] = (uint8_t)(between(0, 2) ? between(1, 255) : 0);
    for (enum fa_dtype dtype = FA_FLOAT32; dtype <= FA_BFLOAT16; dtype++)
        for (int64_t stride = 0; stride <= N; stride += N) {
            float *t = copy_floats(s, ROWS * N), *u = copy_floats(s, ROWS * N);
            for (int i = 0; i < ROWS * N; i++) fa_store(dtype, stored, i, bias[i]);
            ops->add_bias((struct fa_result){ t, N }, ROWS, COUNT, -0.7f, stored, dtype, stride);
            ops->apply_mask((struct fa_result){ u, N }, ROWS, COUNT, mask, stride);
            for (int64_t r = 0; r < ROWS; r++)
                for (int64_t j = 0; j < COUNT; j++) {
                    const float x = s[r * N + j], sum = (float)(-0.7f * (double)x + fa_load(dtype, stored, r * stride + j));
                    worst = fmax(worst, difference(&t[r * N + j], &sum, 1));
                    wrong += u[r * N + j] != (mask[r * stride + j] ? x : -INFINITY);
                }
            for (int64_t r = 0; r < ROWS; r++) wrong += memcmp(t + r * N + PADDED, s + r * N + PADDED, (N - PADDED) * sizeof *s) != 0;
            free(t); free(u);
        }
    float *big = random_floats(M * N, -3, 3);
    uint8_t *seen = (uint8_t *)big;
    report("add_bias", ops->isa, worst, 1e-6, M * N / SECONDS(ops->add_bias((struct fa_result){ big, N }, M, N, 1, bias, FA_BFLOAT16, 0)), "Gscore/s");
    report("apply_mask", ops->isa, wrong, 0, M * N / SECONDS(ops->apply_mask((struct fa_result){ big, N }, M, N, seen, 0)), "Gscore/s");
    free(s); free(bias); free(big);
}

static void check_conversions(const struct fa_cpu_ops *ops)
{
    enum { WIDE = 67, LD = 80 };
    float values[WIDE] = { 0, -0.0f, INFINITY, -INFINITY, NAN, 65504, 65520, 6e-8f, 3e-8f, 1e-45f, 3.4e38f, 1.00390625f, 1.01171875f };
    for (int i = 13; i < WIDE; i++) values[i] = uniform(-8, 8);
    double worst = 0;
    for (enum fa_dtype dtype = FA_FLOAT32; dtype <= FA_BFLOAT16; dtype++) {
        uint8_t stored[4 * WIDE + 64] = {0}, expected[4 * WIDE] = {0};
        float padded[LD] = {0}, back[LD], wanted[LD] = {0};
        memcpy(padded, values, sizeof values);
        ops->store_row(stored, dtype, padded, WIDE, 1);
        for (int i = 0; i < WIDE; i++) fa_store(dtype, expected, i, values[i]), wanted[i] = (float)fa_load(dtype, expected, i);
        for (int i = 0; i < WIDE; i++)
            if (!isnan(values[i]) && memcmp(stored + i * (int)fa_sizeof(dtype), expected + i * (int)fa_sizeof(dtype), fa_sizeof(dtype)))
                worst = 1;
        ops->load_rows(back, LD, stored, dtype, WIDE, 1, WIDE);
        worst = fmax(worst, difference(back, wanted, LD));
    }
    report("load_rows, store_row", ops->isa, worst, 0, 0, NULL);

    float *rows = random_floats(N * D, -1, 1), *panels = random_floats(N * D + 64 * D, 9, 9);
    const int64_t count = 77, k = 59;
    ops->pack_transposed(panels, rows, D, count, k);
    worst = 0;
    for (int64_t r = 0; r < fa_pad(count, ops->nr); r++)
        for (int64_t c = 0; c < k; c++)
            worst = fmax(worst, fabs(panels[r / ops->nr * ops->nr * fa_pad(k, 16) + c * ops->nr + r % ops->nr]
                                     - (r < count ? rows[r * D + c] : 0)));
    report("pack_transposed", ops->isa, worst, 0,
           N * D / SECONDS(ops->pack_transposed(panels, rows, D, N, D)), "Gelement/s");
    free(rows); free(panels);
}

static void check_dropout(const struct fa_cpu_ops *ops)
{
    float z[256];
    double worst = 0;
    for (int trial = 0; trial < 20; trial++) {
        const uint64_t seed = (uint64_t)between(0, INT32_MAX) << 31, offset = (uint64_t)between(0, INT32_MAX) << 20;
        const uint32_t head = (uint32_t)between(0, 99), piece_i = (uint32_t)between(0, 99), piece_j = (uint32_t)between(0, 99);
        ops->dropout_piece(z, seed, offset, head, piece_i, piece_j, 200, 1.28f);
        for (int64_t i = 0; i < 16; i++)
            for (int64_t j = 0; j < 16; j++) {
                const bool kept = fa_dropout_byte(seed, offset, head, 16 * piece_i + i, 16 * piece_j + j) < 200;
                worst = fmax(worst, fabsf(z[16 * i + j] - (kept ? 1.28f : 0)));
            }
    }
    report("dropout_piece", ops->isa, worst, 0, 256 / SECONDS(ops->dropout_piece(z, 1, 2, 3, 4, 5, 200, 1.28f)), "Gscore/s");
}

/* ------------------------------------------------------------------------------------------------ whole calls */

/* Tensors 0 to 3 and BIAS are given, 4 to DBIAS are results. */
enum { DBIAS = 9, BIAS = 10, TENSORS = 11 };
struct call { struct fa_params p; float *memory[TENSORS]; int64_t size[TENSORS]; uint8_t *mask; int64_t rng[2]; float slopes[8]; };

static struct fa_tensor tensor(struct call *c, int which, int64_t s, int64_t h, int64_t d)
{
    c->size[which] = c->p.b * s * h * d;
    c->memory[which] = random_floats(c->size[which] + 1, -1.5f, 1.5f);
    return (struct fa_tensor){ c->memory[which], s * h * d, h * d, d };
}

/* Varies along some indices at random; returns its number of elements. */
static int64_t random_scores(const struct fa_params *p, struct fa_scores *t)
{
    int64_t size = 1, *const strides[] = { &t->stride_k, &t->stride_q, &t->stride_h, &t->stride_b };
    const int64_t sizes[] = { p->sk, p->sq, p->h, p->b };
    for (int n = 0; n < 4; n++) {
        const bool varies = sizes[n] > 1 && between(0, 2);
        *strides[n] = varies ? size : 0;
        if (varies) size *= sizes[n];
    }
    return size;
}

/* Hides single keys, and stretches that are longer than a tile. */
static void random_bias_and_mask(struct call *c)
{
    struct fa_params *p = &c->p;
    if (between(0, 1)) {
        c->size[BIAS] = c->size[DBIAS] = random_scores(p, &p->bias);
        for (int i = DBIAS; i <= BIAS; i++) c->memory[i] = random_floats(c->size[i], -2, 2);
        p->bias.ptr = c->memory[BIAS];
        p->dbias = p->bias;
        p->dbias.ptr = c->memory[DBIAS];
        for (int64_t n = between(0, 1) ? c->size[BIAS] / 3 : 0; n > 0; n--) c->memory[BIAS][between(0, c->size[BIAS] - 1)] = -INFINITY;
    }
    if (between(0, 1)) {
        const int64_t size = random_scores(p, &p->mask), hidden = between(0, size);
        p->mask.ptr = c->mask = malloc((size_t)size);
        for (int64_t i = 0; i < size; i++) c->mask[i] = between(0, 5) > 0;
        memset(c->mask + between(0, size - hidden), 0, (size_t)hidden);
    }
}

static struct call random_call(void)
{
    struct call c = { .rng = { between(0, INT32_MAX), between(0, INT32_MAX) } };
    struct fa_params *p = &c.p;
    p->b = between(1, 2), p->hk = between(1, 2), p->h = p->hk * between(1, 3);
    p->sq = between(0, 3) ? between(1, 260) : between(1, 4), p->sk = between(1, 420);
    p->d = between(1, 140), p->d_v = between(0, 1) ? p->d : between(1, 80);
    p->scale = uniform(-0.5f, 1) / sqrtf((float)p->d), p->n_threads = 1;
    p->softcap = between(0, 2) ? 0 : uniform(0.5f, 5);
    p->window_left = between(0, 1) ? -1 : between(0, 200), p->window_right = between(0, 1) ? -1 : between(0, 100);
    if (!between(0, 2)) {
        p->alibi = c.slopes;
        for (int i = 0; i < 8; i++) c.slopes[i] = uniform(0, 0.3f);
    }
    p->dropout_p = between(0, 2) ? 0 : uniform(0, 0.7f);
    p->q = tensor(&c, 0, p->sq, p->h, p->d), p->k = tensor(&c, 1, p->sk, p->hk, p->d), p->v = tensor(&c, 2, p->sk, p->hk, p->d_v);
    p->dout = tensor(&c, 3, p->sq, p->h, p->d_v), p->out = tensor(&c, 4, p->sq, p->h, p->d_v);
    p->dq = tensor(&c, 5, p->sq, p->h, p->d), p->dk = tensor(&c, 6, p->sk, p->hk, p->d), p->dv = tensor(&c, 7, p->sk, p->hk, p->d_v);
    p->lse = tensor(&c, 8, p->sq, p->h, 1);
    p->lse.stride_b = p->h * p->sq, p->lse.stride_s = 1, p->lse.stride_h = p->sq;
    random_bias_and_mask(&c);
    return c;
}

static void run(struct fa_params *p, enum fa_pass pass)
{
    struct fa_error error = { "" };
    int64_t bytes = 0;
    enum fa_status status = fa_workspace(pass, p, &bytes, &error);
    p->workspace_bytes = bytes;
    p->workspace = aligned_alloc(64, (size_t)fa_pad(bytes + 64, 64));
    memset(p->workspace, 0xff, (size_t)bytes);                          /* NaN: scratch must be written before it is read */
    if (status == FA_OK) status = pass == FA_FORWARD ? fa_forward(p, &error) : fa_backward(p, &error);
    free(p->workspace);
    if (status != FA_OK) {
        printf("refused: %s\n", error.text);
        exit(1);
    }
}

static void check_calls(const char *isa, int trials)
{
    double worst = 0;
    setenv("FLASH_ATTN_CPU_ISA", isa, 1);
    for (int trial = 0; trial < trials; trial++) {
        struct call c = random_call();
        c.p.rng = c.rng;
        if (c.p.alibi) c.p.alibi = c.slopes;
        setenv("FLASH_ATTN_KERNEL", "reference", 1);
        run(&c.p, FA_FORWARD);
        run(&c.p, FA_BACKWARD);
        float *expected[BIAS] = {0};
        for (int i = 4; i < BIAS && c.memory[i]; i++) {
            expected[i] = copy_floats(c.memory[i], c.size[i]);
            memset(c.memory[i], 0xff, (size_t)(4 * c.size[i]));         /* poison the outputs */
        }
        setenv("FLASH_ATTN_KERNEL", "cpu", 1);
        run(&c.p, FA_FORWARD);
        run(&c.p, FA_BACKWARD);
        for (int i = 4; i < BIAS && c.memory[i]; i++) {
            const double gap = difference(c.memory[i], expected[i], c.size[i]);
            if (gap > 1e-4)
                printf("  tensor %d differs by %.1e: b %d h %d/%d s %d %d d %d %d scale %g softcap %g window %d %d alibi %d dropout %g bias %d mask %d\n",
                       i, gap, (int)c.p.b, (int)c.p.h, (int)c.p.hk, (int)c.p.sq, (int)c.p.sk, (int)c.p.d, (int)c.p.d_v, c.p.scale,
                       c.p.softcap, (int)c.p.window_left, (int)c.p.window_right, c.p.alibi != NULL, c.p.dropout_p,
                       c.p.bias.ptr != NULL, c.p.mask.ptr != NULL);
            worst = fmax(worst, gap);
            free(expected[i]);
        }
        for (int i = 0; i < TENSORS; i++) free(c.memory[i]);
        free(c.mask);
    }
    report("forward and backward", isa, worst, 1e-4, 0, NULL);
}

int main(int count, char **arguments)
{
    const int trials = count > 1 ? atoi(arguments[1]) : 40;
    const struct fa_cpu_ops *definition = fa_cpu_ops_at(FA_CPU_GENERIC);
    static const char *const names[FA_CPU_LEVELS] = { "generic", "avx2", "avx512" };
    printf("%-26s %-8s %9s\n", "check", "level", "error");
    for (int level = 0; level < FA_CPU_LEVELS; level++) {
        const struct fa_cpu_ops *ops = fa_cpu_ops_at((enum fa_cpu_level)level);
        if (!ops) {
            printf("%-26s %-8s skipped: this CPU lacks it\n", "all", names[level]);
            continue;
        }
        check_gemm(ops, definition);
        check_softmax(ops, definition);
        check_softmax_backward(ops, definition);
        check_score_rows(ops);
        check_bias_and_mask(ops);
        check_conversions(ops);
        check_dropout(ops);
        check_calls(ops->isa, trials);
    }
    printf("%d failed\n", failures);
    return failures != 0;
}
