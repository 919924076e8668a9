#include "sm90.h"
static bool supports(enum fa_pass pass, const struct fa_params *p, struct fa_error *why)
{
    if (pass == FA_BACKWARD) return fa_sm90_backward_supports(p, why);
    fa_fail(why, FA_UNSUPPORTED, "no forward");
    return false;
}
static int64_t workspace(enum fa_pass pass, const struct fa_params *p) { (void)pass; return fa_sm90_backward_workspace(p); }
const struct fa_kernel fa_kernel_sm90 = { "sm90", supports, workspace, NULL, fa_sm90_backward };
