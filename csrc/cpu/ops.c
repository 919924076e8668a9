/* cpu/ops.c: which micro-kernels this CPU runs: a walk up the levels, capped by FLASH_ATTN_CPU_ISA. */
#include <stdlib.h>
#include <string.h>

#include "ops.h"

extern const struct fa_cpu_ops fa_cpu_ops_generic, fa_cpu_ops_avx2, fa_cpu_ops_avx512, fa_cpu_ops_avx512_bf16, fa_cpu_ops_amx;
extern bool fa_cpu_amx_usable(void);

const struct fa_cpu_ops *fa_cpu_ops_at(enum fa_cpu_level level)
{
    if (level == FA_CPU_GENERIC) return &fa_cpu_ops_generic;
#ifdef __x86_64__
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
                             && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (level == FA_CPU_AVX2 && avx2) return &fa_cpu_ops_avx2;
    if (level == FA_CPU_AVX512 && avx512) return &fa_cpu_ops_avx512;
    if (level == FA_CPU_AVX512_BF16 && avx512 && __builtin_cpu_supports("avx512bf16")) return &fa_cpu_ops_avx512_bf16;
    if (level == FA_CPU_AMX && avx512 && fa_cpu_amx_usable()) return &fa_cpu_ops_amx;
#endif
    return NULL;
}

/* Whose vdpbf16ps is worth having; ops_avx512_bf16.c. */
static bool is_amd(void)
{
#ifdef __x86_64__
    return __builtin_cpu_is("amd");
#else
    return false;
#endif
}

/* Read at every call, so that a program can compare levels; an unknown name caps nothing. */
const struct fa_cpu_ops *fa_cpu_ops(enum fa_dtype dtype)
{
    const char *cap = getenv("FLASH_ATTN_CPU_ISA");
    const struct fa_cpu_ops *best = NULL;
    for (int level = FA_CPU_GENERIC; level < FA_CPU_LEVELS; level++) {
        const struct fa_cpu_ops *ops = fa_cpu_ops_at((enum fa_cpu_level)level);
        if (!ops) continue;
        const bool asked = cap && strcmp(cap, ops->isa) == 0, slow = level == FA_CPU_AVX512_BF16 && !is_amd();
        if ((ops->element == 4 || dtype == FA_BFLOAT16) && (asked || !slow)) best = ops;
        if (asked) break;
    }
    return best;
}

const char *fa_cpu_isa(void)
{
    return fa_cpu_ops(FA_BFLOAT16)->isa;
}
