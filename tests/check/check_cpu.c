/* check_cpu.c: every instruction set against the definition, and timed beside it, without Python or torch.
 *
 *     make checkasm                       all levels that this CPU has, and AMX emulated (amx_emulation.h)
 *     build/check_cpu [calls [level]]     so many random calls; one level only
 *
 * First each micro-kernel of cpu/ops.h must agree with sums in double, and shows its speed. Then whole
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
    printf("%-26s %-11s %9.2e %s", check, level, worst, good ? "ok  " : "FAIL");
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

/* ----------------------------------------------------------------------------- operands, whatever the table's format */

static enum fa_dtype dtype_of(const struct fa_cpu_ops *ops) { return ops->element == 2 ? FA_BFLOAT16 : FA_FLOAT32; }

/* (rows, stride) of the table's dtype from fp32 (rows, columns), which are rounded to bfloat16; NaN beyond the columns. */
static void *tensor_of(const struct fa_cpu_ops *ops, float *x, int64_t rows, int64_t columns, int64_t stride)
{
    char *t = aligned_alloc(64, (size_t)fa_pad(ops->element * rows * stride + 64, 64));
    memset(t, 0xff, (size_t)(ops->element * rows * stride));
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) {
            float *value = x + i * columns + j;
            *value = fa_bfloat16_to_float(fa_float_to_bfloat16(*value));
            fa_store(dtype_of(ops), t, i * stride + j, *value);
        }
    return t;
}

static void *operand(const struct fa_cpu_ops *ops, int64_t elements)    /* poisoned */
{
    const size_t bytes = (size_t)fa_pad(ops->element * elements + 64, 64);
    return memset(aligned_alloc(64, bytes), 0xff, bytes);
}

/* Element (i, j) of what load_right made with row stride ld. */
static double right_at(const struct fa_cpu_ops *ops, const void *right, int64_t ld, int64_t i, int64_t j)
{
    if (ops->element == 4) return ((const float *)right)[i * ld + j];
    return fa_load(FA_BFLOAT16, right, i / 32 * 32 * ld + j / 16 * 512 + i % 32 / 2 * 32 + j % 16 * 2 + i % 2);
}

/* Worst error of C against the sums of x(i, p) y(p, j), relative to 1 + |sum|. */
#define WORST_SUM(rows, columns, inner, got, x, y)                                                                      \
    for (int64_t i = 0; i < (rows); i++)                                                                                \
        for (int64_t j = 0; j < (columns); j++) {                                                                       \
            double sum_ = 0;                                                                                            \
            for (int64_t p = 0; p < (inner); p++) sum_ += (double)(x) * (y);                                            \
            const double gap_ = fabs((got) - sum_) / (1 + fabs(sum_));                                                  \
            if (!(gap_ <= worst)) worst = isnan(gap_) ? INFINITY : gap_;                                                \
        }

