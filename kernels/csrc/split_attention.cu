// split_decode_attention: as paged_decode_attention, on tensor cores and split along the keys. bfloat16.
//   q, out [S, H, D]    pool [N, L, 2, G, P, D]    block_tables [S, B] int32    context_lens [S] int32, new token included
// All keys of a step are cut into tiles of kTile tokens, for each sequence and KV head, and the tiles laid in a row:
//     sequence 0: head 0: tile 0 1 2 | head 1: tile 0 1 2 | ... | sequence 1: head 0: tile 0 | ...
// Where more than 8 query heads share a KV head, each 8 of them are a part with thread blocks of its own (blockIdx.y).
// Each thread block takes an equal run of that row (Stream-K, Osama et al., PPoPP 2023), so all end together whatever the
// lengths are. Where the run ends inside a head's tiles, partial results go to a workspace, and the last thread block of
// that head to arrive merges them (split-K decoding as in FlashDecoding, Dao et al., 2023). A plan, made once for all
// layers of a step, says where each run begins.
//
// A warp takes 16 tokens of each tile, through its own ring of shared memory filled by asynchronous copies, so warps
// wait for each other only where a head ends. With 8 query heads to a matrix column block, on m16n8k16:
//     scores^T [16 tokens, 8 heads]  = K [16 tokens, D] q^T [D, 8 heads]
//     sum^T    [D, 8 heads]         += V^T [D, 16 tokens] weights^T [16 tokens, 8 heads]
// Softmax is online (Milakov and Gimelshein, 2018), in base 2 and float32; weights are rounded to bfloat16.
#include "common.cuh"
#include "ptx.cuh"

#include <cfloat>

