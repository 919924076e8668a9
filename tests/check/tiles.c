/* check/tiles.c: prints the tile of every CUDA kernel that launch.c can find, one a line, for tests/test_build.py; where a variant or
 * the small tile has no kernel of its own there is no line. Linked with the kernels' objects; needs no GPU. */
#include <stdio.h>

#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/sm90/kernels.h"

static const struct { const char *name; fa_cuda_find *find; } tables[] = {
    { "forward 32",   fa_sm80_forward_32 },   { "forward 64",   fa_sm80_forward_64 },   { "forward 96",   fa_sm80_forward_96 },
    { "forward 128",  fa_sm80_forward_128 },  { "forward 192",  fa_sm80_forward_192 },  { "forward 256",  fa_sm80_forward_256 },
    { "backward 32",  fa_sm80_backward_32 },  { "backward 64",  fa_sm80_backward_64 },  { "backward 96",  fa_sm80_backward_96 },
    { "backward 128", fa_sm80_backward_128 }, { "backward 192", fa_sm80_backward_192 }, { "backward 256", fa_sm80_backward_256 },
    { "fp32 forward 64",  fa_sm80_fp32_forward_64 },  { "fp32 forward 128",  fa_sm80_fp32_forward_128 },
    { "fp32 forward 256", fa_sm80_fp32_forward_256 }, { "fp32 backward 64",  fa_sm80_fp32_backward_64 },
    { "fp32 backward 128", fa_sm80_fp32_backward_128 }, { "fp32 backward 256", fa_sm80_fp32_backward_256 },
};

#ifdef FA_WITH_SM90
static const struct { const char *name; fa_sm90_find *find; } hopper_tables[] = {
    { "sm90 forward 64",  fa_sm90_forward_bf16_64 },  { "sm90 forward 96",  fa_sm90_forward_bf16_96 },
    { "sm90 forward 128", fa_sm90_forward_bf16_128 }, { "sm90 forward 192", fa_sm90_forward_bf16_192 },
    { "sm90 forward 256", fa_sm90_forward_bf16_256 },
};
static const struct { const char *name; fa_cuda_helper *find; } added_tables[] = {
    { "sm90 forward 64 added", fa_sm90_added_64 },            { "sm90 forward 128 added", fa_sm90_added_128 },
    { "sm90 backward 64 added", fa_sm90_added_backward_64 },  { "sm90 backward 128 added", fa_sm90_added_backward_128 },
};
static const struct { const char *name; fa_sm90_find_backward *find; } hopper_backward_tables[] = {
    { "sm90 backward 64",  fa_sm90_backward_64 },  { "sm90 backward 96",  fa_sm90_backward_96 },
    { "sm90 backward 128", fa_sm90_backward_128 }, { "sm90 backward 192", fa_sm90_backward_192 },
    { "sm90 backward 256", fa_sm90_backward_256 },
};
#endif

static const char *const variants[] = { "plain", "score-mod", "dropout", "plain-dropout" };

static void print(const char *name, enum fa_variant variant, const char *size, const struct fa_cuda_kernel *kernel)
{
    printf("%s %s%s: %d x %d, %d threads, %d bytes\n", name, variants[variant], size, kernel->block_m, kernel->block_n,
           kernel->threads, kernel->shared_bytes);
}

int main(void)
{
#ifdef FA_WITH_SM90
    for (size_t n = 0; n < sizeof hopper_tables / sizeof *hopper_tables; n++) {
        const char *const sizes[] = { "", " brief", " small" };
        const void *before = NULL;
        for (enum fa_variant variant = FA_PLAIN; variant < FA_SM80_VARIANTS; variant++) {
            const struct fa_cuda_kernel *kernel = hopper_tables[n].find(variant, FA_SM90_USUAL);
            if (kernel->function != before) print(hopper_tables[n].name, variant, "", kernel);
            before = kernel->function;
        }
        before = hopper_tables[n].find(FA_PLAIN, FA_SM90_USUAL)->function;
        for (enum fa_sm90_size size = FA_SM90_BRIEF; size <= FA_SM90_SMALL; size++) {
            const struct fa_cuda_kernel *kernel = hopper_tables[n].find(FA_PLAIN, size);
            if (kernel->function != before) print(hopper_tables[n].name, FA_PLAIN, sizes[size], kernel);
            before = kernel->function;
        }
    }
    for (size_t n = 0; n < sizeof added_tables / sizeof *added_tables; n++) {
        const struct fa_cuda_kernel *kernel = added_tables[n].find(FA_BFLOAT16);
        printf("%s: %d x %d, %d threads, %d bytes\n", added_tables[n].name, kernel->block_m, kernel->block_n, kernel->threads, kernel->shared_bytes);
    }
    for (size_t n = 0; n < sizeof hopper_backward_tables / sizeof *hopper_backward_tables; n++)
        for (enum fa_variant variant = FA_PLAIN; variant < FA_VARIANTS; variant++)
            print(hopper_backward_tables[n].name, variant, "",
                  hopper_backward_tables[n].find(FA_BFLOAT16, variant == FA_SCORE_MOD, variant == FA_DROPOUT));
#endif
    for (size_t n = 0; n < sizeof tables / sizeof *tables; n++)
        for (enum fa_variant variant = FA_PLAIN; variant < FA_SM80_VARIANTS; variant++)
            for (int small = 0; small < 2; small++) {
                const struct fa_cuda_kernel *kernel = tables[n].find(FA_BFLOAT16, variant, small);
                const bool shared = (variant > FA_PLAIN && kernel->function == tables[n].find(FA_BFLOAT16, variant - 1, small)->function)
                                 || (small && kernel->function == tables[n].find(FA_BFLOAT16, variant, false)->function);
                if (!shared) print(tables[n].name, variant, small ? " small" : "", kernel);
            }
    return 0;
}
