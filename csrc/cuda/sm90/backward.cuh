/* cuda/sm90/backward.cuh: the gradients on Hopper, with TMA and wgmma; a block owns the keys of its consumer warpgroups, 64 each.
 *
 *     S^T = K Q^T    P = exp2(c S - lse2)    dV += P^T dO    dP^T = V dO^T    dS = P (dP - delta)    dK += dS^T Q    dQ += dS K
 *
 * Roles. One thread of the producer warpgroup loads K and V once, then Q, lse2, dO and delta of one tile of BLOCK_M queries after
 * the other, for each query head of the group, into two stages; a stage is free when every consumer warp has said so. A consumer
 * warpgroup has 64 keys: P^T and dS^T come out of the products as the left operands of dV's and dK's, in registers, where dK and dV
 * stay to the end, so grouped heads need no second sum. Only dS passes through shared memory, for dQ, which the warpgroups make in
 * turns: it needs all keys' dS, and one warpgroup reads it once. dQ leaves through shared memory in the order of its fragments
 * (dq_layout.cuh), a bulk fp32 sum a warp; where dq must be deterministic, a thread of the producer's waits for the turn and adds.
 *
 * Pipeline. dQ is one step behind, so that no warpgroup waits for the other's dS of the same step, and dK runs into the next one:
 *
 *     issue S(i), dP(i) | dK(i - 1) is done | P(i) behind dP(i) | issue dV(i) | dS(i) behind dV(i), to shared memory
 *     | the one whose turn it is: issue dQ(i - 1), dK(i), dQ(i - 1) goes out behind dK(i)        | else: issue dK(i)
 *
 * Order. A block has one key tile or takes one after the other, by tickets: the next one's K, V and first queries then come while this
 * one's results leave. The producer's idle warps, and at the end all warps, make dq of heads whose key tiles are done: no kernel does
 * behind this one. They wait for tiles that running blocks have. backward.c decides.
 *
 * Masks. Tiles that some key does not see whole set the scores of unseen pairs to -inf on their way to P. TMA fills rows outside
 * the tensors with zeros; rows of other sequences, which may hold NaN, are zeroed in shared memory before a product reads them. */
#ifndef FA_SM90_BACKWARD_CUH
#define FA_SM90_BACKWARD_CUH

#include "backward_roles.cuh"

