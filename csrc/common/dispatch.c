/* common/dispatch.c: which kernel runs a call: the first row of one table whose supports() says yes.
 *
 * A refusal says why, and a call that every row refuses gets all the reasons. The environment variable
 * FLASH_ATTN_KERNEL=<prefix of a name> pins the choice, for tests and comparisons; each call reads it. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

static const struct row { enum fa_device device; const struct fa_kernel *kernel; } table[] = {
    { FA_CPU, &fa_kernel_cpu },
    { FA_CPU, &fa_kernel_reference },
#ifdef FA_WITH_SM90
    { FA_CUDA, &fa_kernel_sm90 },
#endif
#ifdef FA_WITH_CUDA
    { FA_CUDA, &fa_kernel_sm80 },
#endif
};
enum { ROWS = sizeof table / sizeof *table };

#define MISSING " none: this build was made without nvcc, or with FLASH_ATTN_CUDA=0"

enum fa_status fa_fail(struct fa_error *error, enum fa_status status, const char *format, ...)
{
    va_list values;
    va_start(values, format);
    vsnprintf(error->text, sizeof error->text, format, values);
    va_end(values);
    return status;
}

/* NULL where nothing is pinned. */
static const char *pin(void)
{
    const char *prefix = getenv("FLASH_ATTN_KERNEL");
    return prefix && *prefix ? prefix : NULL;
}

bool fa_is_pinned(const char *name)
{
    const char *prefix = pin();
    return prefix && strncmp(name, prefix, strlen(prefix)) == 0;
}

/* snprintf that goes on where the text ends; cut off at `size`, the length returned is not. */
static size_t append(char *text, size_t size, size_t length, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

static size_t append(char *text, size_t size, size_t length, const char *format, ...)
{
    va_list values;
    va_start(values, format);
    size_t at = length < size ? length : size;
    int added = vsnprintf(text ? text + at : NULL, size - at, format, values);
    va_end(values);
    return length + (added > 0 ? (size_t)added : 0);
}

static bool has_kernels_for(enum fa_device device)
{
    for (int n = 0; n < ROWS; n++)
        if (table[n].device == device) return true;
    return false;
}

/* Calls that no row can take, whatever its kernel says. */
static enum fa_status check_device(const struct fa_params *p, struct fa_error *error)
{
    if (p->device == FA_CUDA && p->dtype == FA_FLOAT64)
        return fa_fail(error, FA_UNSUPPORTED, "float64 tensors are served on the CPU only: pass q.cpu(), "
                       "k.cpu() and v.cpu(), or cast them to float32, float16 or bfloat16");
    if (!has_kernels_for(p->device))
        return fa_fail(error, FA_UNSUPPORTED, "this build of flash_attn has no CUDA kernels: reinstall it "
                       "where nvcc is found (on PATH or in CUDA_HOME) with FLASH_ATTN_CUDA=1, or pass CPU "
                       "tensors");
    return FA_OK;
}

/* The kernel for a valid call, or NULL; `why` gets the refusals on the way, one a line. */
static const struct fa_kernel *choose(enum fa_pass pass, const struct fa_params *p, struct fa_error *why)
{
    const char *pinned = pin();
    size_t length = 0;
    why->text[0] = 0;
    for (int n = 0; n < ROWS; n++) {
        const struct fa_kernel *kernel = table[n].kernel;
        struct fa_error refusal;
        if (table[n].device != p->device || (pinned && !fa_is_pinned(kernel->name))) continue;
        if (kernel->supports(pass, p, &refusal)) return kernel;
        length = append(why->text, sizeof why->text, length, "%s%s: %s", length ? "\n" : "", kernel->name,
                        refusal.text);
    }
    if (length == 0)
        fa_fail(why, FA_UNSUPPORTED, "FLASH_ATTN_KERNEL=%.40s names no kernel for %s tensors", pinned,
                p->device == FA_CPU ? "CPU" : "CUDA");
    return NULL;
}

/* Validates, then chooses: the way into every entry point. */
static enum fa_status prepare(enum fa_pass pass, const struct fa_params *p, const struct fa_kernel **kernel,
                              struct fa_error *error)
{
    enum fa_status status = fa_check(pass, p, error);
    if (!status) status = check_device(p, error);
    if (status) return status;
    *kernel = choose(pass, p, error);
    return *kernel ? FA_OK : FA_UNSUPPORTED;
}

static enum fa_status run(enum fa_pass pass, const struct fa_params *p, struct fa_error *error)
{
    const struct fa_kernel *kernel;
    enum fa_status status = prepare(pass, p, &kernel, error);
    if (status) return status;
    int64_t bytes = kernel->workspace(pass, p);
    if (bytes > p->workspace_bytes || (bytes > 0 && (!p->workspace || (uintptr_t)p->workspace % 64)))
        return fa_fail(error, FA_INVALID, "workspace must hold %lld bytes at an address that 64 divides, got "
                       "%lld bytes at %p", (long long)bytes, (long long)p->workspace_bytes, p->workspace);
    return pass == FA_FORWARD ? kernel->forward(p, error) : kernel->backward(p, error);
}

enum fa_status fa_workspace(enum fa_pass pass, const struct fa_params *p, int64_t *bytes,
                            struct fa_error *error)
{
    const struct fa_kernel *kernel;
    enum fa_status status = prepare(pass, p, &kernel, error);
    *bytes = status ? 0 : kernel->workspace(pass, p);
    return status;
}

enum fa_status fa_forward(const struct fa_params *p, struct fa_error *error)
{
    return run(FA_FORWARD, p, error);
}

enum fa_status fa_backward(const struct fa_params *p, struct fa_error *error)
{
    return run(FA_BACKWARD, p, error);
}

enum fa_status fa_choose(enum fa_pass pass, const struct fa_params *p, const char **name,
                         struct fa_error *why)
{
    const struct fa_kernel *kernel = NULL;
    enum fa_status status = prepare(pass, p, &kernel, why);
    *name = kernel ? kernel->name : NULL;
    return status;
}

size_t fa_info(char *text, size_t size)
{
    const char *pinned = pin();
    size_t length = append(text, size, 0, "CPU instruction set: %s\n", fa_cpu_isa());
    for (enum fa_device device = FA_CPU; device <= FA_CUDA; device++) {
        length = append(text, size, length, "%s kernels:", device == FA_CPU ? "CPU" : "CUDA");
        for (int n = 0; n < ROWS; n++)
            if (table[n].device == device) length = append(text, size, length, " %s", table[n].kernel->name);
        length = append(text, size, length, "%s\n", has_kernels_for(device) ? "" : MISSING);
    }
#ifdef FA_WITH_CUDA
    length += fa_cuda_info(text && length < size ? text + length : NULL, length < size ? size - length : 0);
#endif
    return append(text, size, length, "FLASH_ATTN_KERNEL: %s\n", pinned ? pinned : "not set");
}
