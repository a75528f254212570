// peer_sum: the sum of two ranks' products, one call of each, and what follows it in a layer: added to the stream and
// normalised (all-reduce in one step, as each pair of ranks on one host can; the norm is Zhang and Sennrich's, 2019).
//   x, stream, out [T, hidden]    weight [hidden]    calls [2]: zeros at first
//   few [2, T', 2 * hidden] or inbox [2, T', hidden], T' >= T, zeros at first    arrived [T'], zeros at first
// Each rank writes its x into the other's memory, over the link between the two GPUs, a row by a thread block, which
// waits for that row's block of the other rank alone. Bound by latency:
//   few rows   each word travels with the call's number beside it (NCCL's "LL" protocol): twice the bytes, but whoever
//              reads them sees by themselves that they have come. One way across the link, and nothing waits for an answer.
//   more rows  first the row, then, once all of it has arrived, the call's number into `arrived`: a way more.
// Two halves of the memory take turns: the other rank writes a half again only after a call for which this one has sent
// a row, which it does when it has read all before. Calls are counted on the device, so that a captured launch counts on.
// A number comes again after 2^32 calls, two days of decoding: it would be taken for that of a row which was last used then,
// to the call.
// Sums are float32, of rank 0's x first, so both ranks get the same bits.
#include "launch.cuh"
#include "peer.cuh"
#include "vectors.cuh"

namespace {

using baton::kPerVec;
using baton::pack;
using baton::unpack;

constexpr int kThreads = 512;
constexpr int kMost = 4;  // 16-byte vectors of a row that one thread holds; of 8 some would leave the registers

struct Problem {
  const void* x;
  uint4* there;  // of the other rank: few or inbox
  const uint4* here;
  uint32_t* arrived_there;  // null: each word has the number beside it
  const uint32_t* arrived_here;
  uint32_t* calls;  // number of the last call, thread blocks of this one that have ended
  const uint32_t* stop;
  void* stream;  // null: out is the sum alone
  const void* weight;
  void* out;
  int rank, vecs;  // vectors of a row
  int64_t half;    // vectors
  int tokens;
  float share, eps;  // 1 / hidden
};

// Of all threads, in an order that never changes.
__device__ __forceinline__ float sum_of_block(float x) {
  __shared__ float sums[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; warp++) total += sums[warp];
  return total;
}

// A thread has vectors threadIdx.x + i * kThreads of its block's row.
template <int kVecs, typename Do>
__device__ __forceinline__ void each(int vecs, Do what) {
#pragma unroll
  for (int i = 0; i < kVecs; i++) {
    const int vec = threadIdx.x + i * kThreads;
    if (vec < vecs) what(i, vec);
  }
}

template <int kVecs>
__device__ __forceinline__ void exchange_flagged(const Problem& p, uint32_t call, const uint4 (&mine)[kVecs],
                                                 uint4 (&others)[kVecs]) {
  const int64_t row = call % 2 * p.half + int64_t(blockIdx.x) * 2 * p.vecs;
  each<kVecs>(p.vecs, [&](int i, int vec) {
    baton::store_flagged(p.there + row + vec, mine[i].x, mine[i].y, call);
    baton::store_flagged(p.there + row + p.vecs + vec, mine[i].z, mine[i].w, call);
  });
  baton::Wait wait(p.stop);
  each<kVecs>(p.vecs, [&](int i, int vec) {
    uint4 first, second;
    do {
      first = baton::load_flagged(p.here + row + vec);
      second = baton::load_flagged(p.here + row + p.vecs + vec);
    } while ((first.y != call || first.w != call || second.y != call || second.w != call) && wait.goes_on());
    others[i] = {first.x, first.z, second.x, second.z};
  });
}

template <int kVecs>
__device__ __forceinline__ void exchange_rows(const Problem& p, uint32_t call, const uint4 (&mine)[kVecs],
                                              uint4 (&others)[kVecs]) {
  const int64_t row = call % 2 * p.half + int64_t(blockIdx.x) * p.vecs;
  each<kVecs>(p.vecs, [&](int i, int vec) { p.there[row + vec] = mine[i]; });
  baton::fence_system();
  __syncthreads();
  if (threadIdx.x == 0) {
    baton::signal_system(p.arrived_there + blockIdx.x, call);
    baton::Wait wait(p.stop);
    uint32_t found;
    do {  // the other may be a call ahead, when this one's row has reached it
      found = baton::load_system(p.arrived_here + blockIdx.x);
    } while (found != call && found != baton::next_number(call) && wait.goes_on());
  }
  __syncthreads();
  each<kVecs>(p.vecs, [&](int i, int vec) { others[i] = __ldcg(p.here + row + vec); });
}

template <typename T, int kVecs>
__global__ void __launch_bounds__(kThreads) sum_of_two(const Problem p) {
  constexpr int kPer = kPerVec<T>;
  const int64_t row = int64_t(blockIdx.x) * p.vecs;
  uint4* stream = static_cast<uint4*>(p.stream) + row;
  uint4* out = static_cast<uint4*>(p.out) + row;
  uint4 mine[kVecs], others[kVecs], before[kVecs], weights[kVecs];
  baton::let_next_begin();
  if (p.stream != nullptr)
    each<kVecs>(p.vecs, [&](int i, int vec) { weights[i] = static_cast<const uint4*>(p.weight)[vec]; });
  baton::await_earlier();
  const uint32_t call = baton::next_number(__ldcg(p.calls));
  each<kVecs>(p.vecs, [&](int i, int vec) { mine[i] = static_cast<const uint4*>(p.x)[row + vec]; });
  if (p.stream != nullptr) each<kVecs>(p.vecs, [&](int i, int vec) { before[i] = stream[vec]; });
  if (p.arrived_there == nullptr) {
    exchange_flagged(p, call, mine, others);
  } else {
    exchange_rows(p, call, mine, others);
  }

  float squares = 0.f;
  each<kVecs>(p.vecs, [&](int i, int vec) {
    float own[kPer], other[kPer], sum[kPer];
    unpack<T>(mine[i], own);
    unpack<T>(others[i], other);
#pragma unroll
    for (int e = 0; e < kPer; e++) sum[e] = p.rank == 0 ? own[e] + other[e] : other[e] + own[e];
    if (p.stream != nullptr) {
      unpack<T>(before[i], own);
#pragma unroll
      for (int e = 0; e < kPer; e++) sum[e] += own[e];
    }
    mine[i] = pack<T>(sum);
    (p.stream != nullptr ? stream : out)[vec] = mine[i];
    unpack<T>(mine[i], sum);  // as it is stored
#pragma unroll
    for (int e = 0; e < kPer; e++) squares += sum[e] * sum[e];
  });
  const float total = sum_of_block(squares);  // where there is no norm too: all have read the count now
  if (p.stream != nullptr) {
    const float scale = rsqrtf(total * p.share + p.eps);
    each<kVecs>(p.vecs, [&](int i, int vec) {
      float values[kPer], weight[kPer];
      unpack<T>(mine[i], values);
      unpack<T>(weights[i], weight);
#pragma unroll
      for (int e = 0; e < kPer; e++) values[e] *= scale * weight[e];
      out[vec] = pack<T>(values);
    });
  }
  // The last to end counts the call: until then all of them read the count before.
  if (threadIdx.x == 0 && atomicAdd(p.calls + 1, 1u) == p.tokens - 1) {
    p.calls[1] = 0;
    p.calls[0] = call;
  }
}

template <typename T, int kVecs = 1>
int launch(const Problem& p, cudaStream_t queue) {
  if constexpr (kVecs < kMost) {
    if (p.vecs > kVecs * kThreads) return launch<T, kVecs * 2>(p, queue);
  }
  if (p.vecs > kVecs * kThreads) return cudaErrorInvalidValue;
  return baton::launch(sum_of_two<T, kVecs>, dim3(p.tokens), kThreads, 0, queue, p);
}

}  // namespace

