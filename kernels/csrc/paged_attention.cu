// paged_attention: one new token's queries of each sequence against its keys and values, which lie in blocks. float32:
// there is no time to win on tensor cores, which would round to TF32. bfloat16 is split_attention.cu's.
//   q, out [S, H, D]    pool [N, L, 2, G, P, D]    block_tables [S, B] int32    context_lens [S] int32, new token included
// One thread block per sequence and group of query heads that share a KV head, so that K and V are read once for all of
// them (a second time where more than kMaxHeads share one, mostly from the L2 cache). Bound by memory.
//
// A warp takes a tile of tokens at a time. A token's D elements are spread over a *team* of lanes, 16 bytes each, so a
// warp's load is one run of memory; each lane keeps its slice of the queries and of the weighted sum in registers.
//     warp 0: tile 0, tile 8, ...      tile: kUnroll rows of kTeams tokens, never across two KV blocks
//     warp 1: tile 1, tile 9, ...      team: kLanes lanes, one token of each row
// Every team runs the online softmax (Milakov and Gimelshein, 2018) on the tokens it sees, in base 2; the partial results
// are merged at the end, first across a warp's teams by shuffles, then across warps through shared memory.
#include "vectors.cuh"

#include <cfloat>

namespace {

using baton::unpack;

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kMaxHeads = 8;  // query heads that one thread block can serve
constexpr float kLog2e = 1.4426950408889634f;
constexpr unsigned kAll = 0xffffffffu;

struct Problem {
  const void* q;
  const void* pool;
  const int32_t* block_tables;
  const int32_t* context_lens;
  void* out;
  int64_t q_stride;  // elements between two sequences' queries
  int sequences, heads, kv_heads, block_tokens, layers, layer, table_stride;
  int window;  // the newest `window` tokens are seen; 0: all
  float scale;
};

constexpr int power_of_two_from(int n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

template <int D>
struct Shape {
  static constexpr int kVec = baton::kVecBytes / int(sizeof(float));      // elements in one load
  static constexpr int kVecs = D / kVec;                                  // loads in one token
  static constexpr int kLanes = kVecs < 32 ? power_of_two_from(kVecs) : 32;  // some idle when kVecs is no power of two
  static constexpr int kPerLane = (kVecs + kLanes - 1) / kLanes;          // loads of one lane for one token
  static constexpr int kTeams = 32 / kLanes;                              // tokens side by side in a warp
  static_assert(D % kVec == 0);
};

// kHeads: query heads of this thread block, padded up to a power of two; padding heads compute on zeros, write nothing.
// Two thread blocks to a multiprocessor (at most 128 registers a thread) where that spills next to nothing.
template <int D, int kHeads>
__global__ void __launch_bounds__(kThreads, kHeads <= 4 && Shape<D>::kPerLane == 1 ? 2 : 1) decode(const Problem p) {
  using S = Shape<D>;
  constexpr int kSlice = S::kPerLane * S::kVec;           // elements of D that one lane holds
  constexpr int kUnroll0 = kHeads >= 8 ? 2 : 4;           // registers bound it
  constexpr int kUnroll = kUnroll0 * S::kTeams > 16 ? 16 / S::kTeams : kUnroll0;
  constexpr int kTile = kUnroll * S::kTeams;              // divides 16, and so every block size
  static_assert(16 % kTile == 0);

  const int sequence = blockIdx.y;
  const int group = p.heads / p.kv_heads;                 // query heads that share a KV head
  const int parts = (group + kHeads - 1) / kHeads;
  const int kv_head = blockIdx.x / parts;
  const int first_in_group = blockIdx.x % parts * kHeads;
  const int first_head = kv_head * group + first_in_group;
  const int num_heads = min(kHeads, group - first_in_group);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int team = lane / S::kLanes;
  const int member = lane % S::kLanes;

  // A lane's j-th vector is number member + j * kLanes of the token's, so that each load of a team is one run.
  float q[kHeads][kSlice], sum[kHeads][kSlice], top[kHeads], total[kHeads];
  const float* queries = static_cast<const float*>(p.q) + sequence * p.q_stride + int64_t(first_head) * D;
#pragma unroll
  for (int h = 0; h < kHeads; h++) {
    top[h] = -FLT_MAX;  // not -inf: two of those would subtract to NaN
    total[h] = 0.f;
#pragma unroll
    for (int j = 0; j < S::kPerLane; j++) {
      const int vec = member + j * S::kLanes;
      float x[S::kVec] = {};
      if (h < num_heads && vec < S::kVecs) unpack<float>(reinterpret_cast<const uint4*>(queries + h * D)[vec], x);
#pragma unroll
      for (int e = 0; e < S::kVec; e++) {
        q[h][j * S::kVec + e] = x[e] * p.scale * kLog2e;
        sum[h][j * S::kVec + e] = 0.f;
      }
    }
  }

  const int end = p.context_lens[sequence];
  const int begin = p.window > 0 ? max(0, end - p.window) : 0;
  const int32_t* table = p.block_tables + int64_t(sequence) * p.table_stride;
  const int64_t plane = int64_t(p.kv_heads) * p.block_tokens * S::kVecs;  // from a token's K to its V, in vectors
  const uint4* pool = static_cast<const uint4*>(p.pool) + int64_t(p.layer) * 2 * plane +
                      int64_t(kv_head) * p.block_tokens * S::kVecs;
  const int64_t block_stride = int64_t(p.layers) * 2 * plane;

  for (int tile = begin / kTile + warp; tile * kTile < end; tile += kWarps) {
    const int start = tile * kTile;
    const uint4* keys = pool + table[start / p.block_tokens] * block_stride +
                        int64_t(start % p.block_tokens) * S::kVecs;
    // Tokens outside [begin, end) are not loaded: what lies there may be NaN, and 0 * NaN is NaN.
    uint4 k[kUnroll][S::kPerLane], v[kUnroll][S::kPerLane];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      const int row = u * S::kTeams + team;
      const bool seen = start + row >= begin && start + row < end;
#pragma unroll
      for (int j = 0; j < S::kPerLane; j++) {
        const int vec = member + j * S::kLanes;
        k[u][j] = v[u][j] = uint4{0, 0, 0, 0};
        if (seen && vec < S::kVecs) {
          k[u][j] = __ldg(keys + row * S::kVecs + vec);
          v[u][j] = __ldg(keys + plane + row * S::kVecs + vec);
        }
      }
    }

    float score[kUnroll][kHeads];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      const int at = start + u * S::kTeams + team;
#pragma unroll
      for (int h = 0; h < kHeads; h++) score[u][h] = 0.f;
#pragma unroll
      for (int j = 0; j < S::kPerLane; j++) {
        float x[S::kVec];
        unpack<float>(k[u][j], x);
#pragma unroll
        for (int h = 0; h < kHeads; h++)
#pragma unroll
          for (int e = 0; e < S::kVec; e++) score[u][h] = fmaf(q[h][j * S::kVec + e], x[e], score[u][h]);
      }
#pragma unroll
      for (int h = 0; h < kHeads; h++) {
#pragma unroll
        for (int offset = S::kLanes / 2; offset > 0; offset /= 2)
          score[u][h] += __shfl_xor_sync(kAll, score[u][h], offset);
        if (at < begin || at >= end) score[u][h] = -INFINITY;
      }
    }

#pragma unroll
    for (int h = 0; h < kHeads; h++) {
      float highest = top[h];
#pragma unroll
      for (int u = 0; u < kUnroll; u++) highest = fmaxf(highest, score[u][h]);
      const float shrink = exp2f(top[h] - highest);
      top[h] = highest;
      total[h] *= shrink;
#pragma unroll
      for (int e = 0; e < kSlice; e++) sum[h][e] *= shrink;
#pragma unroll
      for (int u = 0; u < kUnroll; u++) {
        score[u][h] = exp2f(score[u][h] - highest);
        total[h] += score[u][h];
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; u++)
#pragma unroll
      for (int j = 0; j < S::kPerLane; j++) {
        float x[S::kVec];
        unpack<float>(v[u][j], x);
#pragma unroll
        for (int h = 0; h < kHeads; h++)
#pragma unroll
          for (int e = 0; e < S::kVec; e++)
            sum[h][j * S::kVec + e] = fmaf(score[u][h], x[e], sum[h][j * S::kVec + e]);
      }
  }

  // Teams of a warp: afterwards every team holds the warp's result.
#pragma unroll
  for (int h = 0; h < kHeads; h++)
#pragma unroll
    for (int offset = S::kLanes; offset < 32; offset *= 2) {
      const float other = __shfl_xor_sync(kAll, top[h], offset);
      const float highest = fmaxf(top[h], other);
      const float mine = exp2f(top[h] - highest), theirs = exp2f(other - highest);
      top[h] = highest;
      total[h] = total[h] * mine + __shfl_xor_sync(kAll, total[h], offset) * theirs;
#pragma unroll
      for (int e = 0; e < kSlice; e++)
        sum[h][e] = sum[h][e] * mine + __shfl_xor_sync(kAll, sum[h][e], offset) * theirs;
    }

  // Warps of the thread block, one head at a time, which keeps shared memory small.
  __shared__ float sums[kWarps][D], tops[kWarps], totals[kWarps];
  float* out = static_cast<float*>(p.out) + (int64_t(sequence) * p.heads + first_head) * D;
#pragma unroll
  for (int h = 0; h < kHeads; h++) {
    if (h >= num_heads) break;  // the same for all threads
    if (team == 0) {
#pragma unroll
      for (int j = 0; j < S::kPerLane; j++) {
        const int vec = member + j * S::kLanes;
        if (vec < S::kVecs)
#pragma unroll
          for (int e = 0; e < S::kVec; e++) sums[warp][vec * S::kVec + e] = sum[h][j * S::kVec + e];
      }
      if (member == 0) tops[warp] = top[h], totals[warp] = total[h];
    }
    __syncthreads();
    if (threadIdx.x < D) {
      float highest = -FLT_MAX, all = 0.f, result = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; w++) highest = fmaxf(highest, tops[w]);
#pragma unroll
      for (int w = 0; w < kWarps; w++) {
        const float weight = exp2f(tops[w] - highest);
        all += weight * totals[w];
        result += weight * sums[w][threadIdx.x];
      }
      out[h * D + threadIdx.x] = all == 0.f ? 0.f : result / all;  // an empty row (padding) gives zeros
    }
    __syncthreads();
  }
  static_assert(D <= kThreads);
}