FA_SM90_BACKWARD_WALK::consume(int step0)
{
    const int group = __shfl_sync(0xffffffff, threadIdx.x / 128 - 1, 0), row16 = group * 64 + (threadIdx.x >> 5 & 3) * 16;
    const int key = j0 + row16 + (threadIdx.x >> 2 & 7), end = step0 + steps();
    const uint32_t own_k = shared + Shared::K + group * 64 * 128, own_v = shared + Shared::V + group * 64 * 128;
    float dk[D / 2], dv[D / 2];
    #pragma unroll
    for (int e = 0; e < D / 2; e++) dk[e] = dv[e] = 0.0f;

    zero_keys();
    uint32_t k_left[KV_STEPS][4], v_left[KV_STEPS][4];
    if (Tile::KV_REGISTERS) {
        read_keys(k_left, shared + Shared::K, row16);
        read_keys(v_left, shared + Shared::V, row16);
    }
    position before = start(step0);
    uint32_t ds_left[QT][4] = {};
    #pragma unroll 1
    for (position at = start(step0); at.step < end; advance_to_next(at)) {
        const int stage = at.step % STAGES, parity = at.step / STAGES % 2, i0 = at.m * BLOCK_M;
        const uint32_t q_tile = shared + Shared::Q + stage * Shared::Q_BYTES, do_tile = shared + Shared::DO + stage * Shared::Q_BYTES;
        const bool masked = first_key(a, seq, min(i0 + BLOCK_M, seq.sq) - 1) > j0 || last_key(a, seq, i0) < j0 + BLOCK_N;
        float s[BLOCK_M / 2] = {}, dp[BLOCK_M / 2] = {};
        uint32_t p_left[QT][4], flags[QT][2];

        zero_queries(i0, stage, parity);
        mbarrier_wait(shared + Shared::Q_FULL + 8 * stage, parity);
        wgmma_fence();
        if constexpr (Tile::KV_REGISTERS) product(s, k_left, q_tile);
        else product(s, own_k, q_tile);
        mbarrier_wait(shared + Shared::DO_FULL + 8 * stage, parity);
        wgmma_fence();
        if constexpr (Tile::KV_REGISTERS) product(dp, v_left, do_tile);
        else product(dp, own_v, do_tile);
        if (DROPOUT) dropout_flags(flags, at, key);
        if (DK_BEHIND) {                                /* the last step's dK */
            wgmma_wait<2>();
            wgmma_result(dk);
            keep(ds_left);
            if (at.step > step0) warp_arrive(Shared::Q_FREE + 8 * ((at.step - 1) % STAGES));
        }
        wgmma_wait<1>();
        wgmma_result(s);
        if (Tile::ADDED) add_scores(s, at, row16);
        probabilities(s, p_left, flags, at, key, masked, shared + Shared::LSE2 + stage * BLOCK_M * 4);
        wgmma_fence();
        accumulate(dv, p_left, do_tile);
        wgmma_wait<1>();
        wgmma_result(dp);
        score_gradients(ds_left, dp, s, shared + Shared::DELTA + stage * BLOCK_M * 4);
        mbarrier_wait(shared + Shared::DS_FREE + 8 * (at.step % 2), at.step / 2 % 2 ^ 1);
        store_ds(shared + Shared::DS + at.step % 2 * Shared::DS_BYTES, ds_left, row16);
        fence_proxy_async();
        warp_arrive(Shared::DS_FULL + 8 * (at.step % 2));
        if (at.step > step0 && makes_dq(group, before.step)) {
            float dq[D / 2] = {};
            wgmma_wait<0>();
            wgmma_result(dv);
            keep(p_left);
            warp_arrive(Shared::DO_FREE + 8 * stage);
            mbarrier_wait(shared + Shared::DS_FULL + 8 * (before.step % 2), before.step / 2 % 2);
            wgmma_fence();
            query_product<D>(dq, ds_rows(group, before.step), 0);
            accumulate(dk, ds_left, q_tile);
            wgmma_wait<1>();
            wgmma_result(dq);
            warp_arrive(Shared::DS_FREE + 8 * (before.step % 2));
            add_dq<D>(dq, before, group, products_before(group, before.step), 0);
        } else {
            wgmma_fence();
            accumulate(dk, ds_left, q_tile);
            wgmma_wait<1>();
            wgmma_result(dv);
            warp_arrive(Shared::DO_FREE + 8 * stage);
        }
        if (!DK_BEHIND) {
            wgmma_wait<0>();
            wgmma_result(dk);
            keep(ds_left);
            warp_arrive(Shared::Q_FREE + 8 * stage);
        }
        before = at;
    }
    wgmma_wait<0>();
    wgmma_result(dk);
    keep(ds_left);
    int done = end;
    asm volatile("" : "+r"(done));              /* else "end > step0" is held through the loop: spills */
    if (DK_BEHIND && done > step0) warp_arrive(Shared::Q_FREE + 8 * (before.step % STAGES));
    if (done > step0 && makes_dq(group, before.step)) {
        float dq[D / 2] = {};
        mbarrier_wait(shared + Shared::DS_FULL + 8 * (before.step % 2), before.step / 2 % 2);
        wgmma_fence();
        query_product<D>(dq, ds_rows(group, before.step), 0);
        wgmma_wait<0>();
        wgmma_result(dq);
        warp_arrive(Shared::DS_FREE + 8 * (before.step % 2));
        add_dq<D>(dq, before, group, products_before(group, before.step), 0);
    }
    warp_arrive(Shared::K_FREE);                /* the next key tile may come */
    if constexpr (!TAKES_TICKETS) {             /* the results leave through this warp's rows of V, which its warpgroup alone reads */
        barrier_sync(GROUP + group, 128);
        store<BLOCK_N>(dv, shared + Shared::V + row16 * 128, row16, DROPOUT ? a.kept : 1.0f, a.p.dv, (int)a.p.d_v, a.aligned_dv);
        store<BLOCK_N>(dk, shared + Shared::V + row16 * 128, row16, a.scale, a.p.dk, (int)a.p.d, a.aligned_dk);
        if (Tile::BULK_DQ) bulk_wait_read<0>();
        return;
    }
    /* The results leave through this warp's place for dQ: V's is the next key tile's. */
    const int warp = thread_anew() / 32 - 4, out_group = warp / 4, products = products_before(out_group, done);
    if (!a.p.deterministic) bulk_wait_read<0>();
    else if (products > 0) mbarrier_wait(shared + Shared::DQ_FREE + 8 * out_group, products % 2 ^ 1);
    __syncwarp();
    warp_arrive(Shared::V_FREE);
    const uint32_t place = shared + Shared::DQ + warp * 64 * D;
    store<16>(dv, place, 16 * warp, DROPOUT ? a.kept : 1.0f, a.p.dv, (int)a.p.d_v, a.aligned_dv);
    store<16>(dk, place, 16 * warp, a.scale, a.p.dk, (int)a.p.d, a.aligned_dk);
    say_done();
}