// dtype 0: float32, 1: bfloat16. arrived_there null: `there` and `here` are few, else inbox; a half of either has `half`
// bytes. residual (the stream) and weight null: out becomes the sum.
BATON_EXPORT int peer_sum(const void* x, void* there, const void* here, uint32_t* arrived_there,
                          const uint32_t* arrived_here, uint32_t* calls, const uint32_t* stop, void* residual,
                          const void* weight, void* out, int64_t half, int dtype, int rank, int tokens, int hidden,
                          float eps, cudaStream_t queue) {
  const int per_vec = dtype == 0 ? 4 : 8;
  const int vecs = hidden / per_vec;
  if (tokens == 0) return cudaSuccess;
  const int64_t needed = int64_t(tokens) * vecs * baton::kVecBytes * (arrived_there == nullptr ? 2 : 1);
  if (tokens < 0 || hidden <= 0 || hidden % per_vec != 0 || needed > half) return cudaErrorInvalidValue;
  const Problem p{x,
                  static_cast<uint4*>(there),
                  static_cast<const uint4*>(here),
                  arrived_there,
                  arrived_here,
                  calls,
                  stop,
                  residual,
                  weight,
                  out,
                  rank,
                  vecs,
                  half / baton::kVecBytes,
                  tokens,
                  1.f / float(hidden),
                  eps};
  return dtype == 0 ? launch<float>(p, queue) : launch<__nv_bfloat16>(p, queue);
}
