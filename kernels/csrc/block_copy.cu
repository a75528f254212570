// block_copy: pack scattered KV blocks into one run of bytes, so that one send carries them, and unpack them again.
//   pool [N, vecs] uint4    ids [n] int32, in sequence order    run [n, vecs] uint4
// Bound by memory: n * vecs * 16 bytes read, and as many written. A KV block is cut into chunks of one thread block each:
// a few large blocks (2 MB for an 8B model) keep all multiprocessors busy, and so do many small ones.
#include "common.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kVecsPerThread = 8;  // loads in flight per thread before the first store
constexpr int kChunk = kThreads * kVecsPerThread;

template <bool kGather>
__global__ void __launch_bounds__(kThreads)
copy_blocks(const uint4* __restrict__ from, const int32_t* __restrict__ ids, uint4* __restrict__ to, int64_t vecs,
            int chunks) {
  const int64_t packed = blockIdx.x / chunks;
  const int64_t scattered = ids[packed];  // 64-bit: a pool outgrows int32
  const uint4* source = from + (kGather ? scattered : packed) * vecs;
  uint4* target = to + (kGather ? packed : scattered) * vecs;
  const int64_t first = int64_t(blockIdx.x % chunks) * kChunk + threadIdx.x;
  uint4 held[kVecsPerThread];
#pragma unroll
  for (int i = 0; i < kVecsPerThread; i++) {
    const int64_t at = first + i * kThreads;
    if (at < vecs) held[i] = source[at];
  }
#pragma unroll
  for (int i = 0; i < kVecsPerThread; i++) {
    const int64_t at = first + i * kThreads;
    if (at < vecs) target[at] = held[i];
  }
}

template <bool kGather>
int launch(const void* from, const int32_t* ids, void* to, int n, int64_t vecs, cudaStream_t stream) {
  if (n == 0 || vecs == 0) return cudaSuccess;
  const int64_t chunks = baton::ceil_div<int64_t>(vecs, kChunk);
  if (n < 0 || vecs < 0 || chunks * n > INT32_MAX) return cudaErrorInvalidValue;
  copy_blocks<kGather><<<unsigned(chunks * n), kThreads, 0, stream>>>(
      static_cast<const uint4*>(from), ids, static_cast<uint4*>(to), vecs, int(chunks));
  return cudaGetLastError();
}

}  // namespace

// out[i] = pool[ids[i]]
BATON_EXPORT int gather_blocks(const void* pool, const int32_t* ids, void* out, int n, int64_t vecs,
                               cudaStream_t stream) {
  return launch<true>(pool, ids, out, n, vecs, stream);
}

// pool[ids[i]] = source[i]; ids must not repeat
BATON_EXPORT int scatter_blocks(void* pool, const int32_t* ids, const void* source, int n, int64_t vecs,
                                cudaStream_t stream) {
  return launch<false>(source, ids, pool, n, vecs, stream);
}