enum walker { PRODUCER, FOLLOWER };

/* This block's key tiles, one by one: work(block, tile's number, steps before it). Of those who walk, the producer takes the tickets.
 * Sections of heads one after the other; in a section key tiles ascend, the longest first if causal, heads innermost. */
template <class Block, enum walker WHO, class Work> FA_DEVICE void walk(const fa_sm90_backward_args &args, uint32_t shared, Work work)
{
    using Shared = typename Block::Shared;
    const fa_cuda_args &a = args.a;
    const int heads = (int)(a.p.b * a.p.hk), tiles = heads * a.n_tiles, per_section = args.section * a.n_tiles;
    const bool tickets = Block::ROLES == 2 || (Block::TAKES_TICKETS && args.tickets);
    int step = 0, parities = 0, at = blockIdx.x;
    if (WHO == PRODUCER && tickets) at = atomicAdd(a.counters + FA_TILE_TICKET, 1);
    #pragma unroll 1
    for (;;) {
        if (WHO == FOLLOWER && tickets) {
            mbarrier_wait(shared + Shared::K_FULL, parities & 1);
            at = load_shared_4(shared + Shared::TICKET);
        }
        if (at >= tiles) break;
        const int next = WHO == PRODUCER && tickets ? atomicAdd(a.counters + FA_TILE_TICKET, 1) : tiles;
        const int first = at / per_section * args.section, in_section = min(args.section, heads - first);
        const int rest = at % per_section, head = first + rest % in_section, n = rest / in_section;
        const bool batch_fastest = Block::ADDED && a.batch_fastest;
        Block block(args, shared, batch_fastest ? head % (int)a.p.b : head / (int)a.p.hk, batch_fastest ? head / (int)a.p.b : head % (int)a.p.hk,
                    a.p.deterministic ? a.n_tiles - 1 - n : n, parities);
        if (block.j0 < block.seq.k_rows) {
            work(block, at, step);
            step += block.steps();
            parities ^= 1;
        }
        if (!tickets) return;
        at = next;
    }
    if (WHO == PRODUCER && tickets) {
        Block::announce(shared, at, parities);
        mbarrier_arrive(shared + Shared::K_FULL);
    }
}

/* A warp makes dq out of the sums, 16 rows at a time, head after head in their order, each when its last key tile is done; AT_ONCE times 16
 * channels are under way. */