template <int D, int kHeads>
int launch(const Problem& p, cudaStream_t stream) {
  const int group = p.heads / p.kv_heads;
  const dim3 grid(unsigned(p.kv_heads * baton::ceil_div(group, kHeads)), unsigned(p.sequences));
  decode<D, kHeads><<<grid, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <int D>
int by_heads(const Problem& p, cudaStream_t stream) {
  const int group = p.heads / p.kv_heads;
  if (group == 1) return launch<D, 1>(p, stream);
  if (group == 2) return launch<D, 2>(p, stream);
  if (group <= 4) return launch<D, 4>(p, stream);
  return launch<D, kMaxHeads>(p, stream);
}

int by_head_size(const Problem& p, int head_size, cudaStream_t stream) {
  switch (head_size) {
    case 64: return by_heads<64>(p, stream);
    case 80: return by_heads<80>(p, stream);
    case 96: return by_heads<96>(p, stream);
    case 128: return by_heads<128>(p, stream);
    case 256: return by_heads<256>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

// Block sizes are multiples of 16. Table entries past a sequence's context are not read.
BATON_EXPORT int paged_decode_attention(const void* q, const void* pool, const int32_t* block_tables,
                                        const int32_t* context_lens, void* out, int64_t q_stride,
                                        int sequences, int heads, int kv_heads, int head_size, int block_tokens,
                                        int layers, int layer, int table_stride, int window, float scale,
                                        cudaStream_t stream) {
  if (sequences == 0) return cudaSuccess;
  if (sequences < 0 || sequences > 65535 || kv_heads <= 0 || heads % kv_heads != 0 || block_tokens % 16 != 0)
    return cudaErrorInvalidValue;
  const Problem p{q,       pool,  block_tables, context_lens, out,    q_stride, sequences, heads, kv_heads, block_tokens,
                  layers,  layer, table_stride, window,       scale};
  return by_head_size(p, head_size, stream);
}