/* S = Q K^T, O += P V and dV += P^T X from tensors to results, every size up to a block's. */
static void check_products(const struct fa_cpu_ops *ops)
{
    double worst = 0, worst_sums = 0;
    for (int trial = 0; trial < 40; trial++) {
        const int64_t m = between(1, M), n = between(1, N), d = between(1, 140), stride = d + between(0, 5), pn = n + between(0, 3);
        const int64_t n_pad = fa_pad(n, ops->pad), d_pad = fa_pad(d, ops->pad), x_row = fa_pad(M, 32);
        float *x = random_floats(m * d, -1, 1), *y = random_floats(n * d, -1, 1), *w = random_floats(m * n, -1, 1);
        void *q = tensor_of(ops, x, m, d, stride), *k = tensor_of(ops, y, n, d, stride), *p = tensor_of(ops, w, m, n, pn);
        void *left = operand(ops, 112 * d_pad), *rows = operand(ops, N * d_pad), *panels = operand(ops, (N + 64) * d_pad);
        void *p_left = operand(ops, 112 * n_pad), *p_sum = operand(ops, 128 * n_pad), *columns = operand(ops, d_pad * x_row);
        float *c = random_floats(112 * N, NAN, NAN), *sums = random_floats(d_pad * N, 0, 0);
        const enum fa_dtype dtype = dtype_of(ops);

        ops->load_rows(left, d_pad, q, dtype, stride, m, d);
        ops->load_rows(rows, d_pad, k, dtype, stride, n, d);
        ops->pack_transposed(panels, rows, d_pad, n, d);
        ops->gemm((struct fa_result){ c, N }, (struct fa_left){ left, d_pad }, (struct fa_right){ panels, ops->nr, ops->nr * d_pad },
                  m, n_pad, d, false);
        WORST_SUM(m, n, d, c[i * N + j], x[i * d + p], y[j * d + p]);

        for (int64_t i = 0; i < m * N; i++) c[i] = 0;
        ops->load_rows(p_left, n_pad, p, dtype, pn, m, n);
        ops->load_right(panels, d_pad, k, dtype, stride, n, d);
        ops->gemm((struct fa_result){ c, N }, (struct fa_left){ p_left, n_pad }, (struct fa_right){ panels, d_pad, ops->row_panel },
                  m, d_pad, n, true);
        WORST_SUM(m, d, n, c[i * N + j], w[i * n + p], y[p * d + j]);

        ops->load_right(p_sum, n_pad, p, dtype, pn, m, n);
        if (ops->pack_columns) ops->pack_columns(columns, x_row, left, d_pad, m, d_pad);
        const struct fa_result to = { sums, ops->pack_columns ? N : d_pad };
        void *stored = operand(ops, n * stride);
        ops->sum_rows(to, (struct fa_left){ p_sum, n_pad },
                      ops->pack_columns ? (struct fa_left){ columns, x_row } : (struct fa_left){ left, d_pad }, n, d_pad, m);
        ops->store_sums(stored, dtype, stride, to, n, d, 0.5f);
        const double before = worst;
        worst = worst_sums;
        WORST_SUM(n, d, m, fa_load(dtype, stored, i * stride + j), 0.5 * w[p * n + i], x[p * d + j]);
        worst_sums = worst, worst = before;
        free(x); free(y); free(w); free(q); free(k); free(p); free(left); free(rows); free(panels); free(p_left); free(p_sum);
        free(columns); free(c); free(sums); free(stored);
    }
    report("sum_rows, store_sums", ops->isa, worst_sums, ops->element == 2 ? 4e-3 : 1e-5, 0, NULL);

    const int64_t keys = ops->backward.n < N ? ops->backward.n : N;
    void *a = operand(ops, N * N), *b = operand(ops, 2 * N * N);
    float *c = random_floats(N * N, 0, 0);
    memset(a, 0, (size_t)(ops->element * N * N)), memset(b, 0, (size_t)(2 * ops->element * N * N));
    double s = SECONDS(ops->gemm((struct fa_result){ c, N }, (struct fa_left){ a, D }, (struct fa_right){ b, ops->nr, ops->nr * D }, M, N, D, false));
    report("gemm Q K^T, 96x192x128", ops->isa, worst, 1e-5, 2.0 * M * N * D / s, "GFLOP/s");
    s = SECONDS(ops->gemm((struct fa_result){ c, N }, (struct fa_left){ a, N }, (struct fa_right){ b, D, ops->row_panel }, M, D, N, true));
    report("gemm P V, 96x128x192", ops->isa, worst, 1e-5, 2.0 * M * N * D / s, "GFLOP/s");
    s = SECONDS(ops->sum_rows((struct fa_result){ c, N }, (struct fa_left){ b, N }, (struct fa_left){ a, N }, keys, D, M));
    report("sum_rows P^T dO", ops->isa, worst, 1e-5, 2.0 * M * (double)keys * D / s, "GFLOP/s");
    free(a); free(b); free(c);
}

/* P at its own precision, exp2's error included: an element of the table's dtype. */
static double precision(const struct fa_cpu_ops *ops) { return ops->element == 2 ? 0x1p-8 + 2e-4 : 2e-5; }

