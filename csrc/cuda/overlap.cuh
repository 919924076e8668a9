/* cuda/overlap.cuh: kernels that start while the one before them ends, where the launch allows it (launch.c); else these do nothing. */
#ifndef FA_OVERLAP_CUH
#define FA_OVERLAP_CUH

#include "ptx.cuh"

/* Once all blocks have said so or ended, the next kernel's may start. */
FA_DEVICE void next_kernel_may_start()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Until the kernel before has ended; what it wrote is seen. */
FA_DEVICE void wait_for_last_kernel()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif
