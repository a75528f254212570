// split_decode_attention: as paged_decode_attention, on tensor cores and split along the keys. bfloat16.
//   q, out [S, Q, H, D]    pool [N, L, 2, G, P, D]    block_tables [S, B] int32    context_lens [S] int32, Q included
// The keys of each KV head are cut into tiles, and the tiles of all sequences laid in a row, the same for every head:
//     sequence 0: tile 0 1 2 | sequence 1: tile 0 | ...
// The row is cut into runs (Stream-K, Osama et al., PPoPP 2023), equal whatever the lengths are, and there is a thread
// block for each run and head. Thread blocks that follow each other have the same run of different heads, so that all
// of a block's K and V, which lie together, are read at about the same time; 4 KB here and there are not read as fast.
// Where runs are long, the last eighth of the row is cut into short ones, taken by whoever is done first, since
// multiprocessors do not read equally fast. Where a run ends inside a sequence, partial results go to a workspace, and
// the last to arrive of that sequence and head merges them, always in the same order (split-K decoding as in
// FlashDecoding, Dao et al., 2023). A plan, made once for all layers of a step, says where runs begin.
//
// The queries that share a KV head, H / G heads of each of Q tokens, are columns, 8 to a block of the tensor cores:
//     scores^T [16 tokens, 8 columns]  = K [16 tokens, D] q^T [D, 8 columns]
//     sum^T    [D, 8 columns]         += V^T [D, 16 tokens] weights^T [16 tokens, 8 columns]
// A thread block serves kBlocks of them; where there are more, others read the same keys for the rest (blockIdx.y).
// A warp takes 16 tokens of each tile, through its own ring of shared memory, so warps wait for each other only where a
// sequence ends. Softmax is online (Milakov and Gimelshein, 2018), in base 2 and float32; weights are rounded to
// bfloat16.
//
// Rings are filled by the copy engine where there is one and heads are made of its atoms (hopper.cuh): one box for 16
// tokens of K, one for V. Else by asynchronous copies, rows a vector further apart than they are long. K and V of
// another type (e4m3 with a scale) would differ there, in the ring's size and where a warp loads its matrices.
//
// Bound by memory. The kernel begins while the one before it ends (launch.cuh): the plan, which lets nothing begin, has
// seen tables, lengths and the tokens of earlier steps written, so rings are filled before the wait, but for the 16
// tokens that hold one of this step.
#include "common.cuh"
#include "hopper.cuh"
#include "launch.cuh"
#include "pairs.cuh"
#include "ptx.cuh"

#include <cfloat>
#include <climits>

namespace {

using baton::commit_copies;
using baton::copy_16;
using baton::kAtom;
using baton::load_matrices;
using baton::load_transposed;
using baton::multiply;
using baton::pack;
using baton::transposed;
using baton::wait_copies;

constexpr int kStep = 16;        // tokens of one warp in a tile
constexpr int kColumns = 8;      // of one block of the tensor cores
constexpr int kMostStages = 6;   // of a ring. In brackets, here and below: values to be tried (2, 4)
constexpr int kShared = 8;       // one in so many tiles is in a short run (16),
constexpr int kLongRun = 16;     // where a run is so many short ones long (8, 32)
constexpr int kPartsAtOnce = 4;  // that a thread asks for when it merges (8)
constexpr float kLog2e = 1.4426950408889634f;
constexpr unsigned kAll = 0xffffffffu;

constexpr bool uses_boxes(int head_size) { return __CUDA_ARCH_LIST__ == 900 && head_size % 64 == 0; }

// As many warps as find room for their rings.
constexpr int warps_for(int head_size) {
  constexpr int kMost = baton::kSharedBytes < (128 << 10) ? 4 : 8;
  return head_size > 128 ? kMost / 2 : kMost;
}

constexpr int pitch_for(int head_size) {  // bytes of a token
  return head_size * 2 + (uses_boxes(head_size) ? 0 : 16);  // an odd number of vectors, so 8 rows meet no bank twice
}

constexpr int merge_bytes(int head_size) { return (uses_boxes(head_size) ? 33 : 17) << 10; }

constexpr int stages_for(int head_size) {
  const int stage = warps_for(head_size) * 2 * kStep * pitch_for(head_size);
  const int room = baton::kSharedBytes - merge_bytes(head_size) - (uses_boxes(head_size) ? 2 << 10 : 3 << 10);
  return room / stage < kMostStages ? room / stage : kMostStages;
}

struct Problem {
  const __nv_bfloat16* q;
  const __nv_bfloat16* pool;
  const int32_t* block_tables;
  const int32_t* context_lens;
  __nv_bfloat16* out;
  const int32_t* plan;       // see plan_runs
  float* partial;            // [parts][most_runs * G][2][kBlocks * kColumns][D + 4]: sum, then top and total
  int32_t* arrived;          // [parts][2 + S * G], zeros between launches: next short run, thread blocks done, of heads
  const float* slopes;       // [H] ALiBi (Press et al., 2022), or null
  int64_t q_stride;          // elements between two tokens' queries
  int sequences, tokens, heads, kv_heads, block_tokens, layers, layer, table_stride;
  int window;                // a query sees the newest `window` tokens up to itself; 0: all
  int most_runs;             // of a head, that the workspace has room for
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

// Where a run begins.
struct alignas(16) Begin {
  int sequence, tile, length;  // tile: of the sequence's; length: its tokens
};

// How the row of tiles is cut: `blocks` equal runs of the first `fixed` tiles, but that the first `longer` ones have
// one more, then short runs of `grain` tiles, the last of which takes what is left over.
struct Cut {
  int tiles, fixed, blocks, each, longer, grain, runs;

