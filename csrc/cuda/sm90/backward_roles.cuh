/* cuda/sm90/backward_roles.cuh: the walk for head dims above 128, where dK and dV of 64 keys fill the registers of a warpgroup each.
 *
 * Both warpgroups work on the same 64 keys. `values` makes S, P, dV and the first channels of dQ, `keys` dP, dS, dK and the rest
 * of dQ: no product is made twice. P goes from one to the other through shared memory, in 16 bits and in the order of the threads,
 * dS comes back as dQ's left operand; both have two places, so neither warpgroup waits for the other's same step:
 *
 *     values      S(i) | P(i) to keys | issue dV(i) | dQ(i - 1) with the dS(i - 1) of keys, out by red.v4
 *     keys        issue dP(i) | P(i) | dS(i) to values | issue dK(i) | dQ(i), out by red.v4 */
#ifndef FA_SM90_BACKWARD_ROLES_CUH
#define FA_SM90_BACKWARD_ROLES_CUH

#include "backward_block.cuh"

/* dQ's first channels of a step, whose dS may have been waiting for a while. */
FA_SM90_BACKWARD_WALK::values_dq(float (&dq)[DQ_VALUES / 2], const position &at)
{
    mbarrier_wait(shared + Shared::DS_FULL + 8 * (at.step % 2), at.step / 2 % 2);
    wgmma_fence();
    query_product<DQ_VALUES>(dq, shared + Shared::DS + at.step % 2 * Shared::DS_BYTES, 0);
    wgmma_wait<0>();
    wgmma_result(dq);
    warp_arrive(Shared::DS_FREE + 8 * (at.step % 2));
    add_dq<DQ_VALUES>(dq, at, 0, 0, 0);
}

FA_SM90_BACKWARD_WALK::consume_values(int step0)
{
    const int end = step0 + steps();
    float dv[D / 2] = {};
    position at = start(step0);
    zero_keys();
    #pragma unroll 1
    for (; at.step < end; advance_to_next(at)) {
        const int stage = at.step % STAGES, parity = at.step / STAGES % 2, i0 = at.m * BLOCK_M;
        const uint32_t q_tile = shared + Shared::Q + stage * Shared::Q_BYTES, do_tile = shared + Shared::DO + stage * Shared::Q_BYTES;
        const bool masked = first_key(a, seq, min(i0 + BLOCK_M, seq.sq) - 1) > j0 || last_key(a, seq, i0) < j0 + BLOCK_N;
        uint32_t left[QT][4], flags[QT][2];
        const int thread = thread_anew(), key = j0 + (thread >> 5 & 3) * 16 + (thread >> 2 & 7);
        zero_queries(i0, stage, parity);
        {
            float s[BLOCK_M / 2] = {};
            mbarrier_wait(shared + Shared::Q_FULL + 8 * stage, parity);
            wgmma_fence();
            product(s, shared + Shared::K, q_tile);
            if (DROPOUT) dropout_flags(flags, at, key);
            wgmma_wait<0>();
            wgmma_result(s);
            probabilities(s, left, flags, at, key, masked, shared + Shared::LSE2 + stage * BLOCK_M * 4);
            warp_arrive(Shared::Q_FREE + 8 * stage);
            mbarrier_wait(shared + Shared::P_FREE + 8 * (at.step % 2), at.step / 2 % 2 ^ 1);
            const uint32_t exchange = shared + Shared::P + thread_anew() % 128 * 16;
            #pragma unroll
            for (int q = 0; q < QT; q++) {
                uint32_t p[4];
                #pragma unroll
                for (int x = 0; x < 4; x++)
                    p[x] = !MODS && !DROPOUT ? left[q][x]
                                               : pack<T>(s[8 * q + x / 2 * 4 + x % 2 * 2], s[8 * q + x / 2 * 4 + x % 2 * 2 + 1]);
                store_shared_16(exchange + at.step % 2 * Shared::P_BYTES + q * 2048, make_uint4(p[0], p[1], p[2], p[3]));
            }
            warp_arrive(Shared::P_FULL + 8 * (at.step % 2));
        }
        mbarrier_wait(shared + Shared::DO_FULL + 8 * stage, parity);
        wgmma_fence();
        accumulate(dv, left, do_tile);
        if (at.step > step0) {
            float dq[DQ_VALUES / 2] = {};
            values_dq(dq, before(at));
        }
        wgmma_wait<0>();
        wgmma_result(dv);
        keep(left);
        warp_arrive(Shared::DO_FREE + 8 * stage);
    }
    int done = end;
    asm volatile("" : "+r"(done));              /* as in backward.cuh */
    if (done > step0) {
        float dq[DQ_VALUES / 2] = {};
        values_dq(dq, before(at));
    }
    say_done();
    warp_arrive(Shared::K_FREE);
    warp_arrive(Shared::V_FREE);
    store_direct(dv, (thread_anew() >> 5 & 3) * 16, DROPOUT ? a.kept : 1.0f, a.p.dv, (int)a.p.d_v, a.aligned_dv);
}

