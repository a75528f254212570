// A launch that may overlap the kernel before it on the stream ("programmatic dependent launch", CUDA C++ Programming
// Guide, 4.5; from sm_90 on, elsewhere a plain launch). Captured into a graph it stays so.
//
// A kernel launched so begins once every thread block of the one before has called `let_next_begin`, or is over. Until it
// has called `await_earlier` it may read only what no kernel before it on the stream still writes: weights, or what was
// there before one that never calls `let_next_begin`, which nothing after it overlaps. It must write nothing.
// What earlier kernels write is no `const __restrict__` parameter: such loads may be moved before the wait.
// Every thread that touches anything else calls `await_earlier` first; each thread block's call makes all that was
// launched before its own kernel be over for those after it as well.
#pragma once

#include <cuda_runtime.h>

namespace baton {

__device__ __forceinline__ void await_earlier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// To be called early: what the next kernel needs of this one it waits for by itself.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = __CUDA_ARCH_LIST__ >= 900;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace baton