namespace {

using baton::commit_copies;
using baton::copy_16;
using baton::load_matrices;
using baton::load_transposed;
using baton::multiply;
using baton::transposed;
using baton::wait_copies;

constexpr int kStep = 16;      // tokens of one warp in a tile
constexpr int kWarps = baton::kSharedBytes < (128 << 10) ? 4 : 8;  // as many as find room for their rings
constexpr int kTile = kWarps * kStep;
constexpr int kThreads = kWarps * 32;
constexpr int kColumns = 8;    // query heads of one column block
constexpr float kLog2e = 1.4426950408889634f;
constexpr unsigned kAll = 0xffffffffu;

struct Problem {
  const __nv_bfloat16* q;
  const __nv_bfloat16* pool;
  const int32_t* block_tables;
  const int32_t* context_lens;
  __nv_bfloat16* out;
  const int32_t* plan;       // [S + 1] tiles of one head before each sequence | [blocks] first sequence of each run
  float* partial;            // [parts][blocks][2][kColumns][D + 2]: sum, then top and total
  int32_t* arrived;          // [parts][S][G], zeros between launches
  int64_t q_stride;          // elements between two sequences' queries
  int sequences, heads, kv_heads, block_tokens, layers, layer, table_stride;
  int window;                // the newest `window` tokens are seen; 0: all
  float scale;
};

// Tiles of a sequence: those that hold a token which is seen, and one at least, so that every row of `out` is written.
struct Span {
  int begin, end;   // tokens
  int first, count; // tiles
};

__device__ __forceinline__ Span span_of(int length, int window) {
  const int begin = window > 0 ? max(0, length - window) : 0;
  const int first = begin / kTile;
  return {begin, length, first, max(1, (length + kTile - 1) / kTile - first)};
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

template <int D>
struct Layout {
  static constexpr int kVecs = D / 8;                    // 16-byte vectors in one token
  static constexpr int kPitch = D * 2 + 16;              // bytes; an odd number of vectors, so 8 rows meet no bank twice
  static constexpr int kHalf = kStep * kPitch;           // K, then V
  static constexpr int kStage = 2 * kHalf;               // of one warp
  static constexpr int kRoom = baton::kSharedBytes - (20 << 10);  // for all rings
  static constexpr int kStages = kRoom / (kWarps * kStage) < 6 ? kRoom / (kWarps * kStage) : 6;
  static constexpr int kMergeRows = 16 * 1024 / (kWarps * kColumns * 4);  // of D, summed over warps at a time
  static constexpr int kMerge = kWarps * kColumns * (kMergeRows < D ? kMergeRows : D) * 4;
  static constexpr int kBytes = kStages * kWarps * kStage + kMerge + kWarps * kColumns * 8;
  static_assert(D % 16 == 0 && kStages >= 2);
};

// Walks a warp's tiles: sequence after sequence, head after head.
struct Cursor {
  Span span;
  int sequence, head, tile;
  int block;  // of this warp's tokens, asked for a tile ahead
};

template <int D>
__global__ void __launch_bounds__(kThreads, 1) split_decode(const Problem p) {
  using X = Layout<D>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = p.heads / p.kv_heads, first_in_group = blockIdx.y * kColumns;
  const int64_t tiles = int64_t(p.plan[p.sequences]) * p.kv_heads;
  const int64_t blocks = min(int64_t(gridDim.x), tiles);  // each has a tile at least
  if (blockIdx.x >= blocks) return;
  const int64_t begin = tiles * blockIdx.x / blocks, end = tiles * (blockIdx.x + 1) / blocks;

  const int64_t plane = int64_t(p.kv_heads) * p.block_tokens * D;  // from a token's K to its V
  const int64_t block_stride = int64_t(p.layers) * 2 * plane;
  const __nv_bfloat16* pool = p.pool + int64_t(p.layer) * 2 * plane;
  const uint32_t ring = uint32_t(__cvta_generic_to_shared(shared)) + warp * X::kStages * X::kStage;
  float* merge = reinterpret_cast<float*>(shared + X::kStages * kWarps * X::kStage);
  float* tops = merge + X::kMerge / 4;
  float* totals = tops + kWarps * kColumns;

  const auto ask = [&](Cursor& c) {
    const int start = (c.span.first + c.tile) * kTile + warp * kStep;
    if (start < c.span.end) c.block = p.block_tables[int64_t(c.sequence) * p.table_stride + start / p.block_tokens];
  };
  const auto at = [&](int sequence, int64_t item) {
    Cursor c;
    c.sequence = sequence;
    c.span = span_of(p.context_lens[sequence], p.window);
    const int within = int(item - int64_t(p.plan[sequence]) * p.kv_heads);
    c.head = within / c.span.count;
    c.tile = within % c.span.count;
    return c;
  };
  const auto advance = [&](Cursor& c) {  // not past the last tile
    if (++c.tile < c.span.count) return;
    c.tile = 0;
    if (++c.head < p.kv_heads) return;
    c.head = 0;
    c.span = span_of(p.context_lens[++c.sequence], p.window);
  };
  const auto fetch = [&](const Cursor& c, int stage) {
    const int start = (c.span.first + c.tile) * kTile + warp * kStep;
    if (start < c.span.end && start + kStep > c.span.begin) {
      const __nv_bfloat16* keys = pool + c.block * block_stride +
                                  (int64_t(c.head) * p.block_tokens + start % p.block_tokens) * D;
      const uint32_t to = ring + stage * X::kStage;
#pragma unroll
      for (int i = lane; i < kStep * X::kVecs; i += 32) {
        const int row = i / X::kVecs, vec = i % X::kVecs;
        // What lies outside may be NaN, and 0 * NaN is NaN.
        const bool there = start + row >= c.span.begin && start + row < c.span.end;
        copy_16(to + row * X::kPitch + vec * 16, keys + i * 8, there);
        copy_16(to + X::kHalf + row * X::kPitch + vec * 16, keys + plane + i * 8, there);
      }
    }
    commit_copies();
  };

  Cursor ahead = at(p.plan[p.sequences + 1 + blockIdx.x], begin), now = ahead;
  ask(ahead);
  int64_t fetched = begin;
#pragma unroll
  for (int stage = 0; stage < X::kStages - 1; stage++) {
    if (fetched < end) {
      fetch(ahead, stage);
      if (++fetched < end) advance(ahead), ask(ahead);
    } else {
      commit_copies();
    }
  }

  uint32_t q[D / 16][2];
  float sum[D / 16][4], top[2], total[2];
  int stage = 0;
  int64_t first_of_head = begin;  // item at which this thread block's part of the head begins
  for (int64_t item = begin; item < end; item++) {
    if (item == first_of_head) {
      const int head = first_in_group + lane / 4;
      const __nv_bfloat16* from = p.q + now.sequence * p.q_stride + int64_t(now.head * group + head) * D;
#pragma unroll
      for (int k = 0; k < D / 16; k++) {
        const int element = k * 16 + lane % 4 * 2;
        q[k][0] = head < group ? *reinterpret_cast<const uint32_t*>(from + element) : 0u;
        q[k][1] = head < group ? *reinterpret_cast<const uint32_t*>(from + element + 8) : 0u;
#pragma unroll
        for (int i = 0; i < 4; i++) sum[k][i] = 0.f;
      }
      top[0] = top[1] = -FLT_MAX;  // not -inf: two of those would subtract to NaN
      total[0] = total[1] = 0.f;
    }

    wait_copies<X::kStages - 2>();
    __syncwarp();  // all lanes have what they asked for, and are done with the tile before
    if (fetched < end) {
      fetch(ahead, stage == 0 ? X::kStages - 1 : stage - 1);
      if (++fetched < end) advance(ahead), ask(ahead);
    } else {
      commit_copies();
    }
    const int start = (now.span.first + now.tile) * kTile + warp * kStep;
    if (start < now.span.end && start + kStep > now.span.begin) {
      const uint32_t keys = ring + stage * X::kStage, values = keys + X::kHalf;
      // Lane l gives row l % 16 of the matrices' left (l < 16) or right half.
      const uint32_t mine = lane % 16 * X::kPitch + lane / 16 * 16;
      float score[4] = {}, odd[4] = {};  // two sums, so that a product need not wait for the one before
#pragma unroll
      for (int k = 0; k < D / 16; k++) {
        uint32_t a[4];
        load_matrices(a, keys + mine + k * 32);
        multiply(k % 2 ? odd : score, a, q[k][0], q[k][1]);
      }
      // A lane has tokens start + lane / 4 and 8 more, of columns lane % 4 * 2 and the next.
      float highest[2] = {top[0], top[1]};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int token = start + lane / 4 + i / 2 * 8;
        const bool seen = token >= now.span.begin && token < now.span.end;
        score[i] = seen ? (score[i] + odd[i]) * (p.scale * kLog2e) : -INFINITY;
        highest[i % 2] = fmaxf(highest[i % 2], score[i]);
      }
      float shrink[2];
#pragma unroll
      for (int c = 0; c < 2; c++) {
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2)
          highest[c] = fmaxf(highest[c], __shfl_xor_sync(kAll, highest[c], offset));
        shrink[c] = exp2f(top[c] - highest[c]);
        top[c] = highest[c];
        total[c] *= shrink[c];
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        score[i] = exp2f(score[i] - highest[i % 2]);
        total[i % 2] += score[i];  // of this lane's tokens; the lanes are summed where the head ends
      }
      if (__any_sync(kAll, shrink[0] != 1.f || shrink[1] != 1.f)) {
#pragma unroll
        for (int k = 0; k < D / 16; k++)
#pragma unroll
          for (int i = 0; i < 4; i++) sum[k][i] *= shrink[i % 2];
      }
      const uint32_t w0 = transposed(pack(score[0], score[1])), w1 = transposed(pack(score[2], score[3]));
      const uint32_t turned = (lane % 8 + lane / 16 * 8) * X::kPitch + lane / 8 % 2 * 16;
#pragma unroll
      for (int k = 0; k < D / 16; k++) {
        uint32_t a[4];
        load_transposed(a, values + turned + k * 32);
        multiply(sum[k], a, w0, w1);
      }
    }
    stage = stage + 1 == X::kStages ? 0 : stage + 1;

    const Cursor done = now;
    const bool head_ends = done.tile + 1 == done.span.count;
    if (item + 1 < end) advance(now);
    if (!head_ends && item + 1 < end) continue;

    // The thread block's part of the head is over: merge the warps'.
    const int64_t head_begin = int64_t(p.plan[done.sequence]) * p.kv_heads + int64_t(done.head) * done.span.count;
    const int64_t head_end = head_begin + done.span.count;
    first_of_head = item + 1;
#pragma unroll
    for (int c = 0; c < 2; c++) {
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) total[c] += __shfl_xor_sync(kAll, total[c], offset);
      if (lane / 4 == 0) {
        tops[warp * kColumns + lane % 4 * 2 + c] = top[c];
        totals[warp * kColumns + lane % 4 * 2 + c] = total[c];
      }
    }
    __syncthreads();
    float shrink[2];
#pragma unroll
    for (int c = 0; c < 2; c++) {
      float highest = -FLT_MAX;
#pragma unroll
      for (int w = 0; w < kWarps; w++) highest = fmaxf(highest, tops[w * kColumns + lane % 4 * 2 + c]);
      shrink[c] = exp2f(top[c] - highest);
    }
    const int owner = int(((head_begin + 1) * blocks - 1) / tiles);  // thread block with the head's first tile
    const int last = int((head_end * blocks - 1) / tiles);
    const bool whole = owner == last;
    const int first_head = done.head * group + first_in_group;
    const int count = min(kColumns, group - first_in_group);
    __nv_bfloat16* out = p.out + (int64_t(done.sequence) * p.heads + first_head) * D;
    float* partials = p.partial + int64_t(blockIdx.y) * gridDim.x * 2 * kColumns * (D + 2);
    float* partial = partials + (int64_t(blockIdx.x) * 2 + (int(blockIdx.x) == owner)) * kColumns * (D + 2);
    constexpr int kPass = X::kMerge / (kWarps * kColumns * 4);  // elements of D at a time
#pragma unroll
    for (int pass = 0; pass < D; pass += kPass) {
#pragma unroll
      for (int k = 0; k < D / 16; k++) {
        if (k * 16 < pass || k * 16 >= pass + kPass) continue;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int element = k * 16 - pass + lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
          merge[(warp * kColumns + column) * kPass + element] = sum[k][i] * shrink[i % 2];
        }
      }
      __syncthreads();
      const int width = min(kPass, D - pass);
      for (int i = threadIdx.x; i < kColumns * width; i += kThreads) {
        const int column = i / width, element = i % width;
        float all = 0.f, result = 0.f, highest = -FLT_MAX;
#pragma unroll
        for (int w = 0; w < kWarps; w++) {
          result += merge[(w * kColumns + column) * kPass + element];
          highest = fmaxf(highest, tops[w * kColumns + column]);
        }
#pragma unroll
        for (int w = 0; w < kWarps; w++)
          all += exp2f(tops[w * kColumns + column] - highest) * totals[w * kColumns + column];
        if (whole) {
          if (column < count) out[column * D + pass + element] = __float2bfloat16(all == 0.f ? 0.f : result / all);
        } else {
          __stcg(partial + column * (D + 2) + pass + element, result);
          if (pass + element == 0) {
            __stcg(partial + column * (D + 2) + D, highest);
            __stcg(partial + column * (D + 2) + D + 1, all);
          }
        }
      }
      __syncthreads();
    }
    if (whole) continue;

    // Whoever comes last has all parts before it.
    __shared__ int arrived;
    __threadfence();
    __syncthreads();
    int32_t* counter = p.arrived + (int64_t(blockIdx.y) * p.sequences + done.sequence) * p.kv_heads + done.head;
    if (threadIdx.x == 0) arrived = atomicAdd(counter, 1);
    __syncthreads();
    if (arrived != last - owner) continue;
    __threadfence();
    if (threadIdx.x == 0) *counter = 0;
    for (int i = threadIdx.x; i < count * D; i += kThreads) {
      const int column = i / D, element = i % D;
      float highest = -FLT_MAX, all = 0.f, result = 0.f;
      for (int b = owner; b <= last; b++) {
        const float* part = partials + ((int64_t(b) * 2 + (b == owner)) * kColumns + column) * (D + 2);
        const float part_top = __ldcg(part + D);
        const float higher = fmaxf(highest, part_top);
        const float mine = exp2f(highest - higher), theirs = exp2f(part_top - higher);
        highest = higher;
        all = all * mine + __ldcg(part + D + 1) * theirs;
        result = result * mine + __ldcg(part + element) * theirs;
      }
      out[column * D + element] = __float2bfloat16(all == 0.f ? 0.f : result / all);
    }
    __syncthreads();  // before `arrived` is written again
  }
}

template <int D>
int launch(const Problem& p, int blocks, cudaStream_t stream) {
  constexpr int bytes = Layout<D>::kBytes;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(split_decode<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (allowed != cudaSuccess) return allowed;
  const int parts = baton::ceil_div(p.heads / p.kv_heads, kColumns);
  split_decode<D><<<dim3(blocks, parts), kThreads, bytes, stream>>>(p);
  return cudaGetLastError();
}

// One thread block. starts[s]: tiles of one head before sequence s; firsts[b]: the sequence in which run b begins.
__global__ void __launch_bounds__(1024) plan_runs(const int32_t* context_lens, int32_t* starts, int sequences,
                                                  int kv_heads, int window, int blocks) {
  __shared__ int before[32], total;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) total = 0;
  for (int base = 0; base < sequences; base += blockDim.x) {
    const int s = base + threadIdx.x;
    const int count = s < sequences ? span_of(context_lens[s], window).count : 0;
    int sum = count;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(kAll, sum, offset);
      if (lane >= offset) sum += other;
    }
    __syncthreads();
    if (lane == 31) before[warp] = sum;
    __syncthreads();
    int earlier = total;
    for (int w = 0; w < warp; w++) earlier += before[w];
    if (s < sequences) starts[s] = earlier + sum - count;
    __syncthreads();
    if (threadIdx.x == blockDim.x - 1) total = earlier + sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) starts[sequences] = total;
  __syncthreads();
  const int64_t tiles = int64_t(total) * kv_heads, runs = min(int64_t(blocks), tiles);
  for (int b = threadIdx.x; b < runs; b += blockDim.x) {
    const int64_t begin = tiles * b / runs;
    int low = 0, high = sequences - 1;  // the last sequence that begins at or before it
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (int64_t(starts[middle]) * kv_heads <= begin) low = middle;
      else high = middle - 1;
    }
    starts[sequences + 1 + b] = low;
  }
}

}  // namespace

