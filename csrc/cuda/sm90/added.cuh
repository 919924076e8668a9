/* cuda/sm90/added.cuh: the forward kernel for calls with attn_bias or attn_mask: forward.cuh's roles and pipeline, and
 *
 *     S = bias_scale Q K^T + bias, -inf where the mask hides the key        behind the products of the block before
 *
 * The bias comes by TMA, 64 queries x 64 keys at a time, a thread and a ring of places for each consumer warpgroup; ldmatrix has the
 * layout of the accumulators, so a piece of 16 x 16 takes four registers for a moment. A word of the mask, 32 keys of a row, is read
 * from memory while the tensor cores are busy. Key blocks that the mask hides from the whole tile are passed over: which block is
 * next, and what must be done to it, the producer writes down beside K.
 *
 * Bounds, biases and masks are branches of one step: each is the same for the whole warpgroup. */
#ifndef FA_SM90_ADDED_CUH
#define FA_SM90_ADDED_CUH

#include "../score.cuh"
#include "added_producer.cuh"

/* `barrier`, known only when `read` is. An arrival overtakes loads that are under way: behind wgmma, which has shared memory to itself,
 * an ldmatrix took longer than TMA needed to fill its place anew, which gave wrong rows. Where the data is not used before the
 * arrival, this waits for it. */
FA_DEVICE uint32_t after_reading(uint32_t read, uint32_t barrier)
{
    uint32_t ones;                              /* at most 32 */
    asm volatile("popc.b32 %0, %1;" : "=r"(ones) : "r"(read));
    return barrier + (ones >> 6);
}