template <enum fa_dtype T, int D, int AT_ONCE> FA_DEVICE void make_dq(const fa_cuda_args &a)
{
    #pragma unroll 1
    for (;;) {
        const int lane = thread_anew() & 31, per_head = opaque(((int)a.p.sq + 15) / 16), pieces = (int)(a.p.b * a.p.h) * per_head;
        int piece = 0;
        if (lane == 0) {
            piece = atomicAdd(a.counters + FA_PIECE_TICKET, 1);
            if (piece < pieces) {
                const volatile int *done = a.counters + FA_TICKETS + piece / per_head / a.group;
                while (*done < a.n_tiles) __nanosleep(500);
                __threadfence();
            }
        }
        piece = __shfl_sync(0xffffffff, piece, 0);
        if (piece >= pieces) return;
        const int head = piece / per_head, i = piece % per_head * 16 + lane / 4;
        const float *from = a.dq_accum + ((int64_t)head * a.padded_rows + piece % per_head * 16) * D + lane * 4;
        uint16_t *to = (uint16_t *)a.p.dq.ptr + head / (int)a.p.h * a.p.dq.stride_b + head % (int)a.p.h * a.p.dq.stride_h + i * a.p.dq.stride_s
                     + lane % 2 * 8 + lane % 4 / 2 * 4;
        const bool there[2] = { i < a.p.sq, i + 8 < a.p.sq };
        #pragma unroll 1
        for (int c = 0; c < D / 16; c += AT_ONCE, from += AT_ONCE * 256, to += AT_ONCE * 16) {
            float4 sums[AT_ONCE][2];            /* two blocks of eight channels: dq_layout.cuh */
            #pragma unroll
            for (int n = 0; n < 2 * AT_ONCE; n++) sums[n / 2][n % 2] = load_global_16(from + n * 128);
            #pragma unroll
            for (int n = 0; n < AT_ONCE; n++)
                #pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float4 x = sums[n][0], y = sums[n][1];
                    const uint32_t u = half ? pack<T>(x.z * a.scale, x.w * a.scale) : pack<T>(x.x * a.scale, x.y * a.scale);
                    const uint32_t v = half ? pack<T>(y.z * a.scale, y.w * a.scale) : pack<T>(y.x * a.scale, y.y * a.scale);
                    const uint32_t got = __shfl_xor_sync(0xffffffff, lane & 1 ? u : v, 1);      /* so that a lane has four channels of one */
                    if (there[half])
                        *(uint2 *)(to + n * 16 + 8 * half * a.p.dq.stride_s) = make_uint2(lane & 1 ? got : u, lane & 1 ? v : got);
                }
        }
    }
}

template <enum fa_dtype T, int D, bool MODS, bool DROPOUT, class Tile>
__global__ void __launch_bounds__(128 * (Tile::GROUPS + 1), 1) sm90_backward_kernel(const __grid_constant__ fa_sm90_backward_args args)
{
    extern __shared__ __align__(1024) uint8_t dynamic[];
    using kernel = sm90_backward<T, D, MODS, DROPOUT, Tile>;
    const fa_cuda_args &a = args.a;
    const uint32_t shared = shared_address(dynamic);
    if (shared % 1024) __trap();                /* TMA's swizzle counts from here */
    if (threadIdx.x == 0) kernel::init_barriers(shared, args.tickets);
    __syncthreads();
    wait_for_last_kernel();                     /* prepare.cu's results */
    next_kernel_may_start();
    if (threadIdx.x < 128) {
        fewer_registers<Tile::PRODUCER_REGISTERS>();
        const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
        if (warp == 0) {
            if (elect_one()) walk<kernel, PRODUCER>(args, shared, [](kernel &block, int at, int step) { block.produce(at, step); });
        } else if (kernel::TAKES_TICKETS && args.tickets && warp == 1) {
            int tile = 0;
            if (elect_one()) walk<kernel, FOLLOWER>(args, shared, [&tile](kernel &block, int, int) { block.pass_on(tile++); });
        } else if (kernel::TAKES_TICKETS && a.dq_is_made) {
            make_dq<T, D, Tile::PRODUCER_REGISTERS < 40 ? 1 : 2>(a);
        } else if constexpr (Tile::BULK_DQ) {
            if (warp <= Tile::GROUPS && a.p.deterministic && elect_one())
                walk<kernel, FOLLOWER>(args, shared, [warp](kernel &block, int, int step) { block.add_in_turn(warp - 1, step); });
        }
    } else {
        more_registers<Tile::REGISTERS>();
        walk<kernel, FOLLOWER>(args, shared, [](kernel &block, int, int step) {
            if constexpr (Tile::ROLES == 1) block.consume(step);
            else if (threadIdx.x < 256) block.consume_values(step);
            else block.consume_keys(step);
        });
        if (kernel::TAKES_TICKETS && a.dq_is_made) make_dq<T, D, D / 16 % 4 ? 2 : 4>(a);
    }
}

#endif