BATON_EXPORT int plan_split_decode(const int32_t* context_lens, int32_t* plan, int sequences, int kv_heads, int window,
                                   int blocks, cudaStream_t stream) {
  if (sequences == 0) return cudaSuccess;
  if (sequences < 0 || kv_heads <= 0 || blocks <= 0) return cudaErrorInvalidValue;
  plan_runs<<<1, 1024, 0, stream>>>(context_lens, plan, sequences, kv_heads, window, blocks);
  return cudaGetLastError();
}

// Block sizes are multiples of 16. Table entries past a sequence's context are not read. `blocks` as the plan has it.
BATON_EXPORT int split_decode_attention(const void* q, const void* pool, const int32_t* block_tables,
                                        const int32_t* context_lens, void* out, const int32_t* plan, float* partial,
                                        int32_t* arrived, int64_t q_stride, int sequences, int heads, int kv_heads,
                                        int head_size, int block_tokens, int layers, int layer, int table_stride,
                                        int window, int blocks, float scale, cudaStream_t stream) {
  if (sequences == 0) return cudaSuccess;
  if (sequences < 0 || kv_heads <= 0 || heads % kv_heads != 0 || block_tokens % 16 != 0 || blocks <= 0)
    return cudaErrorInvalidValue;
  const Problem p{static_cast<const __nv_bfloat16*>(q),
                  static_cast<const __nv_bfloat16*>(pool),
                  block_tables,
                  context_lens,
                  static_cast<__nv_bfloat16*>(out),
                  plan,
                  partial,
                  arrived,
                  q_stride,
                  sequences,
                  heads,
                  kv_heads,
                  block_tokens,
                  layers,
                  layer,
                  table_stride,
                  window,
                  scale};
  switch (head_size) {
    case 64: return launch<64>(p, blocks, stream);
    case 80: return launch<80>(p, blocks, stream);
    case 96: return launch<96>(p, blocks, stream);
    case 128: return launch<128>(p, blocks, stream);
    default: return cudaErrorInvalidValue;
  }
}
