/* cuda/sm90/ptx.cuh: what Hopper adds to ../ptx.cuh, one instruction each: mbarriers, TMA, wgmma's fences, register budgets.
 *
 * Addresses of shared memory are 32 bits, of this block. The layout everywhere: a matrix [rows][columns] of 16-bit elements lies
 * as panels of 64 columns, panel p at base + p * rows * 128; in a panel, byte r * 128 + ((c % 64) * 2 ^ (r & 7) << 4), which is
 * what TMA writes with its 128-byte swizzle. Bases are multiples of 1024, rows of 8. */
#ifndef FA_SM90_PTX_CUH
#define FA_SM90_PTX_CUH

#include "../ptx.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"

/* ------------------------------------------------------------------------------------------------ mbarriers */

FA_DEVICE void mbarrier_init(uint32_t barrier, int count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(count) : "memory");
}
/* After the inits, by the thread that made them; then __syncthreads. */
FA_DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

FA_DEVICE void mbarrier_arrive(uint32_t barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}
/* Arrives, and the phase ends no earlier than `bytes` have come; what TMA fills with zeros counts. */
FA_DEVICE void mbarrier_arrive_expect(uint32_t barrier, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}
/* `bytes` more, without arriving. */
FA_DEVICE void mbarrier_expect(uint32_t barrier, int bytes)
{
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}
/* Until the phase of this parity is over. On a fresh barrier parity 1 passes at once. */
FA_DEVICE void mbarrier_wait(uint32_t barrier, int parity)
{
    asm volatile("{ .reg .pred p; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra AGAIN; }"
                 :: "r"(barrier), "r"(parity) : "memory");
}

/* ------------------------------------------------------------------------------------------------------ TMA */

enum : uint64_t { EVICT_NORMAL = 0x1000000000000000, EVICT_FIRST = 0x12F0000000000000, EVICT_LAST = 0x14F0000000000000 };

FA_DEVICE void tma_prefetch(const fa_tensor_map &map)
{
    asm volatile("prefetch.tensormap [%0];" :: "l"(&map) : "memory");
}
/* A box at channel c, row s, head h, batch b; elements outside the tensor become 0. One thread. */
FA_DEVICE void tma_load(uint32_t dst, const fa_tensor_map &map, int c, int s, int h, int b, uint32_t barrier, uint64_t policy)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;"
                 :: "r"(dst), "l"(&map), "r"(c), "r"(s), "r"(h), "r"(b), "r"(barrier), "l"(policy) : "memory");
}
/* The same box into L2 only. */
FA_DEVICE void tma_prefetch_box(const fa_tensor_map &map, int c, int s, int h, int b)
{
    asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];"
                 :: "l"(&map), "r"(c), "r"(s), "r"(h), "r"(b) : "memory");
}
/* Back; elements outside the tensor are not written. Belongs to this thread's bulk group. */
FA_DEVICE void tma_store(uint32_t src, const fa_tensor_map &map, int c, int s, int h, int b)
{
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];"
                 :: "l"(&map), "r"(c), "r"(s), "r"(h), "r"(b), "r"(src) : "memory");
}
/* Flat copies and sums; `bytes` and both addresses are multiples of 16. */
FA_DEVICE void bulk_load(uint32_t dst, const void *src, int bytes, uint32_t barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(dst), "l"(src), "r"(bytes), "r"(barrier) : "memory");
}
FA_DEVICE void bulk_add(float *dst, uint32_t src, int bytes)
{
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
                 :: "l"(dst), "r"(src), "r"(bytes) : "memory");
}
FA_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/* Until at most `PENDING` of this thread's newest groups have not yet read their source, or not yet finished. */
template <int PENDING> FA_DEVICE void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(PENDING) : "memory"); }
template <int PENDING> FA_DEVICE void bulk_wait() { asm volatile("cp.async.bulk.wait_group %0;" :: "n"(PENDING) : "memory"); }

/* After ordinary writes to shared memory, by each writer, before the barrier that hands them to wgmma or TMA. */
FA_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
FA_DEVICE void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

/* ------------------------------------------------------------------------------------------- warps of a block */

/* Hardware barrier `id` of 1..15 (0 is __syncthreads'), for `threads` that sync or arrive. */
FA_DEVICE void barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory"); }
FA_DEVICE void barrier_sync_if(bool so, int id, int threads)      /* no branch, which wgmma under way would not stand */
{
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %0, 0; @p bar.sync %1, %2; }" :: "r"((int)so), "r"(id), "r"(threads) : "memory");
}
FA_DEVICE void barrier_arrive_if(bool so, int id, int threads)
{
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %0, 0; @p bar.arrive %1, %2; }" :: "r"((int)so), "r"(id), "r"(threads) : "memory");
}
FA_DEVICE void barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory"); }

/* Registers a thread from here on: all warps of the warpgroup. Needs __launch_bounds__(threads, 1). */
template <int REGISTERS> FA_DEVICE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(REGISTERS)); }
template <int REGISTERS> FA_DEVICE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(REGISTERS)); }

/* Of a whole warp, one thread, the same every time. */
FA_DEVICE bool elect_one()
{
    uint32_t elected;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(elected) :: "memory");
    return elected;
}

/* 16 aligned bytes. As a plain store of a uint4 the compiler may make four of it. */
FA_DEVICE void store_global_16(void *dst, uint4 x)
{
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" :: "l"(dst), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

/* 16 aligned bytes that another multiprocessor has written while this kernel runs. */
FA_DEVICE float4 load_global_16(const float *src)
{
    float4 x;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(src) : "memory");
    return x;
}

/* Four 8x8 matrices of 16-bit elements, ldmatrix's way back. */
FA_DEVICE void stmatrix(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(address), "r"(r0), "r"(r1), "r"(r2), "r"(r3) : "memory");
}
FA_DEVICE void stmatrix_trans(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(address), "r"(r0), "r"(r1), "r"(r2), "r"(r3) : "memory");
}

/* ---------------------------------------------------------------------------------------------------- wgmma */

/* Before the first product, and wherever ordinary code wrote its registers. */
FA_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FA_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/* Until at most `PENDING` committed groups are under way. */
template <int PENDING> FA_DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory"); }
/* After a wait: no read of these registers moves above it. */
template <int COUNT> FA_DEVICE void wgmma_result(float (&d)[COUNT])
{
    #pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i]) :: "memory");
}

/* The low half of a descriptor of a matrix at `address`; further bytes into it: advance(). With the contraction along columns
 * (K-major) a step of 16 columns is 32 bytes, four are a panel; along rows (MN-major) a step of 16 rows is 2048 bytes and
 * `panel_bytes` = rows * 128 leads from 64 columns to the next. */
FA_DEVICE uint32_t matrix_at(uint32_t address, uint32_t panel_bytes = 16)
{
    return (address & 0x3ffff) >> 4 | panel_bytes >> 4 << 16;
}
FA_DEVICE uint32_t advance(uint32_t matrix, uint32_t bytes) { return matrix + (bytes >> 4); }

/* Swizzle 128 bytes, 1024 bytes from eight rows to the next. */
FA_DEVICE uint64_t descriptor(uint32_t matrix) { return (uint64_t)0x40000040 << 32 | matrix; }

#endif
