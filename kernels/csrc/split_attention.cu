// split_decode_attention: as paged_decode_attention, on tensor cores and split along the keys. bfloat16.
//   q, out [S, Q, H, D]    pool [N, L, 2, G, P, D]    block_tables [S, B] int32    context_lens [S] int32, the Q included
// All keys of a step are cut into tiles, for each sequence and KV head, and the tiles laid in a row:
//     sequence 0: head 0: tile 0 1 2 | head 1: tile 0 1 2 | ... | sequence 1: head 0: tile 0 | ...
// The row is cut into runs (Stream-K, Osama et al., PPoPP 2023): one for each thread block, equal whatever the lengths
// are; where they are long, the last eighth of the row is cut into short ones, taken by whoever is done first, since
// multiprocessors do not read equally fast. Where a run ends inside a head's tiles, partial results go to a workspace,
// and the last to arrive of that head's merges them, always in the same order (split-K decoding as in FlashDecoding, Dao
// et al., 2023). A plan, made once for all layers of a step, says where runs begin.
//
// The queries that share a KV head, H / G heads of each of Q tokens, are columns, 8 to a block of the tensor cores:
//     scores^T [16 tokens, 8 columns]  = K [16 tokens, D] q^T [D, 8 columns]
//     sum^T    [D, 8 columns]         += V^T [D, 16 tokens] weights^T [16 tokens, 8 columns]
// A thread block serves kBlocks of them; where there are more, others read the same keys for the rest (blockIdx.y).
// A warp takes 16 tokens of each tile, through its own ring of shared memory filled by asynchronous copies, so warps
// wait for each other only where a head ends. Softmax is online (Milakov and Gimelshein, 2018), in base 2 and float32;
// weights are rounded to bfloat16.
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
constexpr int kColumns = 8;    // of one block of the tensor cores
constexpr int kShortRun = 6;   // tiles, at least: more than a ring holds ahead
constexpr float kLog2e = 1.4426950408889634f;
constexpr unsigned kAll = 0xffffffffu;

// As many warps as find room for their rings.
constexpr int warps_for(int head_size) {
  constexpr int kMost = baton::kSharedBytes < (128 << 10) ? 4 : 8;
  return head_size > 128 ? kMost / 2 : kMost;
}

struct Problem {
  const __nv_bfloat16* q;
  const __nv_bfloat16* pool;
  const int32_t* block_tables;
  const int32_t* context_lens;
  __nv_bfloat16* out;
  const int32_t* plan;       // see plan_runs
  float* partial;            // [parts][runs][2][kBlocks * kColumns][D + 2]: sum, then top and total
  int32_t* arrived;          // [parts][2 + S * G], zeros between launches: next short run, thread blocks done, of heads
  const float* slopes;       // [H] ALiBi (Press et al., 2022), or null
  int64_t q_stride;          // elements between two tokens' queries
  int sequences, tokens, heads, kv_heads, block_tokens, layers, layer, table_stride;
  int window;                // a query sees the newest `window` tokens up to itself; 0: all
  int most_runs;             // that the workspace has room for
  float scale, soft_cap;     // scores become cap * tanh(score / cap); 0: they stay
};

// Tiles of a sequence: those that hold a token which is seen, and one at least, so that every row of `out` is written.
struct Span {
  int begin, end;   // tokens
  int first, count; // tiles
};

__device__ __forceinline__ Span span_of(int length, int tokens, int window, int tile) {
  const int begin = window > 0 ? max(0, length - tokens + 1 - window) : 0;
  const int first = begin / tile;
  return {begin, length, first, max(1, (length + tile - 1) / tile - first)};
}

// How the row of tiles is cut: `blocks` equal runs of the first `fixed` tiles, then short ones.
struct Cut {
  int64_t tiles, fixed;
  int blocks, grain;

  __device__ int64_t begin(int run) const {
    return run < blocks ? fixed * run / blocks : min(tiles, fixed + int64_t(run - blocks) * grain);
  }
  __device__ int run_of(int64_t tile) const {
    return tile < fixed ? int(((tile + 1) * blocks - 1) / fixed) : blocks + int((tile - fixed) / grain);
  }
  __device__ int runs() const { return blocks + int((tiles - fixed + grain - 1) / grain); }
};

__device__ __forceinline__ Cut cut_of(int64_t tiles, int blocks, int most_runs) {
  blocks = int(min(int64_t(blocks), tiles));  // each has a tile at least
  const int64_t per_block = tiles / max(blocks, 1);
  if (per_block < 4 * kShortRun || most_runs <= blocks) return {tiles, tiles, blocks, kShortRun};
  const int64_t rest = tiles / 8, most = most_runs - blocks;
  const int64_t grain = max(max(int64_t(kShortRun), per_block / 64), (rest + most - 1) / most);
  return {tiles, tiles - rest, blocks, int(grain)};
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

template <int D, int kBlocks>
struct Layout {
  static constexpr int kWarps = warps_for(D);
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kTile = kWarps * kStep;
  static constexpr int kAll = kBlocks * kColumns;        // columns of a thread block
  static constexpr int kVecs = D / 8;                    // 16-byte vectors in one token
  static constexpr int kPitch = D * 2 + 16;              // bytes; an odd number of vectors, so 8 rows meet no bank twice
  static constexpr int kHalf = kStep * kPitch;           // K, then V
  static constexpr int kStage = 2 * kHalf;               // of one warp
  static constexpr int kRoom = baton::kSharedBytes - (20 << 10);  // for all rings
  static constexpr int kStages = kRoom / (kWarps * kStage) < 6 ? kRoom / (kWarps * kStage) : 6;
  static constexpr int kMergeRows = 16 * 1024 / (kWarps * kColumns * 4);  // of D, summed over warps at a time
  static constexpr int kPass = kMergeRows < D ? kMergeRows : D;
  static constexpr int kMerge = kWarps * kColumns * kPass * 4;
  static constexpr int kBytes = kStages * kWarps * kStage + kMerge + kWarps * kAll * 8;
  static_assert(D % 16 == 0 && kStages >= 2 && kStages <= kShortRun + 1 && kBytes <= baton::kSharedBytes);
};

// Walks a warp's tiles: sequence after sequence, head after head.
struct Cursor {
  Span span;
  int sequence, head, tile;
  int block;  // of this warp's tokens, asked for a tile ahead
};

// kBlocks: of columns. kPlain: one token a sequence, scores as they are.
template <int D, int kBlocks, bool kPlain>
__global__ void __launch_bounds__(Layout<D, kBlocks>::kThreads, 1) split_decode(const Problem p) {
  using X = Layout<D, kBlocks>;
  constexpr int kWarps = X::kWarps;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ int upcoming, arrived;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = p.heads / p.kv_heads;
  const int tokens = kPlain ? 1 : p.tokens, columns = group * tokens, first_column = blockIdx.y * X::kAll;
  int32_t* counters = p.arrived + int64_t(blockIdx.y) * (2 + int64_t(p.sequences) * p.kv_heads);
  const Cut cut = cut_of(int64_t(p.plan[p.sequences]) * p.kv_heads, gridDim.x, p.most_runs);
  const int32_t* firsts = p.plan + p.sequences + 1;  // sequence in which each run begins
  const int runs = cut.runs();
  const bool shares = runs > cut.blocks;  // there are short runs

  const int64_t plane = int64_t(p.kv_heads) * p.block_tokens * D;  // from a token's K to its V
  const int64_t block_stride = int64_t(p.layers) * 2 * plane;
  const __nv_bfloat16* pool = p.pool + int64_t(p.layer) * 2 * plane;
  const uint32_t ring = uint32_t(__cvta_generic_to_shared(shared)) + warp * X::kStages * X::kStage;
  float* merge = reinterpret_cast<float*>(shared + X::kStages * kWarps * X::kStage);
  float* tops = merge + X::kMerge / 4;
  float* totals = tops + kWarps * X::kAll;

  const auto ask = [&](Cursor& c) {
    const int start = (c.span.first + c.tile) * X::kTile + warp * kStep;
    if (start < c.span.end) c.block = p.block_tables[int64_t(c.sequence) * p.table_stride + start / p.block_tokens];
  };
  const auto at = [&](int run) {
    Cursor c;
    c.sequence = firsts[run];
    c.span = span_of(p.context_lens[c.sequence], tokens, p.window, X::kTile);
    const int within = int(cut.begin(run) - int64_t(p.plan[c.sequence]) * p.kv_heads);
    c.head = within / c.span.count;
    c.tile = within % c.span.count;
    return c;
  };
  const auto advance = [&](Cursor& c) {  // not past the last tile
    if (++c.tile < c.span.count) return;
    c.tile = 0;
    if (++c.head < p.kv_heads) return;
    c.head = 0;
    c.span = span_of(p.context_lens[++c.sequence], tokens, p.window, X::kTile);
  };
  const auto fetch = [&](const Cursor& c, int stage) {
    const int start = (c.span.first + c.tile) * X::kTile + warp * kStep;
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
  };

  int run = blockIdx.x;
  if (run < cut.blocks) {
    if (threadIdx.x == 0 && shares) upcoming = cut.blocks + atomicAdd(counters, 1);
    if (shares) __syncthreads();
    int next = shares ? upcoming : runs;  // the run after this one; none from `runs` on
    if (shares) __syncthreads();  // before it is written again
    int claimed = 0;

    // Tiles are fetched kStages - 1 before they are used, from the next run where this one ends.
    Cursor ahead = at(run), now = ahead;
    ask(ahead);
    int64_t item = cut.begin(run), end = cut.begin(run + 1), fetched = item, fetch_end = end;
    bool in_next = false;
    const auto enter_next = [&] {
      if (fetched < fetch_end || in_next || next >= runs) return;
      in_next = true;
      ahead = at(next);
      ask(ahead);
      fetched = cut.begin(next);
      fetch_end = cut.begin(next + 1);
    };
    const auto fetch_one = [&](int stage) {
      enter_next();  // where a run was no longer than the ring
      if (fetched < fetch_end) {
        fetch(ahead, stage);
        if (++fetched < fetch_end) {
          advance(ahead);
          ask(ahead);
        } else {
          enter_next();
        }
      }
      commit_copies();
    };
#pragma unroll
    for (int stage = 0; stage < X::kStages - 1; stage++) fetch_one(stage);

    uint32_t q[kBlocks][D / 16][2];
    float sum[kBlocks][D / 16][4], top[kBlocks][2], total[kBlocks][2];
    int stage = 0;
    int64_t first_of_head = item;  // tile at which this run's part of the head begins
    while (true) {
      if (item == first_of_head) {
#pragma unroll
        for (int b = 0; b < kBlocks; b++) {
          const int column = first_column + b * kColumns + lane / 4;
          const __nv_bfloat16* from =
              p.q + (int64_t(now.sequence) * tokens + (kPlain ? 0 : column / group)) * p.q_stride +
              int64_t(now.head * group + (kPlain ? column : column % group)) * D;
#pragma unroll
          for (int k = 0; k < D / 16; k++) {
            const int element = k * 16 + lane % 4 * 2;
            q[b][k][0] = column < columns ? *reinterpret_cast<const uint32_t*>(from + element) : 0u;
            q[b][k][1] = column < columns ? *reinterpret_cast<const uint32_t*>(from + element + 8) : 0u;
#pragma unroll
            for (int i = 0; i < 4; i++) sum[b][k][i] = 0.f;
          }
          top[b][0] = top[b][1] = -FLT_MAX;  // not -inf: two of those would subtract to NaN
          total[b][0] = total[b][1] = 0.f;
        }
      }

      wait_copies<X::kStages - 2>();
      __syncwarp();  // all lanes have what they asked for, and are done with the tile before
      fetch_one(stage == 0 ? X::kStages - 1 : stage - 1);
      if (shares && item + 1 == end && threadIdx.x == 0) claimed = atomicAdd(counters, 1);
      const int start = (now.span.first + now.tile) * X::kTile + warp * kStep;
      if (start < now.span.end && start + kStep > now.span.begin) {
        const uint32_t keys = ring + stage * X::kStage, values = keys + X::kHalf;
        // Lane l gives row l % 16 of the matrices' left (l < 16) or right half.
        const uint32_t mine = lane % 16 * X::kPitch + lane / 16 * 16;
        float score[kBlocks][4] = {}, odd[kBlocks][4] = {};  // two sums, so that a product need not wait for the last
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
          uint32_t a[4];
          load_matrices(a, keys + mine + k * 32);
#pragma unroll
          for (int b = 0; b < kBlocks; b++) multiply(k % 2 ? odd[b] : score[b], a, q[b][k][0], q[b][k][1]);
        }
        uint32_t weight[kBlocks][2];
#pragma unroll
        for (int b = 0; b < kBlocks; b++) {
          // A lane has tokens start + lane / 4 and 8 more, of columns lane % 4 * 2 and the next.
          float highest[2] = {top[b][0], top[b][1]};
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int token = start + lane / 4 + i / 2 * 8;
            bool seen = token >= now.span.begin && token < now.span.end;
            float value = (score[b][i] + odd[b][i]) * p.scale;
            if constexpr (!kPlain) {
              const int column = first_column + b * kColumns + lane % 4 * 2 + i % 2;
              const int asks = now.span.end - tokens + column / group;  // the query's own position
              seen = seen && token <= asks && (p.window == 0 || token > asks - p.window);
              if (p.soft_cap > 0.f) value = p.soft_cap * tanhf(value / p.soft_cap);
              if (p.slopes != nullptr && column < columns)
                value += p.slopes[now.head * group + column % group] * float(token - asks);
            }
            score[b][i] = seen ? value * kLog2e : -INFINITY;
            highest[i % 2] = fmaxf(highest[i % 2], score[b][i]);
          }
          float shrink[2];
#pragma unroll
          for (int c = 0; c < 2; c++) {
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2)
              highest[c] = fmaxf(highest[c], __shfl_xor_sync(kAll, highest[c], offset));
            shrink[c] = exp2f(top[b][c] - highest[c]);
            top[b][c] = highest[c];
            total[b][c] *= shrink[c];
          }
#pragma unroll
          for (int i = 0; i < 4; i++) {
            score[b][i] = exp2f(score[b][i] - highest[i % 2]);
            total[b][i % 2] += score[b][i];  // of this lane's tokens; the lanes are summed where the head ends
          }
          if (__any_sync(kAll, shrink[0] != 1.f || shrink[1] != 1.f)) {
#pragma unroll
            for (int k = 0; k < D / 16; k++)
#pragma unroll
              for (int i = 0; i < 4; i++) sum[b][k][i] *= shrink[i % 2];
          }
          weight[b][0] = transposed(pack(score[b][0], score[b][1]));
          weight[b][1] = transposed(pack(score[b][2], score[b][3]));
        }
        const uint32_t turned = (lane % 8 + lane / 16 * 8) * X::kPitch + lane / 8 % 2 * 16;
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
          uint32_t a[4];
          load_transposed(a, values + turned + k * 32);
#pragma unroll
          for (int b = 0; b < kBlocks; b++) multiply(sum[b][k], a, weight[b][0], weight[b][1]);
        }
      }
      stage = stage + 1 == X::kStages ? 0 : stage + 1;

      const Cursor done = now;
      const bool head_ends = done.tile + 1 == done.span.count, run_ends = ++item == end;
      if (!run_ends) advance(now);
      if (!head_ends && !run_ends) continue;

      // The run's part of the head is over: merge the warps'.
      const int64_t head_begin = int64_t(p.plan[done.sequence]) * p.kv_heads + int64_t(done.head) * done.span.count;
      const int64_t head_end = head_begin + done.span.count;
      first_of_head = item;
      if (run_ends && threadIdx.x == 0) upcoming = cut.blocks + claimed;
#pragma unroll
      for (int b = 0; b < kBlocks; b++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
#pragma unroll
          for (int offset = 4; offset < 32; offset *= 2)
            total[b][c] += __shfl_xor_sync(kAll, total[b][c], offset);
          if (lane / 4 == 0) {
            tops[warp * X::kAll + b * kColumns + lane % 4 * 2 + c] = top[b][c];
            totals[warp * X::kAll + b * kColumns + lane % 4 * 2 + c] = total[b][c];
          }
        }
      __syncthreads();
      const int after = upcoming;
      const int owner = cut.run_of(head_begin), last = cut.run_of(head_end - 1);
      const bool whole = owner == last;
      const int count = min(X::kAll, columns - first_column);
      __nv_bfloat16* out = p.out + (int64_t(done.sequence) * tokens * p.heads + int64_t(done.head) * group) * D;
      const auto row_of = [&](int column) {  // of `out`
        column += first_column;
        return kPlain ? column : column / group * p.heads + column % group;
      };
      float* partials = p.partial + int64_t(blockIdx.y) * p.most_runs * 2 * X::kAll * (D + 2);
      float* partial = partials + (int64_t(run) * 2 + (run == owner)) * X::kAll * (D + 2);
#pragma unroll
      for (int b = 0; b < kBlocks; b++) {
        float shrink[2];
#pragma unroll
        for (int c = 0; c < 2; c++) {
          float highest = -FLT_MAX;
#pragma unroll
          for (int w = 0; w < kWarps; w++)
            highest = fmaxf(highest, tops[w * X::kAll + b * kColumns + lane % 4 * 2 + c]);
          shrink[c] = exp2f(top[b][c] - highest);
        }
#pragma unroll
        for (int pass = 0; pass < D; pass += X::kPass) {
#pragma unroll
          for (int k = 0; k < D / 16; k++) {
            if (k * 16 < pass || k * 16 >= pass + X::kPass) continue;
#pragma unroll
            for (int i = 0; i < 4; i++) {
              const int element = k * 16 - pass + lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
              merge[(warp * kColumns + column) * X::kPass + element] = sum[b][k][i] * shrink[i % 2];
            }
          }
          __syncthreads();
          const int width = min(X::kPass, D - pass);
          for (int i = threadIdx.x; i < kColumns * width; i += X::kThreads) {
            const int in_block = i / width, element = i % width, column = b * kColumns + in_block;
            float all = 0.f, result = 0.f, highest = -FLT_MAX;
#pragma unroll
            for (int w = 0; w < kWarps; w++) {
              result += merge[(w * kColumns + in_block) * X::kPass + element];
              highest = fmaxf(highest, tops[w * X::kAll + column]);
            }
#pragma unroll
            for (int w = 0; w < kWarps; w++)
              all += exp2f(tops[w * X::kAll + column] - highest) * totals[w * X::kAll + column];
            if (whole) {
              if (column < count)
                out[int64_t(row_of(column)) * D + pass + element] = __float2bfloat16(all == 0.f ? 0.f : result / all);
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
      }
      if (!whole) {
        // Whoever comes last has all parts before it.
        __threadfence();
        __syncthreads();
        int32_t* counter = counters + 2 + int64_t(done.sequence) * p.kv_heads + done.head;
        if (threadIdx.x == 0) arrived = atomicAdd(counter, 1);
        __syncthreads();
        if (arrived == last - owner) {
          __threadfence();
          if (threadIdx.x == 0) *counter = 0;
          for (int i = threadIdx.x; i < count * D; i += X::kThreads) {
            const int column = i / D, element = i % D;
            float highest = -FLT_MAX, all = 0.f, result = 0.f;
            for (int r = owner; r <= last; r++) {
              const float* part = partials + ((int64_t(r) * 2 + (r == owner)) * X::kAll + column) * (D + 2);
              const float part_top = __ldcg(part + D);
              const float higher = fmaxf(highest, part_top);
              const float mine = exp2f(highest - higher), theirs = exp2f(part_top - higher);
              highest = higher;
              all = all * mine + __ldcg(part + D + 1) * theirs;
              result = result * mine + __ldcg(part + element) * theirs;
            }
            out[int64_t(row_of(column)) * D + element] = __float2bfloat16(all == 0.f ? 0.f : result / all);
          }
        }
        __syncthreads();  // before `arrived` is written again
      }
      if (!run_ends) continue;
      if (next >= runs) break;
      run = next;
      next = after;
      now = at(run);
      item = cut.begin(run);
      end = cut.begin(run + 1);
      first_of_head = item;
      in_next = false;
    }
  }
  // The last thread block to end leaves the counters as it found them.
  if (threadIdx.x == 0 && shares) {
    __threadfence();
    if (atomicAdd(counters + 1, 1) == int(gridDim.x) - 1) counters[0] = counters[1] = 0;
  }
}

template <int D, int kBlocks, bool kPlain>
int launch(const Problem& p, int blocks, cudaStream_t stream) {
  using X = Layout<D, kBlocks>;
  const cudaError_t allowed =  // of the device that is current, so each time
      cudaFuncSetAttribute(split_decode<D, kBlocks, kPlain>, cudaFuncAttributeMaxDynamicSharedMemorySize, X::kBytes);
  if (allowed != cudaSuccess) return allowed;
  const int parts = baton::ceil_div(p.heads / p.kv_heads * p.tokens, X::kAll);
  split_decode<D, kBlocks, kPlain><<<dim3(blocks, parts), X::kThreads, X::kBytes, stream>>>(p);
  return cudaGetLastError();
}

template <int D>
int launch(const Problem& p, int blocks, cudaStream_t stream) {
  constexpr int kMost = D <= 80 ? 4 : D <= 128 ? 2 : 1;  // whose sums and queries fit into a thread's registers
  const int columns = p.heads / p.kv_heads * p.tokens;
  if (columns > kColumns && kMost > 1) return launch<D, kMost, false>(p, blocks, stream);
  const bool plain = p.tokens == 1 && p.soft_cap == 0.f && p.slopes == nullptr;
  return plain ? launch<D, 1, true>(p, blocks, stream) : launch<D, 1, false>(p, blocks, stream);
}

