/* cuda/sequence.cuh: lengths, offsets and visible keys of one sequence, on the device. Values of device tensors are clamped to
 * the tensors, so whatever they hold, nothing outside is read or written. */
#ifndef FA_SEQUENCE_CUH
#define FA_SEQUENCE_CUH

#include "args.h"
#include "ptx.cuh"

struct sequence {
    int q0, k0;             /* first rows in packed tensors, 0 in dense ones */
    int sq, sk;             /* lengths that attention sees */
    int q_rows, k_rows;     /* rows that belong to the sequence and are written, used or not */
};

FA_DEVICE int clamp_int(int64_t x, int64_t low, int64_t high) { return (int)(x < low ? low : x > high ? high : x); }

FA_DEVICE sequence sequence_of(const fa_params &p, int b)
{
    sequence s = { 0, 0, (int)p.sq, (int)p.sk, (int)p.sq, (int)p.sk };
    if (p.cu_q) {
        s.q0 = clamp_int(p.cu_q[b], 0, p.total_q);
        s.q_rows = clamp_int(p.cu_q[b + 1], s.q0, p.total_q) - s.q0;
        s.sq = min(s.q_rows, (int)p.sq);
    }
    if (p.cu_k) {
        s.k0 = clamp_int(p.cu_k[b], 0, p.total_k);
        s.k_rows = clamp_int(p.cu_k[b + 1], s.k0, p.total_k) - s.k0;
        s.sk = min(s.k_rows, (int)p.sk);
    }
    if (p.seqused_k) s.sk = clamp_int(p.seqused_k[b], 0, s.sk);
    return s;
}

/* Keys that query i sees: [first, last). */
FA_DEVICE int first_key(const fa_cuda_args &a, const sequence &s, int i)
{
    return a.window_left < 0 ? 0 : max(0, i + s.sk - s.sq - a.window_left);
}
FA_DEVICE int last_key(const fa_cuda_args &a, const sequence &s, int i)
{
    return a.window_right < 0 ? s.sk : min(s.sk, i + s.sk - s.sq + a.window_right + 1);
}
/* Queries that see key j: [first, last). */
FA_DEVICE int first_query(const fa_cuda_args &a, const sequence &s, int j)
{
    return a.window_right < 0 ? 0 : max(0, j - a.window_right - s.sk + s.sq);
}
FA_DEVICE int last_query(const fa_cuda_args &a, const sequence &s, int j)
{
    return a.window_left < 0 ? s.sq : min(s.sq, j + a.window_left - s.sk + s.sq + 1);
}

#endif
