// What the kernels of sampling.cu share: how a row of logits is read, what a token weighs, histograms of weights.
#pragma once

#include "common.cuh"

#include <cfloat>

namespace baton {

constexpr int kThreads = 512;
constexpr int kMaxParts = 8;      // thread blocks that share a row
constexpr int kGroup = 8;         // logits that a thread reads at a time; their mask is one byte
constexpr int kBins = 2048;
constexpr float kBinsPerOctave = 44.f;  // so the last bin begins where a token weighs less than one unit
constexpr int kUnits = 45;        // the best token weighs 2^kUnits; 2^18 such fit 64 bits
constexpr int kCandidates = 2048; // tokens that are sorted
constexpr int kMaxBiases = 2048;  // of a row
constexpr float kLog2e = 1.4426950408889634f;
constexpr unsigned kAll = 0xffffffffu;

enum Flags { kEdits = 1, kCounts = 2 };  // some tokens are touched; the answer's tokens are counted
enum Task { kDraw, kLogprobs };

// How one row of the batch chooses. Written by the host: kernels/sampling.py, ROW.
struct Row {
  uint64_t stream;            // of random numbers
  double top_p;               // 1 or more: all
  double presence, frequency; // penalties
  float rate;                 // log2(e) / temperature
  float least;                // log2(min_p); -inf: none
  float repetition;
  int32_t top_k;              // 0: greedy; the vocabulary or more: all
  int32_t min_tokens;         // before so many no stop token
  int32_t biases;             // how many
  int32_t flags;
  int32_t logprobs;           // how many of the best; -1: none at all
};
static_assert(sizeof(Row) == 64);

// The best of a row or a part of it: logit and token as `pack` has them.
struct Best {
  uint64_t edited, raw;
  uint32_t bad;  // a NaN or +inf is among the raw ones
};

// Bins [first, last] that hold a position which is looked for, and what lies before them.
struct Range {
  uint64_t mass_before;
  uint32_t count_before;
  int first, last;
};

// What the histogram tells of a row.
struct Plan {
  uint64_t total;        // of all tokens
  uint64_t least_mass;   // of those that min_p leaves
  double number;
  Range top_k, top_p, token;
};

// Of one row of a step. Zeros before the first launch; counters are zeros between launches.
struct alignas(64) State {
  Best parts[kMaxParts], all;
  Plan plans[2];  // by task
  uint32_t arrived[2], candidates[2], surveyed;
};
static_assert(sizeof(State) == 448);

struct Problem {
  const void* logits;       // [S] rows, `stride` elements apart
  const Row* rows;          // [R]; null: all rows are greedy
  const int32_t* at;        // [S] in [0, R); below 0: nobody's row, nothing is written. Null where `rows` is
  const int32_t* positions; // [S] of the token in its answer
  const int16_t* counts;    // [R, V] in the answer, the sign bit set where the prompt has the token
  const uint32_t* touched;  // [R, words] a bit for each token that an edit touches
  const int64_t* biases;    // [R, kMaxBiases] rising tokens, bit 31 of a stop token set; bits of a float above
  const uint32_t* masks;    // [M, words] a bit for each token that may be chosen
  const int32_t* mask_of;   // [S] which of the masks; below 0: none. Null: no masks
  int64_t* tokens;          // [S]
  float* largest;           // [S]; null: tokens are given, only their logprobs are wanted
  float* own;               // [S] logprob of the token
  float* top;               // [S, most] and of the best
  int64_t* top_ids;         // [S, most]
  State* states;            // [S]
  uint32_t* histograms;     // [S, 2, parts, kRecord], where there are several parts
  uint64_t* lists;          // [S, 2, kCandidates], the same
  int64_t stride;
  int vocab, words, parts, most;
  int given;                // logprobs of each row where `rows` is null; -1: none
  int capacity;             // of the candidates, at most kCandidates; more take the slow path
  bool vectors;             // a row is whole 16-byte vectors
};

__device__ __forceinline__ int groups_of(int vocab) { return (vocab + kGroup - 1) / kGroup; }

__device__ __forceinline__ int ordered(float x) {  // integers in the order of the numbers; -0 equals 0
  const int bits = __float_as_int(x + 0.f);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// Larger is better: the larger logit, of equals the smaller token.
__device__ __forceinline__ uint64_t pack(int key, int token) {
  return uint64_t(uint32_t(key) ^ 0x80000000u) << 32 | uint32_t(~token);
}
__device__ __forceinline__ int token_of(uint64_t packed) { return int(~uint32_t(packed)); }
__device__ __forceinline__ float logit_of(uint64_t packed) {
  const int key = int(uint32_t(packed >> 32) ^ 0x80000000u);
  return __int_as_float(key ^ ((key >> 31) & 0x7fffffff));
}

// [0, 1), 53 bits, of a stream and a position; as uniform_at in engine/draws.py.
__device__ __forceinline__ double uniform(uint64_t stream, uint64_t position) {
  uint64_t x = stream ^ (position + 0x8CB92BA72F3D8DD7ull);
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ x >> 27) * 0x94D049BB133111EBull;
  x ^= x >> 31;
  return double(x >> 11) * 0x1p-53;
}

// engine/logit_edits.py, in the same float32 operations.
__device__ __forceinline__ float edited(float x, int token, const int16_t* counts, const int64_t* biases,
                                        const Row* row, bool early) {
  float bias = 0.f;
  for (int low = 0, high = row->biases; low < high;) {
    const int middle = (low + high) / 2;
    const int64_t entry = biases[middle];
    const int its = int(uint32_t(entry) & 0x7fffffffu);
    if (its == token) bias = early && (uint32_t(entry) >> 31) ? -INFINITY : __int_as_float(int(entry >> 32));
    if (its < token) low = middle + 1;
    else high = middle;
  }
  const int entry = counts[token], count = entry & 0x7fff;
  x = __fadd_rn(x, bias);
  if (entry != 0) x = x > 0.f ? __fdiv_rn(x, row->repetition) : __fmul_rn(x, row->repetition);
  if (count > 0) x = __fsub_rn(x, float(__dadd_rn(row->presence, __dmul_rn(row->frequency, double(count)))));
  return fminf(x, FLT_MAX);
}

// Some logits on their way from memory, with the bytes of mask and edits that speak of them.
template <typename T>
struct Group {
  uint4 vecs[kGroup * sizeof(T) / 16];
  unsigned bits;  // of the mask, then of the edits
};

// One row of logits, as one task sees it: raw, or with its edits and its mask.
template <typename T>
struct Line {
  const T* logits;
  const uint8_t* allowed;  // a bit a token; null: all
  const uint8_t* touched;  // the same; null: none
  const int16_t* counts;
  const int64_t* biases;
  const Row* row;          // null: greedy
  int vocab;
  bool early;              // no stop token yet
  bool vectors;

