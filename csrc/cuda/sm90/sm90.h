/* cuda/sm90/sm90.h: the passes of the row `sm90` of the kernel table. Plain C. */
#ifndef FA_SM90_H
#define FA_SM90_H

#include "../device.h"

/* What internal.h's struct fa_kernel asks of a row, for one pass. */
bool           fa_sm90_backward_supports(const struct fa_params *p, struct fa_error *why);
int64_t        fa_sm90_backward_workspace(const struct fa_params *p);
enum fa_status fa_sm90_backward(const struct fa_params *p, struct fa_error *error);

#endif