FA_SM90_BACKWARD_WALK::consume_keys(int step0)
{
    const int end = step0 + steps();
    float dk[D / 2] = {};
    zero_keys();
    #pragma unroll 1
    for (position at = start(step0); at.step < end; advance_to_next(at)) {
        const int stage = at.step % STAGES, parity = at.step / STAGES % 2, i0 = at.m * BLOCK_M;
        const uint32_t q_tile = shared + Shared::Q + stage * Shared::Q_BYTES, do_tile = shared + Shared::DO + stage * Shared::Q_BYTES;
        const uint32_t ds_tile = shared + Shared::DS + at.step % 2 * Shared::DS_BYTES;
        uint32_t left[QT][4];
        float dq[DQ_KEYS / 2] = {};
        zero_queries(i0, stage, parity);
        {
            float dp[BLOCK_M / 2] = {}, s[BLOCK_M / 2];
            mbarrier_wait(shared + Shared::DO_FULL + 8 * stage, parity);
            wgmma_fence();
            product(dp, shared + Shared::V, do_tile);
            mbarrier_wait(shared + Shared::P_FULL + 8 * (at.step % 2), at.step / 2 % 2);
            const uint32_t exchange = shared + Shared::P + thread_anew() % 128 * 16;
            #pragma unroll
            for (int q = 0; q < QT; q++) {
                const uint4 p = load_shared_16(exchange + at.step % 2 * Shared::P_BYTES + q * 2048);
                left[q][0] = p.x, left[q][1] = p.y, left[q][2] = p.z, left[q][3] = p.w;
            }
            unpack_left(s, left);
            warp_arrive(Shared::P_FREE + 8 * (at.step % 2));
            wgmma_wait<0>();
            wgmma_result(dp);
            score_gradients(left, dp, s, shared + Shared::DELTA + stage * BLOCK_M * 4);
            warp_arrive(Shared::DO_FREE + 8 * stage);
        }
        mbarrier_wait(shared + Shared::DS_FREE + 8 * (at.step % 2), at.step / 2 % 2 ^ 1);
        store_ds(ds_tile, left, (thread_anew() >> 5 & 3) * 16);
        fence_proxy_async();
        mbarrier_wait(shared + Shared::Q_FULL + 8 * stage, parity);
        wgmma_fence();
        accumulate(dk, left, q_tile);
        warp_arrive(Shared::DS_FULL + 8 * (at.step % 2));
        mbarrier_wait(shared + Shared::DS_FULL + 8 * (at.step % 2), at.step / 2 % 2);
        wgmma_fence();
        query_product<DQ_KEYS>(dq, ds_tile, DQ_VALUES);
        wgmma_wait<1>();
        wgmma_result(dk);
        warp_arrive(Shared::Q_FREE + 8 * stage);
        wgmma_wait<0>();
        wgmma_result(dq);
        add_dq<DQ_KEYS>(dq, at, 0, 0, DQ_VALUES);
    }
    say_done();
    warp_arrive(Shared::K_FREE);
    warp_arrive(Shared::V_FREE);
    store_direct(dk, (thread_anew() >> 5 & 3) * 16, a.scale, a.p.dk, (int)a.p.d, a.aligned_dk);
}

#endif