  __device__ __forceinline__ int groups() const { return groups_of(vocab); }
  __device__ __forceinline__ float raw(int token) const { return float(logits[token]); }

  __device__ __forceinline__ Group<T> fetch(int group) const {
    Group<T> found;
    const T* from = logits + int64_t(group) * kGroup;
    if (vectors) {
#pragma unroll
      for (unsigned i = 0; i < sizeof(found.vecs) / 16; i++)
        found.vecs[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
    } else {
      T some[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; i++) some[i] = group * kGroup + i < vocab ? from[i] : T(0.f);
      memcpy(found.vecs, some, sizeof some);
    }
    found.bits = (allowed ? __ldg(allowed + group) : 0xffu) | (touched ? __ldg(touched + group) : 0u) << 8;
    return found;
  }

  __device__ __forceinline__ void unpack(const Group<T>& from, float (&x)[kGroup]) const {
    T some[kGroup];
    memcpy(some, from.vecs, sizeof some);
#pragma unroll
    for (int i = 0; i < kGroup; i++) x[i] = float(some[i]);
  }

  __device__ __forceinline__ void edit(const Group<T>& from, int group, float (&x)[kGroup]) const {
#pragma unroll 1
    for (unsigned left = from.bits >> 8; left != 0; left &= left - 1) {
      const int which = __ffs(int(left)) - 1;
      float its = 0.f;
#pragma unroll
      for (int i = 0; i < kGroup; i++) its = i == which ? x[i] : its;  // the array stays in registers
      its = edited(its, group * kGroup + which, counts, biases, row, early);
#pragma unroll
      for (int i = 0; i < kGroup; i++) x[i] = i == which ? its : x[i];
    }
    if ((from.bits & 0xff) != 0xff)
#pragma unroll
      for (int i = 0; i < kGroup; i++)
        if (!(from.bits >> i & 1)) x[i] = -INFINITY;
  }
};

// The row of a step as `task` sees it. Not for a row that is nobody's.
template <typename T>
__device__ Line<T> line_of(const Problem& p, int s, Task task) {
  Line<T> line{};
  line.logits = static_cast<const T*>(p.logits) + s * p.stride;
  line.vocab = p.vocab;
  line.vectors = p.vectors;
  if (p.rows) line.row = p.rows + p.at[s];
  if (task == kLogprobs) return line;
  if (line.row && line.row->flags & kEdits) {
    const int at = p.at[s];
    line.touched = reinterpret_cast<const uint8_t*>(p.touched + int64_t(at) * p.words);
    line.counts = p.counts + int64_t(at) * p.vocab;
    line.biases = p.biases + int64_t(at) * kMaxBiases;
    line.early = p.positions[s] < line.row->min_tokens;
  }
  if (p.mask_of && p.mask_of[s] >= 0)
    line.allowed = reinterpret_cast<const uint8_t*>(p.masks + int64_t(p.mask_of[s]) * p.words);
  return line;
}

// Calls see(group, its logits as they are, what was fetched) for groups [first, last), a thread each in turn.
// kAhead: how many of a thread's are on their way.
template <int kAhead, typename T, typename See>
__device__ __forceinline__ void visit(const Line<T>& line, int first, int last, See see) {
  Group<T> coming[kAhead];
  const int begin = first + int(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kAhead; i++)
    if (begin + i * kThreads < last) coming[i] = line.fetch(begin + i * kThreads);
  for (int base = begin; base < last; base += kAhead * kThreads) {
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const int group = base + i * kThreads, next = group + kAhead * kThreads;
      if (group < last) {
        const Group<T> here = coming[i];
        if (next < last) coming[i] = line.fetch(next);
        float x[kGroup];
        line.unpack(here, x);
        see(group, x, here);
      }
    }
  }
}

// Calls see(token, logit) for each token of the groups, with edits and mask.
template <int kAhead, typename T, typename See>
__device__ __forceinline__ void visit_tokens(const Line<T>& line, int first, int last, See see) {
  visit<kAhead>(line, first, last, [&](int group, float(&x)[kGroup], const Group<T>& from) {
    line.edit(from, group, x);
#pragma unroll
    for (int i = 0; i < kGroup; i++)
      if (group * kGroup + i < line.vocab) see(group * kGroup + i, x[i]);
  });
}

// What a token weighs, and in which bin it lies: functions of its logit that never rise as that falls.
struct Scale {
  float best, rate;
  __device__ __forceinline__ float octaves(float x) const { return (x - best) * rate; }  // 0 or below
  __device__ static __forceinline__ int bin(float octaves) {
    return int(fminf(-octaves * kBinsPerOctave, float(kBins - 1)));
  }
  __device__ static __forceinline__ uint64_t units(float octaves) {
    const unsigned bits = __float_as_uint(exp2f(fmaxf(octaves, -60.f)));  // in [2^-60, 1], so the exponent is small
    return (uint64_t(bits & 0x7fffffu | 0x800000u) << (kUnits - 23)) >> (127 - (bits >> 23));
  }
};

__device__ __forceinline__ uint64_t share_up(double share, uint64_t mass) {  // in [1, mass]
  const double found = ceil(share * double(mass));
  return found >= double(mass) ? mass : max(uint64_t(found), uint64_t(1));
}
__device__ __forceinline__ uint64_t share_down(double share, uint64_t mass) {  // in [0, mass)
  return min(uint64_t(share * double(mass)), mass - 1);
}

template <typename T, typename Join>
__device__ __forceinline__ T reduce(T mine, Join join) {  // over the block; all threads get it
  __shared__ T of_warp[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) mine = join(mine, __shfl_xor_sync(kAll, mine, offset));
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  T all = of_warp[0];
#pragma unroll
  for (int w = 1; w < kThreads / 32; w++) all = join(all, of_warp[w]);
  return all;
}

template <typename T>
__device__ __forceinline__ T sum_before(T mine, T* total) {  // of the threads before this one
  __shared__ T of_warp[kThreads / 32];
  T sum = mine;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const T other = __shfl_up_sync(kAll, sum, offset);
    if (int(threadIdx.x % 32) >= offset) sum += other;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 31) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  T before = 0, all = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; w++) {
    if (w == int(threadIdx.x / 32)) before = all;
    all += of_warp[w];
  }
  *total = all;
  return before + sum - mine;
}

// Weights and numbers of tokens by bin, best bin first; summed up, what lies before each bin.
struct Histogram {
  union {
    struct {
      uint32_t low[kBins], high[kBins];
    };
    uint64_t mass_before[kBins];
  };
  uint32_t counts[kBins];  // then: how many lie before
  uint64_t total;

  __device__ __forceinline__ void clear() {
    for (int i = threadIdx.x; i < kBins; i += kThreads) low[i] = high[i] = counts[i] = 0;
    __syncthreads();
  }

  __device__ __forceinline__ void add(int bin, uint64_t units) {
    const uint32_t below = uint32_t(units);
    uint32_t above = uint32_t(units >> 32);
    if (below != 0) above += atomicAdd(&low[bin], below) > ~below;  // a carry
    if (above != 0) atomicAdd(&high[bin], above);
  }

  static constexpr int kEach = kBins / kThreads;  // bins of a thread, side by side

  __device__ __forceinline__ void read(uint64_t (&mass)[kEach], uint32_t (&count)[kEach]) const {
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const int bin = threadIdx.x * kEach + i;
      mass[i] = uint64_t(high[bin]) << 32 | low[bin];
      count[i] = counts[bin];
    }
  }

  // `mass` and `count` of this thread's bins.
  __device__ __forceinline__ void sum_up(const uint64_t (&mass)[kEach], const uint32_t (&count)[kEach]) {
    uint64_t its_mass = 0, all_mass;
    uint32_t its_count = 0, all_count;
#pragma unroll
    for (int i = 0; i < kEach; i++) its_mass += mass[i], its_count += count[i];
    uint64_t mass_sum = sum_before(its_mass, &all_mass);
    uint32_t count_sum = sum_before(its_count, &all_count);
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      mass_before[threadIdx.x * kEach + i] = mass_sum;
      counts[threadIdx.x * kEach + i] = count_sum;
      mass_sum += mass[i], count_sum += count[i];
    }
    if (threadIdx.x == 0) total = all_mass;
    __syncthreads();
  }

  __device__ __forceinline__ uint64_t mass_after(int bin) const {
    return bin + 1 < kBins ? mass_before[bin + 1] : total;
  }

  // The bin in which the running sum passes `mass`, which is less than all.
  __device__ __forceinline__ int bin_of_mass(uint64_t mass) const { return last_up_to(mass_before, mass); }
  // The bin of the token that so many are better than.
  __device__ __forceinline__ int bin_of_rank(uint32_t rank) const { return last_up_to(counts, rank); }

  template <typename T>
  __device__ static __forceinline__ int last_up_to(const T* before, T value) {  // the last that is not above value
    int low = 0, high = kBins - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (before[middle] <= value) low = middle;
      else high = middle - 1;
    }
    return low;
  }
};

constexpr int kRecord = 3 * kBins + 4;  // words of a part's histogram in memory, and the mass that min_p leaves

// True in the last of a row's thread blocks to come here, which then sees what the others wrote (with __ldcg).
__device__ __forceinline__ bool comes_last(uint32_t* counter, int parts) {
  __shared__ uint32_t arrived;
  __threadfence();
  __syncthreads();
  if (parts == 1) return true;
  if (threadIdx.x == 0) arrived = atomicAdd(counter, 1u);
  __syncthreads();
  if (arrived != uint32_t(parts - 1)) return false;
  __threadfence();
  if (threadIdx.x == 0) *counter = 0;
  return true;
}

}  // namespace baton
