/* cuda/sm90/forward_dropout.cuh: the dropout mask of the forward kernel, drawn by warps beside the producer.
 *
 * Warps 1 to 3 of the producer's warpgroup draw what consumers will drop of a block of scores, in the order of the stream, up to
 * FLAG_STAGES blocks ahead: the draw, as long as a softmax, leaves the path between a warpgroup's products. A consumer thread gets a
 * bit an element, in FLAG_WORDS words: bit 7 - n % 8 of byte e of word n / 8 is element e of the n-th word of flags, n = 2 piece + parity
 * of the column, as dropped_pair() wants them after a shift by n % 8. */
#ifndef FA_SM90_FORWARD_DROPOUT_CUH
#define FA_SM90_FORWARD_DROPOUT_CUH

#include "../score.cuh"
#include "forward_producer.cuh"

template <int D, class Tile> struct forward_dropout : forward_shape<D, Tile> {
    using shape = forward_shape<D, Tile>;
    using shape::BLOCK_N, shape::GROUPS, shape::FLAG_STAGES, shape::FLAG_WORDS;
    enum : int { WARPS = 4 * GROUPS, DRAWERS = 3, PIECES = BLOCK_N / 16 };
    static_assert(shape::DRAWN == 0 || !shape::BY_TMA, "the thread that stores is in one of these warps");
    static_assert(shape::DRAWN % 2 == 0 && shape::DRAWN <= PIECES, "pieces are drawn in pairs");

    const fa_cuda_args &a;
    const uint32_t shared;

    __device__ __forceinline__ uint32_t barrier(int n) const { return shared + shape::BARRIERS_AT + 8 * n; }

    /* The flags of two pieces, one call a lane: lanes g and g ^ 1 need the same two calls, make one each and swap halves. */
    __device__ __forceinline__ void draw_pair(uint32_t (&pairs)[2], uint64_t seed, uint64_t offset, uint32_t batch_head, uint32_t piece_i,
                                              uint32_t piece_j, int lane) const
    {
        const int g = lane >> 2, t = lane & 3, odd = g & 1;
        const fa_philox mine = fa_philox_call(seed, fa_dropout_counter(offset, batch_head, piece_i, piece_j + odd, 4 * (g >> 1) + t));
        uint32_t flags[4];
        #pragma unroll
        for (int x = 0; x < 4; x++) flags[x] = dropped_flags(mine.word[x], a.keep256) & 0x80808080u;
        const uint32_t even_row = flags[0] | flags[1] >> 1, odd_row = flags[2] | flags[3] >> 1;
        const uint32_t got = __shfl_xor_sync(0xffffffff, odd ? even_row : odd_row, 4);
        pairs[0] = odd ? got : even_row;
        pairs[1] = odd ? odd_row : got;
    }

    __device__ __forceinline__ void run() const
    {
        const int lane = threadIdx.x % 32;
        uint64_t seed = a.p.rng[0];
        const uint64_t offset = a.p.rng[1];
        int warp = threadIdx.x / 32 - 1, place = 0;                         /* the consumer warp to draw for; blocks done */
        for (int n = 0; ; n++) {
            mbarrier_wait(barrier(shape::INFO_FULL + n % shape::INFOS), n / shape::INFOS & 1);
            const uint32_t at = shared + shape::INFO_AT + n % shape::INFOS * sizeof(forward_tile_info);
            const uint4 x = load_shared_16(at), y = load_shared_16(at + 16);
            if ((int)x.x < 0) return;
            const uint32_t batch_head = x.x * (int)a.p.h + x.y, row = x.z / 16;
            #pragma unroll 1
            for (int block = (int)y.w - 1; block >= (int)y.z; block--, place++) {
                mbarrier_wait(barrier(shape::FLAGS_EMPTY + place % FLAG_STAGES), (place / FLAG_STAGES & 1) ^ 1);
                const uint32_t to = shared + shape::FLAGS_AT + place % FLAG_STAGES * shape::FLAGS_BYTES;
                #pragma unroll 1
                for (; warp < WARPS; warp += DRAWERS) {
                    uint32_t words[FLAG_WORDS] = {};
                    asm volatile("" : "+l"(seed));      /* else the keys of all rounds lie in registers, and some beside them */
                    #pragma unroll
                    for (int piece = 0; piece < shape::DRAWN; piece += 2) {
                        uint32_t pairs[2];
                        draw_pair(pairs, seed, offset, batch_head, row + warp, block * PIECES + piece, lane);
                        words[piece / 4] |= pairs[0] >> 2 * piece % 8 | pairs[1] >> 2 * (piece + 1) % 8;
                    }
                    #pragma unroll
                    for (int w = 0; w < FLAG_WORDS; w++) store_shared_4(to + (w * 32 * WARPS + warp * 32 + lane) * 4, words[w]);
                }
                warp -= WARPS;
                __syncwarp();
                if (lane == 0) mbarrier_arrive(barrier(shape::FLAGS_FULL + place % FLAG_STAGES));
            }
        }
    }
};

#endif