// One thread block. plan: [S + 1] tiles of one head before each sequence | [runs] sequence in which each run begins.
__global__ void __launch_bounds__(1024) plan_runs(const int32_t* context_lens, int32_t* starts, int sequences,
                                                  int tokens, int kv_heads, int window, int tile, int blocks,
                                                  int most_runs) {
  __shared__ int before[32], total;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) total = 0;
  for (int base = 0; base < sequences; base += blockDim.x) {
    const int s = base + threadIdx.x;
    const int count = s < sequences ? span_of(context_lens[s], tokens, window, tile).count : 0;
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
  const Cut cut = cut_of(int64_t(total) * kv_heads, blocks, most_runs);
  for (int run = threadIdx.x; run < cut.runs(); run += blockDim.x) {
    const int64_t begin = cut.begin(run);
    int low = 0, high = sequences - 1;  // the last sequence that begins at or before it
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (int64_t(starts[middle]) * kv_heads <= begin) low = middle;
      else high = middle - 1;
    }
    starts[sequences + 1 + run] = low;
  }
}

}  // namespace

// most_runs: that plan and workspace have room for; no fewer than `blocks`.
BATON_EXPORT int plan_split_decode(const int32_t* context_lens, int32_t* plan, int sequences, int tokens, int kv_heads,
                                   int head_size, int window, int blocks, int most_runs, cudaStream_t stream) {
  if (sequences == 0) return cudaSuccess;
  if (sequences < 0 || tokens <= 0 || kv_heads <= 0 || blocks <= 0 || most_runs < blocks) return cudaErrorInvalidValue;
  plan_runs<<<1, 1024, 0, stream>>>(context_lens, plan, sequences, tokens, kv_heads, window,
                                    warps_for(head_size) * kStep, blocks, most_runs);
  return cudaGetLastError();
}