static void check_softmax(const struct fa_cpu_ops *ops)
{
    const float scale = 0.7f;
    double worst = 0, worst_sum = 0;
    float *s = random_floats(M * N, -40, 40), *z = random_floats(M * N, 0, 2), *o = random_floats(M * D, -1, 1);
    for (int64_t j = 0; j < N; j++) s[j] = -INFINITY, s[7 * N + j] *= 1e9f;     /* a row that sees nothing, and huge scores */
    s[N + 5] = -INFINITY;
    for (int variant = 0; variant < 2; variant++) {
        float *x = copy_floats(s, M * N), *rows = copy_floats(o, M * D), max[M], sum[M];
        void *p = ops->element == 4 ? x : operand(ops, M * N);
        for (int64_t r = 0; r < M; r++) max[r] = r % 3 ? -INFINITY : r % 2 ? 39 : 7, sum[r] = r % 3 ? 0 : 2;
        ops->online_softmax((struct fa_result){ x, N }, M, N, scale, max, sum, (struct fa_result){ rows, D }, D, variant ? z : NULL, p);
        for (int64_t r = 0; r < M; r++) {
            const double old = r % 3 ? -INFINITY : r % 2 ? 39 : 7, alpha = max[r] == old ? 1 : exp2(scale * (old - max[r]));
            double top = old, total = (r % 3 ? 0 : 2) * alpha;
            for (int64_t j = 0; j < N; j++) {
                const double e = s[r * N + j] == -INFINITY ? 0 : exp2(scale * ((double)s[r * N + j] - max[r]));
                const double wanted = e * (variant ? z[r * N + j] : 1), got = fa_load(dtype_of(ops), p, r * N + j);
                top = fmax(top, s[r * N + j]), total += e;
                worst = fmax(worst, fabs(got - wanted) / (wanted + 1e-6));
            }
            if (!(scale * (top - max[r]) <= (ops->element == 2 ? 8.001 : 0)) && top != -INFINITY) worst = INFINITY;
            worst_sum = fmax(worst_sum, fabs(sum[r] - total) / (total + 1e-6));
            for (int64_t c = 0; c < D; c++) worst_sum = fmax(worst_sum, fabs(rows[r * D + c] - alpha * o[r * D + c]) / (alpha + 1e-6));
        }
        if (p != x) free(p);
        free(x); free(rows);
    }
    float max[M], sum[M] = {0};
    for (int64_t r = 0; r < M; r++) max[r] = 40;
    void *p = ops->element == 4 ? s : operand(ops, M * N);
    const double seconds = SECONDS(ops->online_softmax((struct fa_result){ s, N }, 32, N, 0.7f, max, sum, (struct fa_result){ o, D }, D, NULL, p));
    report("online_softmax: P", ops->isa, worst, precision(ops), 32 * N / seconds, "Gscore/s");
    report("online_softmax: sum, O", ops->isa, worst_sum, ops->element == 2 ? 2e-4 : 2e-5, 0, NULL);
    if (p != s) free(p);
    free(s); free(o); free(z);
}

static void check_softmax_backward(const struct fa_cpu_ops *ops)
{
    float *s = random_floats(M * N, -10, 0), *dp = random_floats(M * N, -1, 1), *z = random_floats(M * N, 0, 2);
    float *d = random_floats(M * N, 0, 1), *lse = random_floats(M, 0, 3), *delta = random_floats(M, -1, 1);
    const float scale = 1.2f;
    double worst = 0;
    lse[3] = INFINITY;
    s[5 * N + 7] = -INFINITY;
    for (int64_t j = 0; j < N; j++) s[6 * N + j] = -1e9f + 64 * (float)(j % 3);     /* huge scores: powers of two apart */
    lse[6] = -1e9f + 128;
    for (int variant = 0; variant < 8; variant++) {
        const int64_t rows = variant & 4 ? 77 : M;
        float *x = copy_floats(s, M * N), *g = copy_floats(dp, M * N);
        struct fa_gradients t = { x, g, g, variant & 2 };
        if (ops->element != 4) t = (struct fa_gradients){ operand(ops, M * N), operand(ops, M * N), operand(ops, M * N), variant & 2 };
        ops->softmax_backward((struct fa_result){ x, N }, (struct fa_result){ g, N }, rows, N, scale, lse, delta,
                              variant & 1 ? z : NULL, variant & 2 ? d : NULL, t);
        for (int64_t r = 0; r < (ops->element == 2 ? M : rows); r++)
            for (int64_t j = 0; j < N; j++) {
                const int64_t at = r * N + j;
                const double p = r < rows ? fmin(1, exp2(scale * ((double)s[at] - lse[r]))) : 0, mask = variant & 1 ? z[at] : 1;
                const double ds = p * (mask * dp[at] - delta[r]) * (variant & 2 ? d[at] : 1);
                worst = fmax(worst, fabs(right_at(ops, t.p, N, r, j) - p * mask) / (1 + p * mask));
                worst = fmax(worst, fabs(right_at(ops, t.ds_sum, N, r, j) - ds) / (1 + fabs(ds)));
                if (r < rows) worst = fmax(worst, fabs(fa_load(dtype_of(ops), t.ds, at) - ds) / (1 + fabs(ds)));
            }
        if (ops->element != 4) free(t.p), free(t.ds), free(t.ds_sum);
        free(x); free(g);
    }
    struct fa_gradients t = { s, dp, dp, false };
    if (ops->element != 4) t = (struct fa_gradients){ operand(ops, M * N), operand(ops, M * N), operand(ops, M * N), false };
    const double seconds = SECONDS(ops->softmax_backward((struct fa_result){ s, N }, (struct fa_result){ dp, N }, 32, N, scale, lse, delta,
                                                         NULL, NULL, t));
    report("softmax_backward", ops->isa, worst, precision(ops), 32 * N / seconds, "Gscore/s");
    if (ops->element != 4) free(t.p), free(t.ds), free(t.ds_sum);
    free(s); free(dp); free(z); free(d); free(lse); free(delta);
}

