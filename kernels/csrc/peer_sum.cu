// peer_sum: the sum of two ranks' products, one call of each, and what follows it in a layer: added to the stream and
// normalised (all-reduce in one step, as each pair of ranks on one host can; the norm is Zhang and Sennrich's, 2019).
//   x, stream, out [T, hidden]    weight [hidden]    inbox [2, R, hidden], T <= R    arrived [R], calls [2]: zeros at first
// Each rank writes its x into the other's inbox, over the link between the two GPUs, and then a number into the other's
// `arrived`, row by row: a row's thread block waits for no other's. Two halves of the inbox take turns: the other rank
// writes a half again only after a call for which this one has sent a row, which it does when it has read all before.
// Calls are counted on the device, so that a captured launch counts on. Bound by latency: a write across and back.
// Sums are float32, of rank 0's x first, so both ranks get the same bits.
#include "ptx.cuh"
#include "vectors.cuh"

namespace {

using baton::kPerVec;
using baton::pack;
using baton::unpack;

constexpr int kThreads = 512;
constexpr int kMost = 8;  // 16-byte vectors of a row that one thread holds

struct Problem {
  const void* x;
  void* inbox_there;
  const void* inbox_here;
  uint32_t* arrived_there;
  uint32_t* arrived_here;
  uint32_t* calls;  // calls so far, thread blocks of this one that have ended
  void* stream;     // null: out is the sum alone
  const void* weight;
  void* out;
  int rank, room, vecs;  // R, and vectors of a row
  float eps;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) sum_of_two(const Problem p) {
  __shared__ float of_warps[kThreads / 32];
  const int row = blockIdx.x;
  const uint32_t call = p.calls[0] + 1;
  const int64_t at = int64_t(row) * p.vecs;
  const int64_t half = (int64_t(call % 2) * p.room + row) * p.vecs;
  const uint4* x = static_cast<const uint4*>(p.x) + at;
  uint4 mine[kMost];
#pragma unroll
  for (int i = 0; i < kMost; i++) {
    const int vec = threadIdx.x + i * kThreads;
    if (vec >= p.vecs) break;
    mine[i] = x[vec];
    (static_cast<uint4*>(p.inbox_there) + half)[vec] = mine[i];
  }
  baton::fence_system();
  __syncthreads();
  if (threadIdx.x == 0) {
    baton::signal_system(p.arrived_there + row, call);
    baton::await_system(p.arrived_here + row, call);
  }
  __syncthreads();

  float sums[kMost][kPerVec<T>];
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < kMost; i++) {
    const int vec = threadIdx.x + i * kThreads;
    if (vec >= p.vecs) break;
    float own[kPerVec<T>], other[kPerVec<T>], before[kPerVec<T>] = {};
    unpack<T>(mine[i], own);
    unpack<T>(__ldcg(static_cast<const uint4*>(p.inbox_here) + half + vec), other);
    uint4* stream = static_cast<uint4*>(p.stream) + at + vec;
    if (p.stream != nullptr) unpack<T>(*stream, before);
#pragma unroll
    for (int e = 0; e < kPerVec<T>; e++) {
      const float sum = p.rank == 0 ? own[e] + other[e] : other[e] + own[e];
      sums[i][e] = p.stream != nullptr ? before[e] + sum : sum;
    }
    const uint4 raw = pack<T>(sums[i]);
    unpack<T>(raw, sums[i]);  // as it is stored
    *(p.stream != nullptr ? stream : static_cast<uint4*>(p.out) + at + vec) = raw;
#pragma unroll
    for (int e = 0; e < kPerVec<T>; e++) squares += sums[i][e] * sums[i][e];
  }
  if (p.stream != nullptr) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = squares;
    __syncthreads();
    squares = 0.f;
#pragma unroll
    for (int w = 0; w < kThreads / 32; w++) squares += of_warps[w];
    const float scale = rsqrtf(squares / float(p.vecs * kPerVec<T>) + p.eps);
#pragma unroll
    for (int i = 0; i < kMost; i++) {
      const int vec = threadIdx.x + i * kThreads;
      if (vec >= p.vecs) break;
      float weight[kPerVec<T>];
      unpack<T>(static_cast<const uint4*>(p.weight)[vec], weight);
#pragma unroll
      for (int e = 0; e < kPerVec<T>; e++) sums[i][e] *= scale * weight[e];
      (static_cast<uint4*>(p.out) + at)[vec] = pack<T>(sums[i]);
    }
  }
  // The last to end counts the call: until then all of them read the count before.
  if (threadIdx.x == 0 && atomicAdd(p.calls + 1, 1u) == gridDim.x - 1) {
    p.calls[1] = 0;
    p.calls[0] = call;
  }
}

template <typename T>
int launch(const Problem& p, int tokens, cudaStream_t stream) {
  sum_of_two<T><<<unsigned(tokens), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

// dtype 0: float32, 1: bfloat16. stream and weight null: out becomes the sum.
BATON_EXPORT int peer_sum(const void* x, void* inbox_there, const void* inbox_here, uint32_t* arrived_there,
                          uint32_t* arrived_here, uint32_t* calls, void* residual, const void* weight, void* out,
                          int dtype, int rank, int tokens, int room, int hidden, float eps, cudaStream_t stream) {
  const int per_vec = dtype == 0 ? 4 : 8;
  if (tokens == 0) return cudaSuccess;
  if (tokens < 0 || tokens > room || hidden % per_vec != 0 || hidden / per_vec > kThreads * kMost)
    return cudaErrorInvalidValue;
  const Problem p{x,        inbox_there, inbox_here, arrived_there, arrived_here, calls, residual,
                  weight,   out,         rank,       room,          hidden / per_vec, eps};
  return dtype == 0 ? launch<float>(p, tokens, stream) : launch<__nv_bfloat16>(p, tokens, stream);
}