  __device__ int begin(int run) const {
    if (run >= runs) return tiles;
    return run < blocks ? run * each + min(run, longer) : fixed + (run - blocks) * grain;
  }
  __device__ int run_of(int tile) const {
    if (tile >= fixed) return min(runs - 1, blocks + (tile - fixed) / grain);
    const int of_longer = longer * (each + 1);
    return tile < of_longer ? tile / (each + 1) : longer + (tile - of_longer) / each;
  }
};

// shortest: tiles of a run that follows another; a ring's stages, so that it is never ahead by more than one run.
__device__ __forceinline__ Cut cut_of(int tiles, int blocks, int most_runs, int shortest) {
  blocks = min(blocks, tiles);  // each has a tile at least
  int rest = 0, grain = shortest;
  if (tiles / blocks >= kLongRun * shortest && most_runs > blocks) {
    rest = tiles / kShared;
    grain = max(max(shortest, tiles / blocks / 64), (rest + most_runs - blocks - 1) / (most_runs - blocks));
  }
  const int fixed = tiles - rest;
  return {tiles, fixed, blocks, fixed / blocks, fixed % blocks, grain, blocks + rest / grain};
}

template <int D, int kBlocks>
struct Layout {
  static constexpr bool kBoxes = uses_boxes(D);
  static constexpr int kWarps = warps_for(D);
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kTile = kWarps * kStep;
  static constexpr int kAll = kBlocks * kColumns;        // columns of a thread block
  static constexpr int kVecs = D / 8;                    // 16-byte vectors in one token
  static constexpr int kPitch = pitch_for(D);
  static constexpr int kDown = D / 64 * kAtom;           // bytes from 8 tokens to the next 8, of boxes
  static constexpr int kHalf = kStep * kPitch;           // K, then V
  static constexpr int kStage = 2 * kHalf;               // of one warp
  static constexpr int kStages = stages_for(D);
  static constexpr int kMergeRows = merge_bytes(D) / (kWarps * kColumns * 4) - 4;  // of D, merged at a time
  static constexpr int kPass = kMergeRows < D ? kMergeRows / 16 * 16 : D;
  static constexpr int kMergePitch = kPass / 32 * 32 + (kPass % 32 > 4 ? 36 : 4);  // so that columns meet no bank twice
  static constexpr int kMerge = kStages * kWarps * kStage;                         // where things begin
  static constexpr int kTops = kMerge + kWarps * kColumns * kMergePitch * 4;
  static constexpr int kBarriers = kTops + kWarps * kAll * 8;
  static constexpr int kWords = kBarriers + kWarps * kStages * 8;
  static constexpr int kBytes = kWords + 8;
  static_assert(D % 16 == 0 && kStages >= 2 && kBytes <= baton::kSharedBytes);
  static_assert(kTops - kMerge >= kThreads * 24);  // see the merging of parts
};

// Walks a warp's tiles: sequence after sequence of one head.
struct Cursor {
  Span span;
  int sequence, head, tile;
  int block;  // of this warp's tokens, asked for a tile ahead
};

// kBlocks: of columns. kPlain: one token a sequence, scores as they are.
template <int D, int kBlocks, bool kPlain>
__global__ void __launch_bounds__(Layout<D, kBlocks>::kThreads, 1)
    split_decode(const Problem p, const __grid_constant__ CUtensorMap kv_map) {
  using X = Layout<D, kBlocks>;
  constexpr int kWarps = X::kWarps;
  extern __shared__ __align__(1024) unsigned char shared[];
  baton::let_next_begin();
  int* words = reinterpret_cast<int*>(shared + X::kWords);
  int &upcoming = words[0], &arrived = words[1];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = p.heads / p.kv_heads;
  const int tokens = kPlain ? 1 : p.tokens, columns = group * tokens, first_column = blockIdx.y * X::kAll;
  int32_t* counters = p.arrived + int64_t(blockIdx.y) * (2 + int64_t(p.sequences) * p.kv_heads);
  const Begin* begins = reinterpret_cast<const Begin*>(p.plan);
  const Cut cut = cut_of(p.plan[p.most_runs * 4], gridDim.x / p.kv_heads, p.most_runs, X::kStages);
  const int units = cut.runs * p.kv_heads;    // a unit of work: a run of one head; heads first
  const int fixed_units = cut.blocks * p.kv_heads;
  const bool shares = units > fixed_units;  // there are short runs

  const int64_t plane = int64_t(p.kv_heads) * p.block_tokens * D;  // from a token's K to its V
  const int64_t block_stride = int64_t(p.layers) * 2 * plane;
  const __nv_bfloat16* pool = p.pool + int64_t(p.layer) * 2 * plane;
  const uint32_t start_of_shared = uint32_t(__cvta_generic_to_shared(shared));
  const uint32_t ring = start_of_shared + warp * X::kStages * X::kStage;
  const uint32_t barriers = start_of_shared + X::kBarriers + warp * X::kStages * 8;  // of this warp's stages
  float* merge = reinterpret_cast<float*>(shared + X::kMerge);
  float* tops = reinterpret_cast<float*>(shared + X::kTops);
  float* totals = tops + kWarps * X::kAll;

  const auto ask = [&](Cursor& c) {
    const int start = (c.span.first + c.tile) * X::kTile + warp * kStep;
    if (start < c.span.end) c.block = p.block_tables[int64_t(c.sequence) * p.table_stride + start / p.block_tokens];
  };
  const auto at = [&](int unit) {
    const Begin begin = begins[unit / p.kv_heads];
    return Cursor{span_of(begin.length, tokens, p.window, X::kTile), begin.sequence, unit % p.kv_heads, begin.tile, 0};
  };
  const auto advance = [&](Cursor& c) {  // not past the last tile
    if (++c.tile < c.span.count) return;
    c.tile = 0;
    c.span = span_of(p.context_lens[++c.sequence], tokens, p.window, X::kTile);
  };
  const auto fetch = [&](const Cursor& c, int stage) {
    const int start = (c.span.first + c.tile) * X::kTile + warp * kStep;
    const bool any = start < c.span.end && start + kStep > c.span.begin;
    const uint32_t to = ring + stage * X::kStage;
    if constexpr (X::kBoxes) {
      if (lane != 0) return;
      if (!any) return baton::arrive(barriers + stage * 8);
      const int row = (c.block * p.layers + p.layer) * 2 * p.kv_heads + c.head, eighth = start % p.block_tokens / 8;
      baton::arrive_expecting(barriers + stage * 8, X::kStage);
      baton::copy_box(to, &kv_map, barriers + stage * 8, 0, 0, 0, eighth, row);
      baton::copy_box(to + X::kHalf, &kv_map, barriers + stage * 8, 0, 0, 0, eighth, row + p.kv_heads);
    } else if (any) {
      const __nv_bfloat16* keys = pool + c.block * block_stride +
                                  (int64_t(c.head) * p.block_tokens + start % p.block_tokens) * D;
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

  if (X::kBoxes && lane == 0) {
    baton::prefetch_map(&kv_map);
    for (int stage = 0; stage < X::kStages; stage++) baton::init_barrier(barriers + stage * 8, 1);
    baton::publish_barriers();
  }
  __syncwarp();
  int unit = blockIdx.x;
  if (unit < fixed_units) {
    // Tiles are fetched kStages before they are used, from the next unit where this one ends.
    Cursor ahead = at(unit), now = ahead;
    ask(ahead);
    int item = cut.begin(unit / p.kv_heads), end = cut.begin(unit / p.kv_heads + 1), fetched = item, fetch_end = end;
    int next = units, claimed = 0;  // the unit after this one; none from `units` on
    bool in_next = false;
    const auto enter_next = [&] {
      if (fetched < fetch_end || in_next || next >= units) return;
      in_next = true;
      ahead = at(next);
      ask(ahead);
      fetched = cut.begin(next / p.kv_heads);
      fetch_end = cut.begin(next / p.kv_heads + 1);
    };
    const auto fetch_one = [&](int stage) {
      enter_next();
      if (fetched < fetch_end) {
        fetch(ahead, stage);
        if (++fetched < fetch_end) {
          advance(ahead);
          ask(ahead);
        } else {
          enter_next();
        }
      }
      if constexpr (!X::kBoxes) commit_copies();
    };
#pragma unroll
    for (int stage = 0; stage < X::kStages; stage++) {
      const int beyond = (ahead.span.first + ahead.tile) * X::kTile + (warp + 1) * kStep;
      if (beyond > ahead.span.end - tokens) baton::await_earlier();  // tokens of this step among them
      fetch_one(stage);
    }
    baton::await_earlier();
    if (shares) {
      if (threadIdx.x == 0) upcoming = fixed_units + atomicAdd(counters, 1);
      __syncthreads();
      next = upcoming;
      __syncthreads();  // before it is written again
    }

    uint32_t q[kBlocks][D / 16][2];
    float sum[kBlocks][D / 16][4], top[kBlocks][2], total[kBlocks][2];
    int stage = 0;
    uint32_t parity = 0;  // of this round of the ring
    int first_of_part = item;  // tile at which this unit's part of the sequence begins
    while (true) {
      if (item == first_of_part) {
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

      if (shares && item + 1 == end && threadIdx.x == 0) claimed = atomicAdd(counters, 1);
      if constexpr (X::kBoxes) baton::wait_phase(barriers + stage * 8, parity);
      else wait_copies<X::kStages - 1>();
      __syncwarp();  // all lanes have what they asked for
      const int start = (now.span.first + now.tile) * X::kTile + warp * kStep;
      if (start < now.span.end && start + kStep > now.span.begin) {
        const uint32_t keys = ring + stage * X::kStage, values = keys + X::kHalf;
        if (X::kBoxes && (start < now.span.begin || start + kStep > now.span.end)) {
          // What lies outside may be NaN, and 0 * NaN is NaN. Which vector of a row is which does not matter.
          for (int i = lane; i < kStep * X::kVecs; i += 32) {
            const int row = i / X::kVecs, vec = i % X::kVecs;
            const uint32_t to = values + row / 8 * X::kDown + vec / 8 * kAtom + row % 8 * 128 + vec % 8 * 16;
            if (start + row < now.span.begin || start + row >= now.span.end)
              *reinterpret_cast<uint4*>(shared + (to - start_of_shared)) = make_uint4(0, 0, 0, 0);
          }
          baton::publish_writes();  // before the copy engine writes there again
          __syncwarp();
        }
        // Where this lane's 16 bytes of the k-th 16 columns lie. Lanes name rows 0 to 15 of the left half, then of the
        // right one; where matrices are to be transposed, 8 rows of both halves, then 8 more.
        const auto piece = [&](uint32_t matrix, int row, int right, int k) -> uint32_t {
          if (!X::kBoxes) return matrix + row * X::kPitch + right * 16 + k * 32;
          return matrix + row / 8 * X::kDown + k / 4 * kAtom + row % 8 * 128 + ((k % 4 * 2 + right) ^ row % 8) * 16;
        };
        float score[kBlocks][4] = {}, odd[kBlocks][4] = {};  // two sums, so that a product need not wait for the last
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
          uint32_t a[4];
          load_matrices(a, piece(keys, lane % 16, lane / 16, k));
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
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
          uint32_t a[4];
          load_transposed(a, piece(values, lane % 8 + lane / 16 * 8, lane / 8 % 2, k));
#pragma unroll
          for (int b = 0; b < kBlocks; b++) multiply(sum[b][k], a, weight[b][0], weight[b][1]);
        }
      }
      __syncwarp();  // all lanes are done with the tile
      fetch_one(stage);
      if (++stage == X::kStages) stage = 0, parity ^= 1;

      const Cursor done = now;
      const int sequence_begin = item - done.tile, sequence_end = sequence_begin + done.span.count;  // tiles of the row
      const bool unit_ends = ++item == end;
      if (!unit_ends) advance(now);
      if (item != sequence_end && !unit_ends) continue;

      // The unit's part of the sequence is over: merge the warps'.
      first_of_part = item;
      if (unit_ends && threadIdx.x == 0) upcoming = fixed_units + claimed;
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
      const int owner = cut.run_of(sequence_begin), last = cut.run_of(sequence_end - 1);
      const bool whole = owner == last;
      const int count = min(X::kAll, columns - first_column);
      __nv_bfloat16* out = p.out + (int64_t(done.sequence) * tokens * p.heads + int64_t(done.head) * group) * D;
      const auto give = [&](int column, int element, const float (&x)[4], float all) {
        column += first_column;
        const float factor = all == 0.f ? 0.f : 1.f / all;
        const int64_t row = kPlain ? column : column / group * p.heads + column % group;
        *reinterpret_cast<uint2*>(out + row * D + element) =
            make_uint2(pack(x[0] * factor, x[1] * factor), pack(x[2] * factor, x[3] * factor));
      };
      const auto part_of = [&](int run) {
        const int64_t at = (int64_t(blockIdx.y) * p.most_runs + run) * p.kv_heads + done.head;
        return p.partial + (at * 2 + (run == owner)) * X::kAll * (D + 4);
      };
      float* partial = part_of(unit / p.kv_heads);
#pragma unroll
      for (int b = 0; b < kBlocks; b++) {
#pragma unroll
        for (int pass = 0; pass < D; pass += X::kPass) {
          if (b + pass > 0) __syncthreads();  // before it is written again
#pragma unroll
          for (int k = 0; k < D / 16; k++) {
            if (k * 16 < pass || k * 16 >= pass + X::kPass) continue;
#pragma unroll
            for (int i = 0; i < 4; i++) {
              const int element = k * 16 - pass + lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
              merge[(warp * kColumns + column) * X::kMergePitch + element] = sum[b][k][i];
            }
          }
          __syncthreads();
          const int vecs = min(X::kPass, D - pass) / 4;
          for (int i = threadIdx.x; i < min(kColumns, count - b * kColumns) * vecs; i += X::kThreads) {
            const int in_block = i / vecs, element = i % vecs * 4, column = b * kColumns + in_block;
            float highest = -FLT_MAX, all = 0.f, x[4] = {};
#pragma unroll
            for (int w = 0; w < kWarps; w++) highest = fmaxf(highest, tops[w * X::kAll + column]);
#pragma unroll
            for (int w = 0; w < kWarps; w++) {
              const float shrink = exp2f(tops[w * X::kAll + column] - highest);
              const float4 one =
                  *reinterpret_cast<const float4*>(merge + (w * kColumns + in_block) * X::kMergePitch + element);
              all += shrink * totals[w * X::kAll + column];
              x[0] += shrink * one.x, x[1] += shrink * one.y, x[2] += shrink * one.z, x[3] += shrink * one.w;
            }
            if (whole) {
              give(column, pass + element, x, all);
            } else {
              float* to = partial + column * (D + 4);
              __stcg(reinterpret_cast<float4*>(to + pass + element), make_float4(x[0], x[1], x[2], x[3]));
              if (pass + element == 0) __stcg(reinterpret_cast<float2*>(to + D), make_float2(highest, all));
            }
          }
        }
      }
      const int after = upcoming;
      if (!whole) __threadfence();
      __syncthreads();  // before all that is written again
      if (!whole) {
        // Whoever comes last has all parts before it.
        int32_t* counter = counters + 2 + int64_t(done.sequence) * p.kv_heads + done.head;
        if (threadIdx.x == 0) arrived = atomicAdd(counter, 1);
        __syncthreads();
        if (arrived == last - owner) {
          __threadfence();
          if (threadIdx.x == 0) *counter = 0;
          // A thread for 4 elements, or several, each with some of the parts, which the first then merges.
          const int items = count * (D / 4), teams = max(1, X::kThreads / items);
          float *sums = merge, *scales = merge + X::kThreads * 4;  // [thread][4], then [thread][2]: top and total
          const auto add = [](float (&x)[4], float& highest, float& all, const float4& one, const float2& scale) {
            const float higher = fmaxf(highest, scale.x);
            const float mine = exp2f(highest - higher), theirs = exp2f(scale.x - higher);
            highest = higher;
            all = all * mine + scale.y * theirs;
            x[0] = x[0] * mine + one.x * theirs, x[1] = x[1] * mine + one.y * theirs;
            x[2] = x[2] * mine + one.z * theirs, x[3] = x[3] * mine + one.w * theirs;
          };
          for (int i = threadIdx.x; i < items * teams; i += X::kThreads) {
            const int column = i % items / (D / 4), element = i % (D / 4) * 4;
            float highest = -FLT_MAX, all = 0.f, x[4] = {};
            for (int run = owner + i / items; run <= last; run += kPartsAtOnce * teams) {
              float4 one[kPartsAtOnce];
              float2 scale[kPartsAtOnce];
#pragma unroll
              for (int k = 0; k < kPartsAtOnce; k++) {
                const float* part = part_of(min(run + k * teams, last)) + column * (D + 4);
                one[k] = __ldcg(reinterpret_cast<const float4*>(part + element));
                scale[k] = __ldcg(reinterpret_cast<const float2*>(part + D));
              }
#pragma unroll
              for (int k = 0; k < kPartsAtOnce; k++)
                if (run + k * teams <= last) add(x, highest, all, one[k], scale[k]);
            }
            if (teams == 1) {
              give(column, element, x, all);
            } else {
              *reinterpret_cast<float4*>(sums + i * 4) = make_float4(x[0], x[1], x[2], x[3]);
              *reinterpret_cast<float2*>(scales + i * 2) = make_float2(highest, all);
            }
          }
          if (teams > 1) {
            __syncthreads();
            if (int i = threadIdx.x; i < items) {
              float highest = -FLT_MAX, all = 0.f, x[4] = {};
              for (int at = i; at < items * teams; at += items)
                add(x, highest, all, *reinterpret_cast<const float4*>(sums + at * 4),
                    *reinterpret_cast<const float2*>(scales + at * 2));
              give(i / (D / 4), i % (D / 4) * 4, x, all);
            }
            __syncthreads();  // before `sums` is written again
          }
        }
      }
      if (!unit_ends) continue;
      if (next >= units) break;
      unit = next;
      next = after;
      now = at(unit);
      item = cut.begin(unit / p.kv_heads);
      end = cut.begin(unit / p.kv_heads + 1);
      first_of_part = item;
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
int launch(const Problem& p, const CUtensorMap& kv_map, int blocks, cudaStream_t stream) {
  using X = Layout<D, kBlocks>;
  const cudaError_t allowed =  // of the device that is current, so each time
      cudaFuncSetAttribute(split_decode<D, kBlocks, kPlain>, cudaFuncAttributeMaxDynamicSharedMemorySize, X::kBytes);
  if (allowed != cudaSuccess) return allowed;
  const int parts = baton::ceil_div(p.heads / p.kv_heads * p.tokens, X::kAll);
  return baton::launch(split_decode<D, kBlocks, kPlain>, dim3(blocks * p.kv_heads, parts), X::kThreads, X::kBytes,
                       stream, p, kv_map);
}

template <int D>
int launch(const Problem& p, int64_t pool_blocks, int blocks, cudaStream_t stream) {
  CUtensorMap kv_map{};
  if constexpr (uses_boxes(D)) {
    const uint64_t rows = uint64_t(pool_blocks) * p.layers * 2 * p.kv_heads;
    const cudaError_t code = baton::make_map<5>(
        &kv_map, p.pool, {64, 8, D / 64, uint64_t(p.block_tokens) / 8, rows},
        {D * 2, 128, 8 * D * 2, uint64_t(p.block_tokens) * D * 2}, {64, 8, D / 64, kStep / 8, 1});
    if (code != cudaSuccess) return code;
  }
  constexpr int kMost = D <= 80 ? 4 : D <= 128 ? 2 : 1;  // whose sums and queries fit into a thread's registers
  const int columns = p.heads / p.kv_heads * p.tokens;
  if (columns > kColumns && kMost > 1) return launch<D, kMost, false>(p, kv_map, blocks, stream);
  const bool plain = p.tokens == 1 && p.soft_cap == 0.f && p.slopes == nullptr;
  return plain ? launch<D, 1, true>(p, kv_map, blocks, stream) : launch<D, 1, false>(p, kv_map, blocks, stream);
}

// One thread block. plan: [most_runs] where each run begins, as Begin | [1] tiles of a head | [S] before each sequence.
// It must not let the next kernel begin: those that follow rely on what was written before it.
__global__ void __launch_bounds__(1024) plan_runs(const int32_t* context_lens, int32_t* plan, int sequences, int tokens,
                                                  int window, int tile, int blocks, int most_runs, int shortest) {
  __shared__ int before[32], total;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int32_t* starts = plan + most_runs * 4 + 1;
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
  if (threadIdx.x == 0) starts[-1] = total;
  const Cut cut = cut_of(total, blocks, most_runs, shortest);
  for (int run = threadIdx.x; run < cut.runs; run += blockDim.x) {
    const int begin = cut.begin(run);
    int low = 0, high = sequences - 1;  // the last sequence that begins at or before it
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (starts[middle] <= begin) low = middle;
      else high = middle - 1;
    }
    reinterpret_cast<Begin*>(plan)[run] = {low, begin - starts[low], context_lens[low]};
  }
}

}  // namespace

// blocks: runs of a KV head that are worked on at once. most_runs: of a KV head, that plan and workspace have room for;
// no fewer than `blocks`.
BATON_EXPORT int plan_split_decode(const int32_t* context_lens, int32_t* plan, int sequences, int tokens, int head_size,
                                   int window, int blocks, int most_runs, cudaStream_t stream) {
  if (sequences == 0) return cudaSuccess;
  if (sequences < 0 || tokens <= 0 || blocks <= 0 || most_runs < blocks) return cudaErrorInvalidValue;
  plan_runs<<<1, 1024, 0, stream>>>(context_lens, plan, sequences, tokens, window, warps_for(head_size) * kStep, blocks,
                                    most_runs, stages_for(head_size));
  return cudaGetLastError();
}

// Block sizes are multiples of 16. Table entries past a sequence's context are not read. `blocks`, `most_runs`,
// `tokens` as the plan has them. slopes: null, or ALiBi's; soft_cap: 0, or the cap.
BATON_EXPORT int split_decode_attention(const void* q, const void* pool, const int32_t* block_tables,
                                        const int32_t* context_lens, void* out, const int32_t* plan, float* partial,
                                        int32_t* arrived, const float* slopes, int64_t q_stride, int64_t pool_blocks,
                                        int sequences, int tokens, int heads, int kv_heads, int head_size,
                                        int block_tokens, int layers, int layer, int table_stride, int window,
                                        int blocks, int most_runs, float scale, float soft_cap, cudaStream_t stream) {
  if (sequences == 0) return cudaSuccess;
  if (sequences < 0 || tokens <= 0 || kv_heads <= 0 || heads % kv_heads != 0 || block_tokens % 16 != 0 || blocks <= 0 ||
      most_runs < blocks || pool_blocks * layers * 2 * kv_heads > INT_MAX)
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
    case 64: return launch<64>(p, pool_blocks, blocks, stream);
    case 80: return launch<80>(p, pool_blocks, blocks, stream);
    case 96: return launch<96>(p, pool_blocks, blocks, stream);
    case 128: return launch<128>(p, pool_blocks, blocks, stream);
    case 256: return launch<256>(p, pool_blocks, blocks, stream);
    default: return cudaErrorInvalidValue;
  }
}
