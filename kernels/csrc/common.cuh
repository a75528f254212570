// What every op's launch shares. Each .cu holds one op's device code and its extern "C" launches: raw pointers, sizes,
// the stream; they return a cudaError_t and never synchronise, so they can be captured into a graph.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#define BATON_EXPORT extern "C" __attribute__((visibility("default")))

namespace baton {

constexpr int kVecBytes = 16;  // the widest load one thread can make

// Shared memory that one thread block can have. A library is compiled for one architecture.
constexpr int kSharedKb(int arch) {
  return arch == 800 || arch == 870 ? 163 : arch >= 900 && arch < 1200 ? 227 : 99;
}
constexpr int kSharedBytes = kSharedKb(__CUDA_ARCH_LIST__) << 10;

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace baton