/* Random terms of a strip, and each score in double. Some rows are hidden but for their first key. */
static void random_terms(struct fa_score_terms *terms, void *bias, uint8_t *mask, int64_t m, int64_t n, float factor, double *scores)
{
    terms->has_bias = between(0, 1), terms->has_mask = between(0, 1), terms->dtype = (enum fa_dtype)between(FA_FLOAT32, FA_BFLOAT16);
    for (int64_t r = 0; r < m; r++) {
        const float hidden = between(0, 5) ? 0.2f : 1;
        terms->bias[r] = (char *)bias + 4 * r * N, terms->mask[r] = mask + r * N;
        for (int64_t j = 0; j < n; j++) {
            fa_store(terms->dtype, (void *)terms->bias[r], j, j && uniform(0, 1) < 0.1f ? -INFINITY : uniform(-3, 3));
            mask[r * N + j] = j == 0 || uniform(0, 1) >= hidden;
            scores[r * N + j] = factor * scores[r * N + j] + (terms->has_bias ? fa_load(terms->dtype, terms->bias[r], j) : 0);
            if (terms->has_mask && !mask[r * N + j]) scores[r * N + j] = -INFINITY;
        }
    }
}

/* What joins products and softmax, against sums in double; the scores' spread makes references move. */
static void check_joined_steps(const struct fa_cpu_ops *ops)
{
    if (!ops->softmax_of_products) return;
    double worst = 0, worst_backward = 0;
    int done = 0;
    for (int trial = 0; trial < 60; trial++) {
        const int64_t m = between(1, FA_ROW_PAD), n = fa_pad(between(1, N), ops->pad), d = between(1, 96), dv = between(1, 96);
        const int64_t d_pad = fa_pad(d, ops->pad), dv_pad = fa_pad(dv, ops->pad);
        const float factor = uniform(0.1f, trial % 3 ? 1 : 9), scale = 1.4427f;
        float *x = random_floats(m * d, -1, 1), *y = random_floats(n * d, -1, 1), *dx = random_floats(m * dv, -1, 1), *w = random_floats(n * dv, -1, 1);
        void *q = tensor_of(ops, x, m, d, d), *k = tensor_of(ops, y, n, d, d), *dout = tensor_of(ops, dx, m, dv, dv), *v = tensor_of(ops, w, n, dv, dv);
        void *q_left = operand(ops, FA_ROW_PAD * d_pad), *dout_left = operand(ops, FA_ROW_PAD * dv_pad), *rows = operand(ops, N * 96);
        void *k_panels = operand(ops, (N + 64) * d_pad), *v_panels = operand(ops, (N + 64) * dv_pad), *p = operand(ops, FA_ROW_PAD * N);
        const enum fa_dtype dtype = dtype_of(ops);
        ops->load_rows(q_left, d_pad, q, dtype, d, m, d), ops->load_rows(dout_left, dv_pad, dout, dtype, dv, m, dv);
        ops->load_rows(rows, d_pad, k, dtype, d, n, d), ops->pack_transposed(k_panels, rows, d_pad, n, d);
        ops->load_rows(rows, dv_pad, v, dtype, dv, n, dv), ops->pack_transposed(v_panels, rows, dv_pad, n, dv);
        const struct fa_left q_at = { q_left, d_pad }, dout_at = { dout_left, dv_pad };
        const struct fa_right k_at = { k_panels, ops->nr, ops->nr * d_pad }, v_at = { v_panels, ops->nr, ops->nr * dv_pad };

        double *scores = calloc((size_t)(FA_ROW_PAD * N), sizeof *scores);
        for (int64_t r = 0; r < m; r++)
            for (int64_t j = 0; j < n; j++)
                for (int64_t c = 0; c < d; c++) scores[r * N + j] += (double)x[r * d + c] * y[j * d + c];
        struct fa_score_terms terms;
        void *bias = random_floats(FA_ROW_PAD * N, 0, 0);
        uint8_t *mask = calloc(FA_ROW_PAD, N);
        random_terms(&terms, bias, mask, m, n, factor, scores);

        float max[FA_ROW_PAD], before[FA_ROW_PAD], sum[FA_ROW_PAD], *o = random_floats(FA_ROW_PAD * D, -1, 1), *o_before = copy_floats(o, FA_ROW_PAD * D);
        for (int64_t r = 0; r < FA_ROW_PAD; r++) max[r] = before[r] = r % 3 ? -INFINITY : uniform(-20, 3), sum[r] = r % 3 ? 0 : 2;
        if (ops->softmax_of_products(q_at, k_at, m, n, d, factor, &terms, scale, max, sum, (struct fa_result){ o, D }, D, (struct fa_left){ p, N })) {
            done++;
            for (int64_t r = 0; r < m; r++) {
                const double alpha = r % 3 ? 1 : exp2(scale * ((double)before[r] - max[r]));
                double total = r % 3 ? 0 : 2 * alpha;
                for (int64_t j = 0; j < n; j++) {
                    const double wanted = exp2(scale * (scores[r * N + j] - max[r]));
                    worst = fmax(worst, fabs(fa_load(dtype, p, r * N + j) - wanted) / (wanted + 1e-6));
                    total += wanted;
                }
                worst = fmax(worst, fabs(sum[r] - total) / total);
                if (!(total < 2048)) worst = INFINITY;
                for (int64_t c = 0; c < D && r % 3 == 0; c++)
                    worst = fmax(worst, fabs(o[r * D + c] - alpha * o_before[r * D + c]) / (alpha + 1e-6));
            }
        }
        float lse[FA_ROW_PAD], delta[FA_ROW_PAD], *ds = random_floats(FA_ROW_PAD * N, NAN, NAN);
        struct fa_gradients t = { operand(ops, FA_ROW_PAD * N), operand(ops, FA_ROW_PAD * N), operand(ops, FA_ROW_PAD * N), true };
        for (int64_t r = 0; r < m; r++) {
            double top = -INFINITY;
            for (int64_t j = 0; j < n; j++) top = fmax(top, scores[r * N + j]);
            lse[r] = between(0, 5) ? (float)top + uniform(0, 2) : INFINITY, delta[r] = uniform(-1, 1);
        }
        if (ops->gradients_of_products(q_at, k_at, dout_at, v_at, m, n, d, dv, factor, &terms, scale, lse, delta, ds, t, N)) {
            done++;
            for (int64_t r = 0; r < FA_ROW_PAD; r++)
                for (int64_t j = 0; j < n; j++) {
                    double dp = 0;
                    for (int64_t c = 0; c < dv && r < m; c++) dp += (double)dx[r * dv + c] * w[j * dv + c];
                    const double wanted_p = r < m ? exp2(scale * (scores[r * N + j] - lse[r])) : 0, wanted = r < m ? wanted_p * (dp - delta[r]) : 0;
                    worst_backward = fmax(worst_backward, fabs(right_at(ops, t.p, N, r, j) - wanted_p) / (1 + wanted_p));
                    worst_backward = fmax(worst_backward, fabs(right_at(ops, t.ds_sum, N, r, j) - wanted) / (1 + fabs(wanted)));
                    if (r >= m) continue;
                    worst_backward = fmax(worst_backward, fabs(fa_load(dtype, t.ds, r * N + j) - wanted) / (1 + fabs(wanted)));
                    if (terms.has_bias || terms.has_mask) worst_backward = fmax(worst_backward, fabs(ds[r * N + j] - wanted) / (1 + fabs(wanted)));
                }
        }
        free(x); free(y); free(dx); free(w); free(q); free(k); free(dout); free(v); free(q_left); free(dout_left); free(rows); free(k_panels);
        free(v_panels); free(p); free(scores); free(bias); free(mask); free(o); free(o_before); free(ds); free(t.p); free(t.ds); free(t.ds_sum);
    }
    if (done < 100) worst = INFINITY;
    report("softmax_of_products", ops->isa, worst, precision(ops), 0, NULL);
    report("gradients_of_products", ops->isa, worst_backward, precision(ops), 0, NULL);
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
    enum { WIDE = 67, LD = 96 };
    float values[WIDE] = { 0, -0.0f, INFINITY, -INFINITY, NAN, 65504, 65520, 6e-8f, 3e-8f, 1e-45f, 3.4e38f, 1.00390625f, 1.01171875f };
    for (int i = 13; i < WIDE; i++) values[i] = uniform(-8, 8);
    double worst = 0;
    for (enum fa_dtype dtype = ops->element == 2 ? FA_BFLOAT16 : FA_FLOAT32; dtype <= FA_BFLOAT16; dtype++) {
        uint8_t stored[4 * WIDE + 64] = {0}, expected[4 * WIDE] = {0};
        float padded[LD] = {0}, back[LD], wanted[LD] = {0};
        memcpy(padded, values, sizeof values);
        ops->store_row(stored, dtype, padded, WIDE, 1);
        for (int i = 0; i < WIDE; i++) fa_store(dtype, expected, i, values[i]), wanted[i] = (float)fa_load(dtype, expected, i);
        for (int i = 0; i < WIDE; i++)
            if (!isnan(values[i]) && memcmp(stored + i * (int)fa_sizeof(dtype), expected + i * (int)fa_sizeof(dtype), fa_sizeof(dtype)))
                worst = 1;
        if (ops->element == 2) {
            uint16_t halves[LD + 16];
            ops->load_rows(halves, LD, stored, dtype, WIDE, 1, WIDE);
            for (int i = 0; i < LD; i++) back[i] = fa_bfloat16_to_float(halves[i]);
        } else
            ops->load_rows(back, LD, stored, dtype, WIDE, 1, WIDE);
        worst = fmax(worst, difference(back, wanted, LD));
    }
    report("load_rows, store_row", ops->isa, worst, 0, 0, NULL);
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

/* Tensors 0 to 3 and BIAS are given, 4 to DBIAS are results; from LSE on they are fp32. */
enum { LSE = 8, DBIAS, BIAS, TENSORS };
struct call { struct fa_params p; char *memory[TENSORS]; int64_t size[TENSORS]; uint8_t *mask; int64_t rng[2]; float slopes[8]; };
static enum fa_dtype dtype_in(const struct call *c, int which) { return which >= LSE ? FA_FLOAT32 : c->p.dtype; }

static struct fa_tensor tensor(struct call *c, int which, int64_t s, int64_t h, int64_t d)
{
    c->size[which] = c->p.b * s * h * d;
    c->memory[which] = aligned_alloc(64, (size_t)fa_pad(4 * c->size[which] + 64, 64));
    for (int64_t i = 0; i < c->size[which]; i++) fa_store(dtype_in(c, which), c->memory[which], i, uniform(-1.5f, 1.5f));
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
        for (int i = DBIAS; i <= BIAS; i++) c->memory[i] = (char *)random_floats(c->size[i], -2, 2);
        p->bias.ptr = c->memory[BIAS];
        p->dbias = p->bias;
        p->dbias.ptr = c->memory[DBIAS];
        for (int64_t n = between(0, 1) ? c->size[BIAS] / 3 : 0; n > 0; n--) ((float *)p->bias.ptr)[between(0, c->size[BIAS] - 1)] = -INFINITY;
    }
    if (between(0, 1)) {
        const int64_t size = random_scores(p, &p->mask), hidden = between(0, size);
        p->mask.ptr = c->mask = malloc((size_t)size);
        for (int64_t i = 0; i < size; i++) c->mask[i] = between(0, 5) > 0;
        memset(c->mask + between(0, size - hidden), 0, (size_t)hidden);
    }
}

