/* cuda/sm90/bias_gradient.cuh: the gradient of attn_bias on Hopper, for biases with an element for each query and key.
 *
 *     dbias = sum of P (dP - delta)  over the sequences and heads that share an element        S = Q K^T    dP = dO V^T
 *
 * A block works off tiles of 128 x 128 elements, 64 queries a consumer warpgroup, and for each the score tiles that share it, in a fixed
 * order: the sum stays in fp32 registers, the same bits every time. One producer thread loads pairs of operands, Q and K or dO and V,
 * into a ring of places; another the tile's bias, whose place then carries the sum out.
 *
 *     issue S, dP | P behind dP | sum += P (dP - delta)        the other warpgroup's products run behind this one's exponentials */
#ifndef FA_SM90_BIAS_GRADIENT_CUH
#define FA_SM90_BIAS_GRADIENT_CUH

#include "../dq_layout.cuh"
#include "../mask.cuh"
#include "../sequence.cuh"
#include "backward_args.h"
#include "ptx.cuh"

template <enum fa_dtype T, int D> struct sm90_bias_gradient {
    enum : int {
        GROUPS = 2, THREADS = 128 * (GROUPS + 1), BLOCK_M = 64 * GROUPS, BLOCK_N = 128, PANELS = D / 64, NT = BLOCK_N / 8, COUNT = BLOCK_N / 2,
        OPERAND_BYTES = 128 * PANELS * 128, PLACE_BYTES = 2 * OPERAND_BYTES, PLACES = D == 64 ? 4 : 3,
        BIAS_BYTES = BLOCK_M * BLOCK_N * 2, BIAS_PLACES = D == 64 ? 2 : 1, BOX_BYTES = 64 * 128,
        BIAS = PLACES * PLACE_BYTES, FULL = BIAS + BIAS_PLACES * BIAS_BYTES, FREE = FULL + 8 * PLACES, BIAS_FULL = FREE + 8 * PLACES,
        BIAS_FREE = BIAS_FULL + 8 * BIAS_PLACES, BYTES = BIAS_FREE + 8 * BIAS_PLACES,
        REGISTERS = 232, PRODUCER_REGISTERS = 40,
    };
    static_assert(BYTES <= 232448, "a block's limit");

    const fa_sm90_backward_args &args;
    const fa_cuda_args &a;
    const uint32_t shared;
    const sequence seq;
    int b, head, m, n;                          /* of the first score tile that shares the tile at hand */

    __device__ __forceinline__ sm90_bias_gradient(const fa_sm90_backward_args &args_, uint32_t shared_)
        : args(args_), a(args_.a), shared(shared_), seq({ 0, 0, (int)a.p.sq, (int)a.p.sk, (int)a.p.sq, (int)a.p.sk }) {}

    __device__ __forceinline__ int m_tiles() const { return (opaque(seq.sq) + BLOCK_M - 1) / BLOCK_M; }     /* not kept: registers */
    __device__ __forceinline__ int n_tiles() const { return (opaque(seq.sk) + BLOCK_N - 1) / BLOCK_N; }
    __device__ __forceinline__ int tiles() const
    {
        return (a.p.dbias.stride_b ? (int)a.p.b : 1) * (a.p.dbias.stride_h ? (int)a.p.h : 1) * m_tiles() * n_tiles();
    }
    __device__ __forceinline__ void go_to(int tile)
    {
        const int rows = tile / n_tiles(), plane = rows / m_tiles(), heads = a.p.dbias.stride_h ? (int)a.p.h : 1;
        n = tile % n_tiles(), m = rows % m_tiles(), head = plane % heads, b = plane / heads;
    }
    /* Its number again, for which no register is kept. */
    __device__ __forceinline__ int tile_at_hand() const
    {
        return ((opaque(b) * (a.p.dbias.stride_h ? (int)a.p.h : 1) + head) * m_tiles() + m) * n_tiles() + n;
    }
    /* Score tiles that share the tile at hand are numbered, heads first; none if no query of it may see a key. */
    __device__ __forceinline__ int heads() const { return a.p.dbias.stride_h ? 1 : (int)a.p.h; }
    __device__ __forceinline__ int visits() const
    {
        const int i0 = m * BLOCK_M, i_end = min(i0 + BLOCK_M, seq.sq) - 1, j0 = n * BLOCK_N;
        const bool seen = first_key(a, seq, i0) < j0 + BLOCK_N && last_key(a, seq, i_end) > j0;
        return seen ? (a.p.dbias.stride_b ? 1 : (int)a.p.b) * heads() : 0;
    }
    /* Whether the mask shows anything of a visit: its tiles have 64 queries. */
    __device__ __forceinline__ bool is_seen(int batch, int h) const
    {
        if (!a.mask.bits) return true;
        const uint32_t *flags = tile_flags(a.mask, a.mask.some, mask_plane(a.mask, batch, h), n);
        return (flag_word(a.mask, flags, 2 * m) >> 2 * m % 32 & 3) != 0;
    }

    /* ---- producers: a thread each ---- */

    __device__ __forceinline__ void load_pair(int at, const fa_tensor_map &rows, const fa_tensor_map &keys, int batch, int h)
    {
        const uint32_t place = shared + at % PLACES * PLACE_BYTES, full = shared + FULL + 8 * (at % PLACES);
        mbarrier_wait(shared + FREE + 8 * (at % PLACES), at / PLACES % 2 ^ 1);
        mbarrier_arrive_expect(full, PLACE_BYTES);
        #pragma unroll
        for (int p = 0; p < PANELS; p++) {
            #pragma unroll
            for (int g = 0; g < GROUPS; g++)
                tma_load(place + (g * PANELS + p) * BOX_BYTES, rows, 64 * p, m * BLOCK_M + 64 * g, h, batch, full, EVICT_LAST);
            tma_load(place + OPERAND_BYTES + p * BLOCK_N * 128, keys, 64 * p, n * BLOCK_N, h / a.group, batch, full, EVICT_LAST);
        }
    }
    __device__ __forceinline__ void produce_operands()
    {
        int at = 0;
        for (int tile = blockIdx.x; tile < tiles(); tile += gridDim.x) {
            go_to(tile);
            #pragma unroll 1
            for (int visit = 0; visit < visits(); visit++) {
                const int batch = b + visit / heads(), h = head + visit % heads();
                if (!is_seen(batch, h)) continue;
                load_pair(at++, args.q, args.k, batch, h);
                load_pair(at++, args.dout, args.v, batch, h);
            }
        }
    }
    __device__ __forceinline__ void produce_bias()
    {
        int at = 0;
        for (int tile = blockIdx.x; tile < tiles(); tile += gridDim.x, at++) {
            go_to(tile);
            const uint32_t place = shared + BIAS + at % BIAS_PLACES * BIAS_BYTES, full = shared + BIAS_FULL + 8 * (at % BIAS_PLACES);
            mbarrier_wait(shared + BIAS_FREE + 8 * (at % BIAS_PLACES), at / BIAS_PLACES % 2 ^ 1);
            mbarrier_arrive_expect(full, BIAS_BYTES);
            #pragma unroll
            for (int box = 0; box < 4; box++)
                tma_load(place + box * BOX_BYTES, args.bias, n * BLOCK_N + box % 2 * 64, m * BLOCK_M + box / 2 * 64, head * args.bias_h,
                         b * args.bias_b, full, EVICT_FIRST);
        }
    }

    /* ---- consumers ---- */

    __device__ __forceinline__ void warp_arrive(int barrier) const
    {
        __syncwarp();
        if ((threadIdx.x & 31) == 0) mbarrier_arrive(shared + barrier);
        __syncwarp();
    }
    /* C (64, BLOCK_N) = this warpgroup's rows, keys^T, of a pair. */
    __device__ __forceinline__ void product(float (&c)[COUNT], int at, int group)
    {
        const uint32_t x = matrix_at(shared + at % PLACES * PLACE_BYTES + group * PANELS * BOX_BYTES);
        const uint32_t y = matrix_at(shared + at % PLACES * PLACE_BYTES + OPERAND_BYTES);
        mbarrier_wait(shared + FULL + 8 * (at % PLACES), at / PLACES % 2);
        wgmma_fence();
        #pragma unroll
        for (int k = 0; k < D / 16; k++)
            wgmma<T, BLOCK_N>::ss(c, descriptor(advance(x, k / 4 * BOX_BYTES + k % 4 * 32)), descriptor(advance(y, k / 4 * BLOCK_N * 128 + k % 4 * 32)), k > 0);
        wgmma_commit();
    }

    /* Of 16 rows x 64 keys in a box: where this lane points ldmatrix and stmatrix, for keys 16 piece.. */
    __device__ __forceinline__ static uint32_t piece_at(uint32_t box, int piece)
    {
        const int thread = thread_anew(), lane = thread & 31;
        return box + ((thread >> 5 & 3) * 16 + (lane & 15)) * 128 + ((piece * 2 + (lane >> 4)) << 4 ^ (lane & 7) << 4);
    }

    /* This lane's first row of the tile, worked out anew: no register for it. */
    __device__ __forceinline__ static int row() { const int thread = thread_anew() - 128; return thread / 32 * 16 + thread % 32 / 4; }

    /* lse2 or delta of this lane's rows. */
    __device__ __forceinline__ void load_rows(float (&x)[2], const float *rows, float beyond, int batch, int h) const
    {
        const int i = m * BLOCK_M + row();
        rows += padded_row(a, seq, batch, h) + i;
        #pragma unroll
        for (int half = 0; half < 2; half++) x[half] = i + 8 * half < seq.sq ? __ldg(rows + 8 * half) : beyond;
    }

    /* S becomes P. bias: this warpgroup's boxes. */
    __device__ __forceinline__ void probabilities(float (&s)[COUNT], const float (&lse2)[2], uint32_t bias, int batch, int h)
    {
        const int lane = thread_anew() & 31, j = n * BLOCK_N + (lane & 3) * 2, group = thread_anew() / 128 - 1, i = m * BLOCK_M + row();
        #pragma unroll
        for (int piece = 0; piece < NT / 2; piece++) {
            uint32_t x[4];
            ldmatrix(x, piece_at(bias + piece / 4 * BOX_BYTES, piece % 4));
            #pragma unroll
            for (int r = 0; r < 4; r++) add_pair<T>(s[8 * piece + 2 * r], s[8 * piece + 2 * r + 1], x[r], a.bias_scale);
        }
        #pragma unroll
        for (int e = 0; e < COUNT; e++) s[e] = exp2_approx(fmaf(s[e], a.lse_scale, -lse2[e / 2 % 2]) * a.lse_exponent);
        const int i0 = m * BLOCK_M, i_end = min(i0 + BLOCK_M, seq.sq) - 1;
        if (n * BLOCK_N < first_key(a, seq, i_end) || (n + 1) * BLOCK_N > last_key(a, seq, i0)) {
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const int first = first_key(a, seq, i + 8 * half) - j, last = last_key(a, seq, i + 8 * half) - j;
                #pragma unroll
                for (int x = 0; x < 2 * NT; x++)
                    if (x / 2 * 8 + x % 2 < first || x / 2 * 8 + x % 2 >= last) s[x / 2 * 4 + 2 * half + x % 2] = 0.0f;
            }
        }
        if (!a.mask.bits || tile_is_whole(a.mask, mask_plane(a.mask, batch, h), n, 2 * m + group)) return;
        #pragma unroll
        for (int half = 0; half < 2; half++)
            #pragma unroll
            for (int w = 0; w < BLOCK_N / 32; w++) {
                const uint32_t word = mask_word(a.mask, mask_plane(a.mask, batch, h), min(i + 8 * half, seq.sq - 1), n * BLOCK_N + w * 32) >> (lane & 3) * 2;
                #pragma unroll
                for (int x = 0; x < 8; x++)
                    if (!(word >> (x / 2 * 8 + x % 2) & 1)) s[(w * 4 + x / 2) * 4 + 2 * half + x % 2] = 0.0f;
            }
    }

    /* The sum, by way of the bias's place, 16 bytes a lane. */
    __device__ __forceinline__ void store(const float (&sum)[COUNT], uint32_t boxes, int group)
    {
        const fa_scores &t = a.p.dbias;
        const int lane = threadIdx.x & 31, row0 = (threadIdx.x >> 5 & 3) * 16, i0 = m * BLOCK_M + group * 64 + row0, j0 = n * BLOCK_N;
        uint16_t *to = (uint16_t *)t.ptr + b * t.stride_b + head * t.stride_h + i0 * t.stride_q + j0;
        #pragma unroll
        for (int piece = 0; piece < NT / 2; piece++) {
            uint32_t x[4];
            #pragma unroll
            for (int r = 0; r < 4; r++) x[r] = pack<T>(sum[8 * piece + 2 * r], sum[8 * piece + 2 * r + 1]);
            stmatrix(piece_at(boxes + piece / 4 * BOX_BYTES, piece % 4), x[0], x[1], x[2], x[3]);
        }
        __syncwarp();
        #pragma unroll
        for (int at = lane; at < 16 * BLOCK_N / 8; at += 32) {
            const int row = at / (BLOCK_N / 8), chunk = at % (BLOCK_N / 8), left = seq.sk - j0 - chunk * 8;
            const uint4 x = load_shared_16(boxes + chunk / 8 * BOX_BYTES + (row0 + row) * 128 + (chunk % 8 << 4 ^ (row & 7) << 4));
            if (i0 + row >= seq.sq || left <= 0) continue;
            uint16_t *dst = to + row * t.stride_q + chunk * 8;
            if (left >= 8) {
                *(uint4 *)dst = x;
            } else {
                const uint32_t words[4] = { x.x, x.y, x.z, x.w };
                #pragma unroll
                for (int e = 0; e < 8; e++)
                    if (e < left) dst[e] = (uint16_t)(words[e / 2] >> 16 * (e % 2));
            }
        }
        fence_proxy_async();
    }

    __device__ __forceinline__ void consume()
    {
        const int group = __shfl_sync(0xffffffff, threadIdx.x / 128 - 1, 0);
        int at = 0;
        #pragma unroll 1
        for (int tile = blockIdx.x; tile < tiles(); tile = tile_at_hand() + gridDim.x) {
            const int bias_at = tile / (int)gridDim.x;
            const uint32_t boxes = shared + BIAS + bias_at % BIAS_PLACES * BIAS_BYTES + group * 2 * BOX_BYTES;
            float sum[COUNT] = {};
            go_to(tile);
            mbarrier_wait(shared + BIAS_FULL + 8 * (bias_at % BIAS_PLACES), bias_at / BIAS_PLACES % 2);
            #pragma unroll 1
            for (int visit = 0; visit < visits(); visit++) {
                const int batch = b + visit / heads(), h = head + visit % heads();
                if (!is_seen(batch, h)) continue;
                float s[COUNT], dp[COUNT], lse2[2], delta[2];
                load_rows(lse2, a.lse2, INFINITY, batch, h);
                product(s, at, group);
                product(dp, at + 1, group);
                wgmma_wait<1>();
                wgmma_result(s);
                warp_arrive(FREE + 8 * (at++ % PLACES));
                probabilities(s, lse2, boxes, batch, h);
                load_rows(delta, a.delta, 0.0f, batch, h);
                wgmma_wait<0>();
                wgmma_result(dp);
                warp_arrive(FREE + 8 * (at++ % PLACES));
                #pragma unroll
                for (int e = 0; e < COUNT; e++) sum[e] = fmaf(s[e], dp[e] - delta[e / 2 % 2], sum[e]);
            }
            store(sum, boxes, group);
            warp_arrive(BIAS_FREE + 8 * (tile_at_hand() / (int)gridDim.x % BIAS_PLACES));
        }
    }

    __device__ __forceinline__ static void init_barriers(uint32_t shared)
    {
        for (int p = 0; p < PLACES; p++) {
            mbarrier_init(shared + FULL + 8 * p, 1);
            mbarrier_init(shared + FREE + 8 * p, 4 * GROUPS);
        }
        for (int p = 0; p < BIAS_PLACES; p++) {
            mbarrier_init(shared + BIAS_FULL + 8 * p, 1);
            mbarrier_init(shared + BIAS_FREE + 8 * p, 4 * GROUPS);
        }
        mbarrier_init_fence();
    }
};

