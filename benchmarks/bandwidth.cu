// What the memory of this GPU can do, for benchmarks/kernels.py to compare with: reads alone, reads and writes.
#include <cstdint>
#include <cuda_runtime.h>

namespace {

constexpr int kThreads = 512;
constexpr int kUnroll = 8;

__global__ void __launch_bounds__(kThreads) read_all(const uint4* __restrict__ from, uint32_t* out, int64_t vecs) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  uint32_t folded = 0;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < vecs; i += step * kUnroll) {
    uint4 held[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) held[u] = i + u * step < vecs ? from[i + u * step] : uint4{0, 0, 0, 0};
#pragma unroll
    for (int u = 0; u < kUnroll; u++) folded ^= held[u].x ^ held[u].y ^ held[u].z ^ held[u].w;
  }
  if (folded == 0x9e3779b9u) *out = folded;  // so that the loads are not dropped
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int read_memory(const void* from, void* out, int64_t vecs, int blocks,
                                                                  cudaStream_t stream) {
  read_all<<<blocks, kThreads, 0, stream>>>(static_cast<const uint4*>(from), static_cast<uint32_t*>(out), vecs);
  return cudaGetLastError();
}

extern "C" __attribute__((visibility("default"))) int copy_memory(const void* from, void* to, int64_t bytes,
                                                                  cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}
