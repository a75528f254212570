// add_rms_norm: what a layer gives is added to the stream, and the sum is normed for the next, in one pass.
//   stream [R, D], changed in place    delta [R, D], or none: the stream stays    weight [D]    normed [R, D]
//   stream += delta, rounded to its type;  normed = stream / rms(stream) * weight, in float32 and rounded once
//
// One thread block per row, which stays in registers between its sum of squares and its end. Bound by memory: a row of
// stream and delta is read once, stream and normed are written once, and the weight comes from the L2 cache.
//
// Few rows are bound by latency instead: of the loads, which are all under way before one is used (the weight's too), and
// of one barrier. More thread blocks for a row would not help: the loads of a row of 4096 bfloat16, 24 KB with delta
// and weight, take one multiprocessor some 400 cycles at 64 bytes each; two would save half of that and pay as much for
// an exchange of their sums. At many rows the memory wants 34 KB under way to each multiprocessor: as many thread blocks
// as registers allow keep 64 KB (2048 bfloat16) to 128 KB.
#include "launch.cuh"
#include "vectors.cuh"

namespace {

using baton::kPerVec;
using baton::pack;
using baton::unpack;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxSize = 16384;  // elements of a row, which a thread block holds in registers

template <typename T>
constexpr int kMaxVecs = kMaxSize / kPerVec<T> / kThreads;  // in one thread

// Of all threads, in an order that never changes.
__device__ __forceinline__ float sum_of_block(float x) {
  __shared__ float sums[kWarps];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int warp = 0; warp < kWarps; warp++) total += sums[warp];
  return total;
}

// A thread has vectors threadIdx.x + i * kThreads of its block's row. share: 1 / D.
template <typename T, int kVecs>
__global__ void __launch_bounds__(kThreads)
add_and_norm(const uint4* delta, uint4* stream, const uint4* weight, uint4* normed, int vecs, float share, float eps) {
  constexpr int kPer = kPerVec<T>;
  const int64_t row = int64_t(blockIdx.x) * vecs;
  uint4 x[kVecs], w[kVecs];
  baton::let_next_begin();
#pragma unroll
  for (int i = 0; i < kVecs; i++) {
    const int at = threadIdx.x + i * kThreads;
    w[i] = at < vecs ? weight[at] : uint4{};
  }
  baton::await_earlier();
#pragma unroll
  for (int i = 0; i < kVecs; i++) {
    const int at = threadIdx.x + i * kThreads;
    x[i] = at < vecs ? stream[row + at] : uint4{};
  }
  if (delta != nullptr) {
    uint4 more[kVecs];
#pragma unroll
    for (int i = 0; i < kVecs; i++) {
      const int at = threadIdx.x + i * kThreads;
      more[i] = at < vecs ? delta[row + at] : uint4{};
    }
#pragma unroll
    for (int i = 0; i < kVecs; i++) {
      const int at = threadIdx.x + i * kThreads;
      float sum[kPer], added[kPer];
      unpack<T>(x[i], sum);
      unpack<T>(more[i], added);
#pragma unroll
      for (int e = 0; e < kPer; e++) sum[e] += added[e];
      x[i] = pack<T>(sum);
      if (at < vecs) stream[row + at] = x[i];
    }
  }
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < kVecs; i++) {
    float values[kPer];
    unpack<T>(x[i], values);
#pragma unroll
    for (int e = 0; e < kPer; e++) squares += values[e] * values[e];
  }
  const float scale = rsqrtf(sum_of_block(squares) * share + eps);
#pragma unroll
  for (int i = 0; i < kVecs; i++) {
    const int at = threadIdx.x + i * kThreads;
    float values[kPer], weights[kPer];
    unpack<T>(x[i], values);
    unpack<T>(w[i], weights);
#pragma unroll
    for (int e = 0; e < kPer; e++) values[e] *= scale * weights[e];
    if (at < vecs) normed[row + at] = pack<T>(values);
  }
}

template <typename T, int kVecs = 1>
int launch(const void* delta, void* stream, const void* weight, void* normed, int rows, int vecs, float eps,
           cudaStream_t queue) {
  if constexpr (kVecs < kMaxVecs<T>) {
    if (vecs > kVecs * kThreads) return launch<T, kVecs * 2>(delta, stream, weight, normed, rows, vecs, eps, queue);
  }
  if (vecs > kVecs * kThreads) return cudaErrorInvalidValue;
  return baton::launch(add_and_norm<T, kVecs>, dim3(rows), kThreads, 0, queue, static_cast<const uint4*>(delta),
                       static_cast<uint4*>(stream), static_cast<const uint4*>(weight), static_cast<uint4*>(normed),
                       vecs, 1.f / float(vecs * kPerVec<T>), eps);
}

}  // namespace

// Rows lie one after another, `vecs` vectors of 16 bytes each. dtype: 0 float32, 1 bfloat16. delta may be null.
BATON_EXPORT int add_rms_norm(const void* delta, void* stream, const void* weight, void* normed, int dtype, int rows,
                              int vecs, float eps, cudaStream_t queue) {
  if (rows == 0) return cudaSuccess;
  if (rows < 0 || vecs <= 0) return cudaErrorInvalidValue;
  switch (dtype) {
    case 0: return launch<float>(delta, stream, weight, normed, rows, vecs, eps, queue);
    case 1: return launch<__nv_bfloat16>(delta, stream, weight, normed, rows, vecs, eps, queue);
    default: return cudaErrorInvalidValue;
  }
}