template <enum fa_dtype T, int D, class Tile> struct added_consumer : added_shape<D, Tile> {
    using shape = added_shape<D, Tile>;
    using shape::STAGES, shape::GROUPS, shape::BLOCK_M, shape::BLOCK_N, shape::PANELS;
    enum : int { S_COUNT = BLOCK_N / 2, O_COUNT = D / 2, NT = BLOCK_N / 8, PIECES = BLOCK_N / 16, WORDS = BLOCK_N / 32 };
    static_assert(WORDS == 4, "a row's words are one vector");
    static constexpr float LARGEST_SHIFT = 4096.0f;         /* rounded to 2^-13: fp16 has 11 bits */

    const fa_cuda_args &a;
    const uint32_t shared;
    const int group;
    int warp, lane;
    int keys, tiles;                            /* places used so far in K's ring, V is one behind; tiles begun */
    int block;                                  /* the one whose scores are at hand, as load_k writes it */

    float s[S_COUNT];                           /* (64, BLOCK_N) */
    float o[O_COUNT];                           /* (64, D) */
    uint32_t p[PIECES][4];                      /* (64, BLOCK_N), left operands */
    float row_max[2], row_sum[2];               /* rows g and g + 8; the sum is this lane's share */

    __device__ __forceinline__ added_consumer(const fa_cuda_args &args, uint32_t smem)
        : a(args), shared(smem), group(__shfl_sync(0xffffffff, threadIdx.x / 128, 0) - 1), keys(0), tiles(0)
    {
        find_lane();
    }

    /* Anew before a tile is stored: addresses that follow from it are not kept over the loop. */
    __device__ __forceinline__ void find_lane() { lane = thread_anew() % 32, warp = thread_anew() / 32 % 4; }
    __device__ __forceinline__ uint32_t barrier(int n) const { return shared + shape::BARRIERS_AT + 8 * n; }
    __device__ __forceinline__ void release(int n) { if (lane == 0) mbarrier_arrive(barrier(n)); }

    /* The n-th tile of the stream; its place is taken again when n has long been stored. */
    __device__ __forceinline__ added_tile_info info(int n) const
    {
        const uint32_t at = shared + shape::INFO_AT + n % shape::INFOS * sizeof(added_tile_info);
        const uint4 x = load_shared_16(at), y = load_shared_16(at + 16);
        return { (int)x.x, (int)x.y, (int)x.z, (int)x.w, (int)y.x, (int)y.y, (int)y.z, (int)y.w };
    }
    /* Goes on to the next tile, its Q in shared memory; false at the end. */
    __device__ __forceinline__ bool next_tile()
    {
        mbarrier_wait(barrier(shape::Q_FULL + tiles % STAGES), tiles / STAGES & 1);
        return info(tiles++).b >= 0;
    }

    __device__ __forceinline__ void turn() { if (Tile::PING_PONG) barrier_sync(1 + group, 256); }
    __device__ __forceinline__ void pass_turn() { if (Tile::PING_PONG) barrier_arrive(1 + (group + 1) % GROUPS, 256); }
    __device__ __forceinline__ void wait_k()
    {
        mbarrier_wait(barrier(shape::K_FULL + keys % STAGES), keys / STAGES & 1);
        block = load_shared_4(shared + shape::BLOCKS_AT + keys % STAGES * 4);
    }

    /* S = Q K^T of the next key block. */
    __device__ __forceinline__ void issue_scores()
    {
        const uint32_t q = matrix_at(shared + shape::Q_AT + (tiles - 1) % STAGES * shape::Q_BYTES + group * 64 * 128);
        const uint32_t k = matrix_at(shared + shape::K_AT + keys % STAGES * shape::KV_BYTES);
        wgmma_fence();
        #pragma unroll
        for (int kk = 0; kk < D / 16; kk++)
            wgmma<T, BLOCK_N>::ss(s, descriptor(advance(q, kk / 4 * BLOCK_M * 128 + kk % 4 * 32)),
                                  descriptor(advance(k, kk / 4 * BLOCK_N * 128 + kk % 4 * 32)), kk > 0);
        wgmma_commit();
    }
    /* O += P V of the block before; the first of a tile starts O anew. */
    __device__ __forceinline__ void issue_output(bool accumulate)
    {
        const int values = keys - 1;
        const uint32_t v = matrix_at(shared + shape::V_AT + values % STAGES * shape::KV_BYTES, BLOCK_N * 128);
        mbarrier_wait(barrier(shape::V_FULL + values % STAGES), values / STAGES & 1);
        wgmma_fence();
        #pragma unroll
        for (int kk = 0; kk < PIECES; kk++)
            wgmma<T, D, 0, 1>::rs(o, p[kk], descriptor(advance(v, kk * 2048)), accumulate || kk > 0);
        wgmma_commit();
    }
    /* Both. */
    __device__ __forceinline__ void issue(bool accumulate)
    {
        wait_k();
        turn();
        issue_scores();
        issue_output(accumulate);
        pass_turn();
    }

    __device__ __forceinline__ void scores_done()
    {
        wgmma_result(s);
        release(shape::K_EMPTY + keys % STAGES);
        keys++;
    }
    __device__ __forceinline__ void output_done()
    {
        wgmma_wait<0>();
        wgmma_result(o);
        wgmma_result(s);
        release(shape::V_EMPTY + (keys - 2) % STAGES);
    }

    /* This lane's rows' words of the block at hand, if it has any hidden key. */
    __device__ __forceinline__ void load_words(uint32_t (&words)[2][WORDS]) const
    {
        if (!(block & HIDDEN)) return;
        const added_tile_info t = info(tiles - 1);
        const fa_cuda_mask &m = a.mask;
        const int thread = thread_anew() - 128;
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = min(t.i0 + thread / 32 * 16 + half * 8 + thread % 32 / 4, t.sq - 1);
            const uint32_t *row = m.bits + ((int64_t)mask_plane(m, t.b, t.head) * m.rows + (m.rows > 1 ? i : 0)) * m.words;
            if (m.words > 1) {
                asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(words[half][0]), "=r"(words[half][1]), "=r"(words[half][2]),
                             "=r"(words[half][3]) : "l"(row + (block >> FLAG_BITS) * WORDS));
            } else {
                const uint32_t word = __ldg(row);
                #pragma unroll
                for (int w = 0; w < WORDS; w++) words[half][w] = word;
            }
        }
    }

    /* Boxes [first, end) of the bias of key block `at` of the stream: `use` gets their pieces of 16 x 16, then they may go. */
    template <class Use> __device__ __forceinline__ void with_boxes(int at, int first, int end, Use use) const
    {
        const int thread = thread_anew(), lane = thread % 32, group = thread / 128 - 1;      /* no address is kept over the products */
        const uint32_t from = shared + shape::BIAS_AT + (thread / 32 % 4 * 16 + lane % 16) * 128 + (lane / 16 * 16 ^ lane % 8 * 16);
        #pragma unroll
        for (int box = first; box < end; box++) {
            const int boxes = at * shape::BOXES + box, place = group * shape::PLACES + boxes % shape::PLACES;
            uint32_t read = 0;
            mbarrier_wait(barrier(shape::BIAS_FULL + place), boxes / shape::PLACES & 1);
            #pragma unroll
            for (int piece = 0; piece < 4; piece++) {
                uint32_t x[4];
                ldmatrix(x, (from ^ piece * 32) + place * shape::BOX_BYTES);
                read = x[0];                    /* of the last: they come in order */
                use(box * 4 + piece, x);
            }
            __syncwarp();
            if (Tile::BIAS_AHEAD && lane == 0) mbarrier_arrive(after_reading(read, barrier(shape::BIAS_EMPTY + place)));
        }
    }
    /* Without AHEAD boxes go when their scores have been summed: registers for less are not there. */
    __device__ __forceinline__ void free_boxes() const
    {
        if constexpr (!Tile::BIAS_AHEAD) {
            if (!a.p.bias.ptr || lane != 0) return;
            #pragma unroll
            for (int box = 0; box < shape::BOXES; box++) {
                const int place = group * shape::PLACES + ((keys - 1) * shape::BOXES + box) % shape::PLACES;
                mbarrier_arrive(after_reading(__float_as_uint(row_sum[0] + row_sum[1]), barrier(shape::BIAS_EMPTY + place)));
            }
        }
    }
    __device__ __forceinline__ void add_piece(int piece, const uint32_t (&bias)[4])
    {
        #pragma unroll
        for (int r = 0; r < 4; r++) add_pair<T>(s[8 * piece + 2 * r], s[8 * piece + 2 * r + 1], bias[r], a.bias_scale);
    }

    /* -inf where row and column do not see each other. */
    __device__ __forceinline__ void bound()
    {
        const added_tile_info t = info(tiles - 1);
        const sequence seq = { 0, 0, t.sq, t.sk, t.sq, t.sk };
        const int thread = thread_anew() - 128, j0 = (block >> FLAG_BITS) * BLOCK_N + thread % 4 * 2;
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = t.i0 + thread / 32 * 16 + half * 8 + thread % 32 / 4, first = first_key(a, seq, i) - j0, last = last_key(a, seq, i) - j0;
            #pragma unroll
            for (int x = 0; x < 2 * NT; x++)
                if (x / 2 * 8 + x % 2 < first || x / 2 * 8 + x % 2 >= last) s[x / 2 * 4 + 2 * half + x % 2] = -INFINITY;
        }
    }
    /* Bias, bounds and mask of the block at hand. */
    template <int AHEAD> __device__ __forceinline__ void modify(const uint32_t (&words)[2][WORDS], const uint32_t (&ahead)[4 * AHEAD + 1][4])
    {
        if (a.p.bias.ptr) {
            #pragma unroll
            for (int piece = 0; piece < 4 * AHEAD; piece++) add_piece(piece, ahead[piece]);
            with_boxes(keys - 1, AHEAD, shape::BOXES, [&](int piece, const uint32_t (&bias)[4]) { add_piece(piece, bias); });
        }
        if (block & BOUNDED) bound();
        if (!(block & HIDDEN)) return;
        #pragma unroll
        for (int half = 0; half < 2; half++)
            #pragma unroll
            for (int w = 0; w < WORDS; w++) {
                const uint32_t word = words[half][w] >> thread_anew() % 4 * 2;
                #pragma unroll
                for (int x = 0; x < 8; x++)
                    if (!(word >> (x / 2 * 8 + x % 2) & 1)) s[(w * 4 + x / 2) * 4 + 2 * half + x % 2] = -INFINITY;
            }
    }

    /* S becomes P in fp32; sums follow. O is to be multiplied by alpha where this says so: a maximum that grew by less than 2^LAG is left
     * as it is. Of huge scores the maximum is taken off before they are scaled. */
    __device__ __forceinline__ bool softmax(float (&alpha)[2])
    {
        const float c = a.exponent_scale, LAG = 8.0f;
        float top[2], shift[2], sum[2] = { 0.0f, 0.0f };
        bool moved = false;
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            float x = row_max[half], y = s[2 * half + 1];
            #pragma unroll
            for (int n = 0; n < NT; n++) {
                x = fmaxf(x, s[4 * n + 2 * half]);
                if (n) y = fmaxf(y, s[4 * n + 2 * half + 1]);
            }
            top[half] = quad_max(fmaxf(x, y));
            moved |= (top[half] - row_max[half]) * c > LAG;
        }
        moved = __any_sync(0xffffffff, moved);
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            alpha[half] = row_max[half];
            row_max[half] = moved ? top[half] : row_max[half];
            shift[half] = row_max[half] == -INFINITY ? 0.0f : row_max[half] * c;        /* no visible key yet: P = 0 */
            if (fabsf(shift[half]) > LARGEST_SHIFT) {
                #pragma unroll
                for (int x = 0; x < 2 * NT; x++) s[x / 2 * 4 + 2 * half + x % 2] -= row_max[half];
                shift[half] = 0.0f;
            }
        }
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            float odd = 0.0f;
            #pragma unroll
            for (int n = 0; n < NT; n++) {
                float &x = s[4 * n + 2 * half], &y = s[4 * n + 2 * half + 1];
                x = exp2_approx(fmaf(x, c, -shift[half]));
                y = exp2_approx(fmaf(y, c, -shift[half]));
                sum[half] += x;
                odd += y;
            }
            sum[half] += odd;
        }
        /* The condition waits for the sums, as there. */
        if (moved & !(sum[0] + sum[1] < 0.0f)) {
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                alpha[half] = row_max[half] == -INFINITY ? 0.0f : exp2_approx((alpha[half] - row_max[half]) * c);
                row_sum[half] *= alpha[half];
            }
        }
        row_sum[0] += sum[0];
        row_sum[1] += sum[1];
        return moved;
    }

    __device__ __forceinline__ void pack_p()
    {
        #pragma unroll
        for (int k = 0; k < PIECES; k++)
            #pragma unroll
            for (int r = 0; r < 4; r++) p[k][r] = pack<T>(s[8 * k + 2 * r], s[8 * k + 2 * r + 1]);
    }

    /* O of a finished tile, normalised, by way of this warp's rows of its Q, and lse. */
    __device__ __forceinline__ void store(int n, const float (&top)[2], const float (&share)[2])
    {
        const added_tile_info t = info(n);
        const fa_params &call = a.p;
        const int first = t.i0 + group * 64 + warp * 16, left = t.sq - first;
        const uint32_t own = shared + shape::Q_AT + n % STAGES * shape::Q_BYTES + (group * 64 + warp * 16) * 128;
        float *lse = (float *)call.lse.ptr + t.b * call.lse.stride_b + t.head * call.lse.stride_h;
        uint16_t *out = (uint16_t *)call.out.ptr + t.b * call.out.stride_b + (int64_t)first * call.out.stride_s + t.head * call.out.stride_h;
        float factor[2];
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const float sum = quad_sum(share[half]);
            const bool empty = top[half] == -INFINITY && sum == 0.0f;
            const int row = half * 8 + lane / 4;
            factor[half] = empty ? 0.0f : 1.0f / sum;
            if (row < left && lane % 4 == 0)
                lse[(int64_t)(first + row) * call.lse.stride_s] =
                    empty ? -INFINITY : top[half] * (0.69314718f * a.exponent_scale) + 0.69314718f * log2_approx(sum);
        }
        #pragma unroll
        for (int panel = 0; panel < PANELS; panel++) {
            const uint32_t piece = own + panel * BLOCK_M * 128;
            #pragma unroll
            for (int j = panel * 4; j < panel * 4 + 4; j++) {
                uint32_t x[4];
                #pragma unroll
                for (int r = 0; r < 4; r++) x[r] = pack<T>(o[8 * j + 2 * r] * factor[r % 2], o[8 * j + 2 * r + 1] * factor[r % 2]);
                stmatrix(piece + lane % 16 * 128 + ((2 * j + lane / 16) % 8 * 16 ^ lane % 8 * 16), x[0], x[1], x[2], x[3]);
            }
            __syncwarp();
            #pragma unroll
            for (int at = lane; at < 16 * 8; at += 32) {
                const int row = at / 8, chunk = at % 8;
                const uint4 x = load_shared_16(piece + row * 128 + (chunk * 16 ^ row % 8 * 16));
                if (row < left) store_chunk(out + row * call.out.stride_s + panel * 64 + chunk * 8, x, (int)call.d_v - panel * 64 - chunk * 8);
            }
        }
        fence_proxy_async();
        __syncwarp();
        release(shape::Q_EMPTY + n % STAGES);
    }
    __device__ __forceinline__ void store_chunk(uint16_t *to, uint4 x, int left) const
    {
        if (a.aligned_out && left >= 8) {
            *(uint4 *)to = x;
        } else {
            const uint32_t words[4] = { x.x, x.y, x.z, x.w };
            #pragma unroll
            for (int e = 0; e < 8; e++)
                if (e < left) to[e] = (uint16_t)(words[e / 2] >> 16 * (e % 2));
        }
    }

    /* The next block of the tile at hand: its scores beside the products of the block before, whose P is in registers. */
    __device__ __forceinline__ void step(bool accumulate)
    {
        uint32_t words[2][WORDS], ahead[4 * Tile::BIAS_AHEAD + 1][4];
        float alpha[2];
        issue(accumulate);
        load_words(words);
        if (Tile::BIAS_AHEAD && a.p.bias.ptr)
            with_boxes(keys, 0, Tile::BIAS_AHEAD, [&](int piece, const uint32_t (&bias)[4]) {
                #pragma unroll
                for (int r = 0; r < 4; r++) ahead[piece][r] = bias[r];
            });
        wgmma_wait<1>();
        scores_done();
        modify<Tile::BIAS_AHEAD>(words, ahead);
        const bool moved = softmax(alpha);
        free_boxes();
        output_done();
        if (moved) {
            #pragma unroll
            for (int j = 0; j < O_COUNT; j++) o[j] *= alpha[j / 2 % 2];
        }
        pack_p();
    }

    /* Softmax of a tile's first block. */
    __device__ __forceinline__ void begin_rows()
    {
        const uint32_t none[1][4] = {};
        uint32_t words[2][WORDS];
        float unused[2];
        row_max[0] = row_max[1] = -INFINITY;
        row_sum[0] = row_sum[1] = 0.0f;
        load_words(words);
        modify<0>(words, none);
        softmax(unused);
        free_boxes();
    }

    /* From the last block of a tile to the first of the next; false where that was the last tile. */
    __device__ __forceinline__ bool next(bool accumulate)
    {
        const float top[2] = { row_max[0], row_max[1] }, share[2] = { row_sum[0], row_sum[1] };
        if (!next_tile()) {
            turn();
            issue_output(accumulate);
            pass_turn();
            wgmma_wait<0>();
            wgmma_result(o);
            find_lane();
            store(tiles - 2, top, share);
            return false;
        }
        issue(accumulate);
        wgmma_wait<1>();
        scores_done();
        begin_rows();
        output_done();
        pack_p();
        find_lane();
        store(tiles - 2, top, share);
        return true;
    }

    __device__ __forceinline__ void run()
    {
        if (Tile::PING_PONG && group == GROUPS - 1) barrier_arrive(1, 256);
        if (!next_tile()) return;
        wait_k();
        issue_scores();
        wgmma_wait<0>();
        scores_done();
        begin_rows();
        pack_p();
        bool more;
        do {
            bool accumulate = false;
            while (block & MORE) step(accumulate), accumulate = true;
            more = next(accumulate);
        } while (more);
    }
};

template <enum fa_dtype T, int D, class Tile>
__global__ void __launch_bounds__(128 * (Tile::GROUPS + 1), 1) added_kernel(const __grid_constant__ fa_sm90_added_args g)
{
    extern __shared__ __align__(1024) uint8_t dynamic[];
    using shape = added_shape<D, Tile>;
    const uint32_t shared = shared_address(dynamic);
    if (shared % 1024) __trap();                /* TMA's swizzle counts from here */
    if (threadIdx.x == 0) shape::init_barriers(shared);
    __syncthreads();
    if (threadIdx.x < 128) {
        fewer_registers<shape::PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            tma_prefetch(g.f.q);
            tma_prefetch(g.f.k);
            tma_prefetch(g.f.v);
            added_producer<D, Tile> producer(g.f, shared);
            producer.run();
        } else if (g.f.a.p.bias.ptr && threadIdx.x % 32 == 0 && threadIdx.x / 32 <= Tile::GROUPS) {
            load_bias<D, Tile>(g, shared, threadIdx.x / 32 - 1);
        }
    } else {
        more_registers<shape::CONSUMER_REGISTERS>();
        added_consumer<T, D, Tile> consumer(g.f.a, shared);
        consumer.run();
    }
}

#endif