static struct call random_call(enum fa_dtype dtype)
{
    struct call c = { .rng = { between(0, INT32_MAX), between(0, INT32_MAX) } };
    struct fa_params *p = &c.p;
    p->dtype = dtype;
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

/* Values as fp32, so that they can be compared after the next run has written over them. */
static float *values_of(const struct call *c, int which)
{
    float *x = random_floats(c->size[which], 0, 0);
    for (int64_t i = 0; i < c->size[which]; i++) x[i] = (float)fa_load(dtype_in(c, which), c->memory[which], i);
    return x;
}

/* What bfloat16's errors are measured by: the largest value of their tensor. The terms of dS cancel along a row, so where an
 * element of dbias sums whole rows, it is their number. */
static double unit_of(const struct call *c, int which, const float *x)
{
    const int64_t n = c->size[which], rows = c->p.b * c->p.h * c->p.sq;
    double most = which == DBIAS && c->p.dbias.stride_k == 0 ? (double)rows / (double)n : 1e-3;
    for (int64_t i = 0; i < n; i++)
        if (isfinite(x[i])) most = fmax(most, fabs((double)x[i]));
    return most;
}

static void check_calls(const char *isa, enum fa_dtype dtype, double bound, int trials)
{
    double worst = 0;
    setenv("FLASH_ATTN_CPU_ISA", isa, 1);
    for (int trial = 0; trial < trials; trial++) {
        struct call c = random_call(dtype);
        c.p.rng = c.rng;
        if (c.p.alibi) c.p.alibi = c.slopes;
        setenv("FLASH_ATTN_KERNEL", "reference", 1);
        run(&c.p, FA_FORWARD);
        run(&c.p, FA_BACKWARD);
        float *expected[BIAS] = {0};
        for (int i = 4; i < BIAS && c.memory[i]; i++) {
            expected[i] = values_of(&c, i);
            memset(c.memory[i], 0xff, (size_t)c.size[i] * fa_sizeof(dtype_in(&c, i)));      /* poison the outputs */
        }
        setenv("FLASH_ATTN_KERNEL", "cpu", 1);
        run(&c.p, FA_FORWARD);
        run(&c.p, FA_BACKWARD);
        for (int i = 4; i < BIAS && c.memory[i]; i++) {
            float *ours = values_of(&c, i);
            const double unit = dtype == FA_BFLOAT16 ? unit_of(&c, i, expected[i]) : 1;
            const double gap = difference(ours, expected[i], c.size[i]) / unit;
            if (!(gap <= bound))
                printf("  tensor %d differs by %.1e: b %d h %d/%d s %d %d d %d %d scale %g softcap %g window %d %d alibi %d dropout %g bias %d mask %d\n",
                       i, gap, (int)c.p.b, (int)c.p.h, (int)c.p.hk, (int)c.p.sq, (int)c.p.sk, (int)c.p.d, (int)c.p.d_v, c.p.scale,
                       c.p.softcap, (int)c.p.window_left, (int)c.p.window_right, c.p.alibi != NULL, c.p.dropout_p,
                       c.p.bias.ptr != NULL, c.p.mask.ptr != NULL);
            worst = fmax(worst, gap);
            free(ours);
            free(expected[i]);
        }
        for (int i = 0; i < TENSORS; i++) free(c.memory[i]);
        free(c.mask);
    }
    report(dtype == FA_BFLOAT16 ? "calls in bfloat16" : "calls in fp32", isa, worst, bound, 0, NULL);
}

int main(int count, char **arguments)
{
    const int trials = count > 1 ? atoi(arguments[1]) : 40;
    static const char *const names[FA_CPU_LEVELS] = { "generic", "avx2", "avx512", "avx512_bf16", "amx" };
    printf("%-26s %-11s %9s\n", "check", "level", "error");
    for (int level = 0; level < FA_CPU_LEVELS; level++) {
        const struct fa_cpu_ops *ops = fa_cpu_ops_at((enum fa_cpu_level)level);
        if (count > 2 && strcmp(arguments[2], names[level])) continue;
        if (!ops) {
            printf("%-26s %-11s skipped: this CPU lacks it\n", "all", names[level]);
            continue;
        }
        if (ops->enter) ops->enter();
        check_products(ops);
        check_softmax(ops);
        check_softmax_backward(ops);
        check_joined_steps(ops);
        if (ops->leave) ops->leave();
        check_score_rows(ops);
        check_bias_and_mask(ops);
        check_conversions(ops);
        check_dropout(ops);
        if (ops->element == 4) check_calls(ops->isa, FA_FLOAT32, 1e-4, trials);
        check_calls(ops->isa, FA_BFLOAT16, 4e-2, trials);
    }
    printf("%d failed\n", failures);
    return failures != 0;
}