template <enum fa_dtype T, int D>
__global__ void __launch_bounds__(sm90_bias_gradient<T, D>::THREADS, 1) sm90_bias_gradient_kernel(const __grid_constant__ fa_sm90_backward_args args)
{
    extern __shared__ __align__(1024) uint8_t dynamic[];
    using kernel = sm90_bias_gradient<T, D>;
    const uint32_t shared = shared_address(dynamic);
    if (shared % 1024) __trap();                /* TMA's swizzle counts from here */
    if (threadIdx.x == 0) kernel::init_barriers(shared);
    __syncthreads();
    kernel block(args, shared);
    if (threadIdx.x < 128) {
        fewer_registers<kernel::PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) block.produce_operands();
        else if (threadIdx.x == 32) block.produce_bias();
    } else {
        more_registers<kernel::REGISTERS>();
        block.consume();
    }
}

template <enum fa_dtype T, int D> constexpr fa_cuda_kernel sm90_bias_gradient_facts()
{
    using kernel = sm90_bias_gradient<T, D>;
    return { (const void *)sm90_bias_gradient_kernel<T, D>, kernel::THREADS, kernel::BYTES, kernel::BLOCK_M, kernel::BLOCK_N, 1 };
}

/* Defines fa_sm90_bias_gradient_64(dtype), by which backward.c finds it. */
#define FA_SM90_BIAS_GRADIENT(D) \
    extern "C" const struct fa_cuda_kernel *fa_sm90_bias_gradient_##D(enum fa_dtype dtype) \
    { \
        static const struct fa_cuda_kernel kernels[] = { sm90_bias_gradient_facts<FA_FLOAT16, D>(), sm90_bias_gradient_facts<FA_BFLOAT16, D>() }; \
        return &kernels[dtype == FA_BFLOAT16]; \
    }

#endif
