// write_kv: put the new tokens' keys and values into their places in the pool.
//   k, v [T, G, D], tokens `stride` vectors apart    slots [T] int64 = block * P + offset, or -1: written nowhere
//   pool [N, L, 2, G, P, D]
// One thread per 16 bytes of K and the same of V, so the type of an element does not matter.
// Bound by memory: 2 * T * G * D elements read, and as many written.
#include "common.cuh"

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
write_kv_vecs(const uint4* __restrict__ k, const uint4* __restrict__ v, uint4* __restrict__ pool,
              const int64_t* __restrict__ slots, int64_t k_stride, int64_t v_stride, int tokens, int layers, int layer,
              int heads, int block_tokens, int vecs) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int per_token = heads * vecs;
  const int64_t token = index / per_token;
  if (token >= tokens) return;
  const int64_t slot = slots[token];
  if (slot < 0) return;  // a row that only fills a step up
  const int within = int(index % per_token);
  const int head = within / vecs;
  const int vec = within % vecs;
  const int64_t plane = int64_t(heads) * block_tokens * vecs;  // all heads' K, or V, of one block and layer
  uint4* to = pool + ((slot / block_tokens) * layers + layer) * 2 * plane +
              (int64_t(head) * block_tokens + slot % block_tokens) * vecs + vec;
  to[0] = k[token * k_stride + within];
  to[plane] = v[token * v_stride + within];
}

}  // namespace

// Strides and `vecs` (of one head's D elements) count 16-byte vectors.
BATON_EXPORT int write_kv(const void* k, const void* v, void* pool, const int64_t* slots, int64_t k_stride,
                          int64_t v_stride, int tokens, int layers, int layer, int heads, int block_tokens, int vecs,
                          cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  const int64_t grid = baton::ceil_div<int64_t>(int64_t(tokens) * heads * vecs, kThreads);
  if (tokens < 0 || grid <= 0 || grid > INT32_MAX) return cudaErrorInvalidValue;
  write_kv_vecs<<<unsigned(grid), kThreads, 0, stream>>>(
      static_cast<const uint4*>(k), static_cast<const uint4*>(v), static_cast<uint4*>(pool), slots, k_stride, v_stride,
      tokens, layers, layer, heads, block_tokens, vecs);
  return cudaGetLastError();
}