// Block sizes are multiples of 16. Table entries past a sequence's context are not read. `blocks`, `most_runs`, `tokens`
// as the plan has them. slopes: null, or ALiBi's; soft_cap: 0, or the cap.
BATON_EXPORT int split_decode_attention(const void* q, const void* pool, const int32_t* block_tables,
                                        const int32_t* context_lens, void* out, const int32_t* plan, float* partial,
                                        int32_t* arrived, const float* slopes, int64_t q_stride, int sequences,
                                        int tokens, int heads, int kv_heads, int head_size, int block_tokens,
                                        int layers, int layer, int table_stride, int window, int blocks, int most_runs,
                                        float scale, float soft_cap, cudaStream_t stream) {
  if (sequences == 0) return cudaSuccess;
  if (sequences < 0 || tokens <= 0 || kv_heads <= 0 || heads % kv_heads != 0 || block_tokens % 16 != 0 || blocks <= 0 ||
      most_runs < blocks)
    return cudaErrorInvalidValue;
  const Problem p{static_cast<const __nv_bfloat16*>(q),
                  static_cast<const __nv_bfloat16*>(pool),
                  block_tables,
                  context_lens,
                  static_cast<__nv_bfloat16*>(out),
                  plan,
                  partial,
                  arrived,
                  slopes,
                  q_stride,
                  sequences,
                  tokens,
                  heads,
                  kv_heads,
                  block_tokens,
                  layers,
                  layer,
                  table_stride,
                  window,
                  most_runs,
                  scale,
                  soft_cap};
  switch (head_size) {
    case 64: return launch<64>(p, blocks, stream);
    case 80: return launch<80>(p, blocks, stream);
    case 96: return launch<96>(p, blocks, stream);
    case 128: return launch<128>(p, blocks, stream);
    case 256: return launch<256>(p, blocks, stream);
    default: return cudaErrorInvalidValue;
  }
}
