// rotary_write: from the product of q, k and v to what attention reads, in one launch.
//   qkv [T, H + 2G, D], tokens `qkv_stride` apart    q [T, H, D], tokens `q_stride` apart; may be qkv's own
//   cos, sin [positions, D], as kernels/rotary.py has them    positions, slots [T] int64    pool [N, L, 2, G, P, D]
//   q_weight, k_weight [D], or none: the head's RMS norm before it is turned
// Heads of q are turned into `q`, heads of k turned into the pool, heads of v copied beside them. A token whose slot is
// negative pads its step: nothing of it is written.
//
// A thread has 16 bytes of a head's first half and the 16 of its second half that turn with them, so it needs no other
// thread but for the norm; a head's threads are neighbours in one warp. All in float32, rounded once. Bound by memory,
// (2H + 4G) * D elements a token, and at few tokens by two loads after each other: the position, then its angles.
#include "launch.cuh"
#include "vectors.cuh"

namespace {

using baton::kPerVec;
using baton::pack;
using baton::unpack;

constexpr int kThreads = 128;

struct Problem {
  const void* qkv;
  void* q;
  const void *cos, *sin;
  const int64_t *positions, *slots;
  void* pool;
  const void *q_weight, *k_weight;  // both or none
  int64_t qkv_stride, q_stride;     // vectors
  int tokens, heads, kv_heads, block_tokens, layers, layer;
  int half;      // vectors in half a head
  int log_team;  // a head's threads are `half`, up to a power of two: 1 << log_team
  float share;   // 1 / D
  float eps;
};

// How a vector of K or V lies in the pool: here as it is in the model. A pool of another type gets another `keep`, whose
// elements are of type To; `element` counts those from the pool's beginning.
template <typename To>
__device__ __forceinline__ void keep(void* pool, int64_t element, const float (&x)[kPerVec<To>]) {
  *reinterpret_cast<uint4*>(static_cast<To*>(pool) + element) = pack<To>(x);
}

template <typename T, bool kNorms>
__global__ void __launch_bounds__(kThreads) turn_and_write(const Problem p) {
  constexpr int kPer = kPerVec<T>;
  baton::let_next_begin();
  baton::await_earlier();
  const int64_t token = blockIdx.x;
  const int thread = blockIdx.y * kThreads + threadIdx.x;
  const int head = thread >> p.log_team, member = thread & ((1 << p.log_team) - 1);
  const bool mine = head < p.heads + 2 * p.kv_heads && member < p.half;
  const bool turns = mine && head < p.heads + p.kv_heads;
  const int vec = mine ? member : 0;  // of half a head
  const int low = mine ? head * 2 * p.half + vec : 0, high = low + p.half;  // of the token

  // All threads load, those of v angles too and those of no head the first head's: loads that wait for no condition are
  // under way together. A token that pads has no position that can be relied on.
  const int64_t slot = p.slots[token], position = p.positions[token] & ~(slot >> 63);
  const uint4* from = static_cast<const uint4*>(p.qkv) + token * p.qkv_stride;
  const uint4 raw_low = from[low], raw_high = from[high];
  // The tables' halves are the same but for the sign, which the second half of `sin` has as it is.
  const int64_t angles = position * 2 * p.half + vec;
  const uint4 raw_cos = static_cast<const uint4*>(p.cos)[angles];
  const uint4 raw_sin = static_cast<const uint4*>(p.sin)[angles + p.half];
  const uint4* weights = static_cast<const uint4*>(head < p.heads ? p.q_weight : p.k_weight);
  const uint4 w_low = kNorms ? weights[vec] : uint4{}, w_high = kNorms ? weights[vec + p.half] : uint4{};

  float x[kPer], y[kPer];
  unpack<T>(raw_low, x);
  unpack<T>(raw_high, y);
  if constexpr (kNorms) {
    float squares = 0.f;
#pragma unroll
    for (int e = 0; e < kPer; e++) squares += x[e] * x[e] + y[e] * y[e];
    if (!mine) squares = 0.f;
    for (int offset = 1 << p.log_team >> 1; offset > 0; offset /= 2)
      squares += __shfl_xor_sync(~0u, squares, offset);
    if (turns) {
      const float scale = rsqrtf(squares * p.share + p.eps);
      float w[kPer];
      unpack<T>(w_low, w);
#pragma unroll
      for (int e = 0; e < kPer; e++) x[e] *= scale * w[e];
      unpack<T>(w_high, w);
#pragma unroll
      for (int e = 0; e < kPer; e++) y[e] *= scale * w[e];
    }
  }
  if (turns) {
    float c[kPer], s[kPer];
    unpack<T>(raw_cos, c);
    unpack<T>(raw_sin, s);
#pragma unroll
    for (int e = 0; e < kPer; e++) {
      const float turned = x[e] * c[e] - y[e] * s[e];
      y[e] = y[e] * c[e] + x[e] * s[e];
      x[e] = turned;
    }
  }
  if (!mine || slot < 0) return;
  if (head < p.heads) {
    uint4* q = static_cast<uint4*>(p.q) + token * p.q_stride;
    q[low] = pack<T>(x);
    q[high] = pack<T>(y);
    return;
  }
  const int plane = head - p.heads;  // k's heads, then v's, as they lie in a block
  const unsigned block = unsigned(slot) / p.block_tokens, offset = unsigned(slot) % p.block_tokens;
  const int64_t first = (int64_t(block) * p.layers + p.layer) * 2 * p.kv_heads;
  const int64_t row = (first + plane) * p.block_tokens + offset;
  const int64_t element = (row * 2 * p.half + vec) * kPer;
  keep<T>(p.pool, element, x);
  keep<T>(p.pool, element + p.half * kPer, y);
}

template <typename T>
int launch(const Problem& p, cudaStream_t stream) {
  const int parts = baton::ceil_div((p.heads + 2 * p.kv_heads) << p.log_team, kThreads);
  const auto kernel = p.q_weight == nullptr ? turn_and_write<T, false> : turn_and_write<T, true>;
  return baton::launch(kernel, dim3(p.tokens, parts), kThreads, 0, stream, p);
}

}  // namespace

// Strides count vectors of 16 bytes, as does `half`: those in half a head, 32 at most. Slots are below 2^31.
// dtype: 0 float32, 1 bfloat16, of all but positions and slots.
BATON_EXPORT int rotary_write(const void* qkv, void* q, const void* cos, const void* sin, const int64_t* positions,
                              const int64_t* slots, void* pool, const void* q_weight, const void* k_weight, int dtype,
                              int64_t qkv_stride, int64_t q_stride, int tokens, int heads, int kv_heads,
                              int block_tokens, int layers, int layer, int half, float eps, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  if (tokens < 0 || heads < 0 || kv_heads <= 0 || block_tokens <= 0 || half <= 0 || half > 32)
    return cudaErrorInvalidValue;
  if ((q_weight == nullptr) != (k_weight == nullptr)) return cudaErrorInvalidValue;
  Problem p{qkv,    q,     cos,      sin,          positions, slots, pool, q_weight, k_weight, qkv_stride, q_stride,
            tokens, heads, kv_heads, block_tokens, layers,    layer, half};
  while (1 << p.log_team < half) p.log_team++;
  p.share = 1.f / float(2 * half * (dtype == 0 ? kPerVec<float> : kPerVec<__nv_bfloat16>));
  p.eps = eps;
  switch (dtype) {
    case 0: return launch<float>(p, stream);
    case 1: return launch<__nv_bfloat16>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}
