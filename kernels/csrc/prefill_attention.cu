// prefill_attention: causal attention of chunks of prompts, each after its own cached prefix, over the paged pool.
// bfloat16, for Hopper alone: elsewhere the launch says cudaErrorInvalidValue.
//   q [T, H, D]    pool [N, L, 2, G, P, D]    block_tables [S, B] int32    out [T, H, D]    lse [T, H] f32 or null
//   partial f32, of each part and KV head [kRows, D] results, then of all of them [kRows] log-sum-exps
// Bound by the matrix units: 4 D operations for each query head, query and key that it sees.
//
// The structure is that of FlashAttention-3 (Shah et al., 2024). A thread block works on items, one after another:
// kRows rows of queries against the keys they see, 128 at a time. Its first warpgroup only asks the copy engine for
// tiles; the two others have 64 rows each and do
//     scores [64, 128] = Q K^T, then sum [64, D] += weights V    with weights = softmax(scores), online, in base 2,
// the product for the next scores running during the softmax of these, and the two warpgroups' products in turns.
//
// Rows are (token, head): the query heads that share a KV head, for as many tokens as fit, so that K and V are read
// once for all of them and a chunk of a few tokens still fills rows. What a diagonal tile wastes is the same either
// way.
//
// K and V come through a ring of slots, each a tile of 128 tokens. A page of up to 128 tokens is one box: 8 tokens'
// rows of 64 values make an atom, the D / 64 atoms of the same tokens lie side by side, then those of the next 8
// tokens:
//     [token / 8][d / 64][token % 8][d % 64]
// so one command of the copy engine brings a page of K or V, and the matrix units take the same tile as rows of keys
// (K) and as columns of values (V). The order is that of use: K0 K1 V0 K2 V1 ... K(n) V(n-1) V(n), the last tile first.
//
// Items come longest first, from a plan made once for all layers of a step, and are handed out as thread blocks come
// free. Where a few long items would leave thread blocks idle, the plan cuts each along the keys into parts, whose
// results and log-sum-exps go to a workspace and are merged by a second launch.
//
// What a row gets depends on the tiles of its item that it sees, their order and where they are cut, and on nothing else:
// a tile of which a row sees nothing changes none of its bits, and neither does a part. So where all items are cut at
// multiples of a fixed number of tiles, counted from the context's beginning (plan_pieces, and `cut_pieces`
// of prefill_tiles.py), a token's result is bit for bit the same in every chunk, and alone.
#include "common.cuh"

#if __CUDA_ARCH_LIST__ == 900
#include "hopper.cuh"
#include "pairs.cuh"
#include "ring.cuh"

#include <algorithm>
#include <climits>
#include <numeric>
#include <type_traits>

namespace {

using namespace baton;

constexpr int kRows = 128;      // of queries in an item
constexpr int kKeys = 128;      // in a tile
constexpr int kSlots = 5;       // of the ring
constexpr int kBuffers = 2;     // of queries, so that the next item's come while this one's are used
constexpr int kThreads = 384;
constexpr int kWaiters = 8;     // warps that read a slot
constexpr float kLowest = -1e30f;  // of a row that has seen nothing; not -inf: two of those would subtract to NaN
constexpr float kSlack = 8.f;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr unsigned kAll = 0xffffffffu;
enum { kTurn = 1, kOwn = 3 };   // named barriers: a warpgroup's turn to multiply, and its own threads

struct alignas(16) Item {
  int first_row;  // of q
  int tokens;     // 0: there are no more items
  int position;   // of its first token in its context
  int context;    // tokens
  int sequence;
  int begin, end; // tiles of keys to work on
  int part;       // 0: all that it sees; else one more than the part's number
};
static_assert(sizeof(Item) == 32);

// An item that was cut.
struct alignas(16) Merge {
  int first_row, tokens;  // of q
  int first_part, parts;
};

struct Problem {
  const Item* items;    // each of every KV head
  const Merge* merges;  // likewise
  const int32_t* block_tables;
  __nv_bfloat16* out;
  float* lse;
  float* partial;
  int32_t* taken;     // items handed out after the first of each thread block, and thread blocks that are done; zeros
  int items_of_head, merges_of_head, parts;  // as many at most, where `counts` has the numbers
  const int32_t* counts;  // items and merges, or null
  int part_rows;      // of a part in the workspace
  int heads, kv_heads, block_tokens, box_tokens, layers, layer, table_stride;
  int window;         // the newest `window` tokens are seen; 0: all
  float scale;
};

template <int D>
struct Layout {
  static constexpr int kDown = D / 64 * kAtom;           // bytes from 8 tokens to the next 8
  static constexpr int kTile = kKeys / 8 * kDown;        // of K or V
  static constexpr int kQueryHalf = kRows / 8 * kAtom;   // 64 values of every row
  static constexpr int kQueries = D / 64 * kQueryHalf;
  static constexpr int kRing = kBuffers * kQueries;         // where things begin
  static constexpr int kBarriers = kRing + kSlots * kTile;  // filled and emptied of each slot, then of the buffers
  static constexpr int kItems = kBarriers + (kSlots + kBuffers) * 16;
  static constexpr int kBytes = kItems + kBuffers * 48;
  static_assert(kBytes <= kSharedBytes);
};

// What comes with the queries.
struct Work {
  Item item;
  int head;  // KV head
};

template <int D>
struct Shared {
  using X = Layout<D>;
  uint32_t start;
  unsigned char* memory;
  __device__ __forceinline__ uint32_t tile(int slot) const { return start + X::kRing + slot * X::kTile; }
  __device__ __forceinline__ uint32_t filled(int slot) const { return start + X::kBarriers + slot * 16; }
  __device__ __forceinline__ uint32_t emptied(int slot) const { return start + X::kBarriers + slot * 16 + 8; }
  __device__ __forceinline__ uint32_t queries(int buffer) const { return start + buffer * X::kQueries; }
  __device__ __forceinline__ uint32_t queries_filled(int buffer) const { return filled(kSlots + buffer); }
  __device__ __forceinline__ uint32_t queries_emptied(int buffer) const { return emptied(kSlots + buffer); }
  __device__ __forceinline__ Work* work(int buffer) const {
    return reinterpret_cast<Work*>(memory + X::kItems + buffer * 48);
  }
};

// The warp that fills shared memory.
template <int D>
__device__ __forceinline__ void fill(const Problem& p, const CUtensorMap* q_map, const CUtensorMap* kv_map,
                                     const Shared<D> shared, int lane) {
  using X = Layout<D>;
  if (lane == 0) prefetch_map(q_map), prefetch_map(kv_map);
  const int group = p.heads / p.kv_heads, boxes = kKeys / p.box_tokens, box_bytes = p.box_tokens / 8 * X::kDown;
  const int total = (p.counts == nullptr ? p.items_of_head : p.counts[0]) * p.kv_heads;
  RingPlace<kSlots> place;
  RingPlace<kBuffers> buffer;
  Item item = p.items[blockIdx.x / p.kv_heads];
  for (int index = blockIdx.x; index < total; buffer.advance()) {
    const int head = index % p.kv_heads;
    int next = 0;
    if (lane == 0) next = gridDim.x + atomicAdd(p.taken, 1);

    struct Box { int row, group; };  // coordinates in the pool's map, of this lane's box of a tile of K
    const auto find = [&](int tile) -> Box {
      const int token = tile * kKeys + lane * p.box_tokens;
      if (lane >= boxes || token >= item.context || tile < item.begin) return {0, 0};
      const int block = p.block_tables[int64_t(item.sequence) * p.table_stride + token / p.block_tokens];
      return {(block * p.layers + p.layer) * 2 * p.kv_heads + head, token % p.block_tokens / 8};
    };
    const auto load = [&](const Box& mine, int tile, int values) {
      const bool there = lane < boxes && tile * kKeys + lane * p.box_tokens < item.context;
      const int count = __popc(__ballot_sync(kAll, there));
      wait_phase(shared.emptied(place.slot), place.parity ^ 1);
      __syncwarp();
      if (lane == 0) arrive_expecting(shared.filled(place.slot), count * box_bytes);
      __syncwarp();
      if (there)
        copy_box(shared.tile(place.slot) + lane * box_bytes, kv_map, shared.filled(place.slot), 0, 0, 0, mine.group,
                 mine.row + values * p.kv_heads);
      place.advance();
    };

    Box now = find(item.end - 1), ahead = find(item.end - 2);
    wait_phase(shared.queries_emptied(buffer.slot), buffer.parity ^ 1);
    __syncwarp();
    if (lane == 0) {
      *shared.work(buffer.slot) = {item, head};
      const uint32_t filled = shared.queries_filled(buffer.slot);
      arrive_expecting(filled, D / 64 * (kRows / group * group) * 128);
      for (int half = 0; half < D / 64; half++)
        copy_box(shared.queries(buffer.slot) + half * X::kQueryHalf, q_map, filled, half * 64, head * group,
                 item.first_row);
    }
    load(now, item.end - 1, 0);
    index = __shfl_sync(kAll, next, 0);
    const Item next_item = p.items[min(index, total - 1) / p.kv_heads];  // asked for early
    for (int tile = item.end - 2; tile >= item.begin; tile--) {
      const Box before = now;
      now = ahead;
      ahead = find(tile - 1);
      load(now, tile, 0);
      load(before, tile + 1, 1);
    }
    load(now, item.begin, 1);
    item = next_item;
  }
  wait_phase(shared.queries_emptied(buffer.slot), buffer.parity ^ 1);
  if (lane == 0) {
    shared.work(buffer.slot)->item.tokens = 0;
    arrive(shared.queries_filled(buffer.slot));
    // Whoever comes last leaves zeros to the next launch.
    if (atomicAdd(p.taken + 1, 1) == int(gridDim.x) - 1) p.taken[0] = p.taken[1] = 0;
  }
}

template <int D>
__device__ __forceinline__ void begin_scores(float (&scores)[64], uint64_t queries, uint32_t keys) {
  using X = Layout<D>;
  const uint64_t rows = matrix_at(keys, 16, X::kDown);
  open_products();
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    const uint64_t a = moved(queries, k / 4 * X::kQueryHalf + k % 4 * 32), b = moved(rows, k / 4 * kAtom + k % 4 * 32);
    if (k == 0) multiply_rows<false>(scores, a, b);
    else multiply_rows<true>(scores, a, b);
  }
  close_products();
}

template <int D>
__device__ __forceinline__ void begin_sum(float (&sum)[D / 2], const uint32_t (&weights)[8][4], uint32_t values) {
  using X = Layout<D>;
  const uint64_t columns = matrix_at(values, kAtom, X::kDown);
  open_products();
#pragma unroll
  for (int k = 0; k < kKeys / 16; k++) multiply_columns(sum, weights[k], moved(columns, k * 2 * X::kDown));
  close_products();
}

// A lane's two rows of a tile: what they may see, as keys relative to its first element.
struct Bounds {
  int last[2];  // seen up to here
  int window;   // as many of them
};

template <bool kWindow>
__device__ __forceinline__ void hide(float (&scores)[64], const Bounds& bounds) {
#pragma unroll
  for (int i = 0; i < 64; i++) {
    const int key = i / 4 * 8 + i % 2, last = bounds.last[i / 2 % 2];
    const bool seen = kWindow ? unsigned(last - key) < unsigned(bounds.window) : key <= last;
    scores[i] = seen ? scores[i] : -INFINITY;
  }
}

// Scores become weights. top, total: of this lane's rows so far, the total over the lane's own elements; shrink: what
// the sum before is to be multiplied with. top is the highest score, or less by so little that no weight passes
// 2^kSlack: that it seldom changes spares most multiplications (Zadouri et al., FlashAttention-4, 2026).
__device__ __forceinline__ void weigh(float (&scores)[64], float (&top)[2], float (&total)[2], float (&shrink)[2],
                                      float scale) {
  float highest[2][2] = {{top[0], scores[1]}, {top[1], scores[3]}};  // two of each row, so that fewer wait for another
#pragma unroll
  for (int i = 0; i < 64; i++) highest[i / 2 % 2][i % 2] = fmaxf(highest[i / 2 % 2][i % 2], scores[i]);
  float base[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float all = fmaxf(highest[r][0], highest[r][1]);
    all = fmaxf(all, __shfl_xor_sync(kAll, all, 1));
    all = fmaxf(all, __shfl_xor_sync(kAll, all, 2));
    if ((all - top[r]) * scale <= kSlack) all = top[r];
    base[r] = all * scale;
    shrink[r] = power_of_two((top[r] - all) * scale);  // exactly 1 where they are the same
    top[r] = all;
  }
  // Not to be joined with the sum that follows: what a tile gives is the same wherever this function was put.
  float sums[2][2] = {{__fmul_rn(total[0], shrink[0]), 0.f}, {__fmul_rn(total[1], shrink[1]), 0.f}};
#pragma unroll
  for (int i = 0; i < 64; i++) {
    scores[i] = power_of_two(fmaf(scores[i], scale, -base[i / 2 % 2]));
    sums[i / 2 % 2][i % 2] += scores[i];
  }
  for (int r = 0; r < 2; r++) total[r] = sums[r][0] + sums[r][1];
}

__device__ __forceinline__ void round_weights(uint32_t (&weights)[8][4], const float (&scores)[64]) {
#pragma unroll
  for (int i = 0; i < 32; i++) weights[i / 4][i % 4] = pack(scores[i * 2], scores[i * 2 + 1]);
}

// A lane's part of two rows, 8 rows apart, to the workspace at row `at`, if they are there.
template <int D>
__device__ __forceinline__ void write_part(const Problem& p, int64_t at, const bool (&there)[2], int lane,
                                           const float (&sum)[D / 2], const float (&factor)[2], const float (&lse)[2]) {
  float* sums = p.partial + int64_t(p.parts) * p.kv_heads * p.part_rows * D;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    if (!there[r]) continue;
    if (lane % 4 == 0) sums[at + r * 8] = lse[r];
    float* to = p.partial + (at + r * 8) * D + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < D / 8; i++)
      *reinterpret_cast<float2*>(to + i * 8) =
          make_float2(sum[i * 4 + r * 2] * factor[r], sum[i * 4 + r * 2 + 1] * factor[r]);
  }
}

// A lane's part of its row r to row `at` of the result, if that is there. Of 4 times 8 elements, lane l of 4 gets the
// l-th 8, so that each writes 16 bytes.
template <int D>
__device__ __forceinline__ void write_row(const Problem& p, int64_t at, bool there, int lane, int r,
                                          const float (&sum)[D / 2], float factor, float lse) {
  const bool odd = lane & 1, upper = lane & 2;
  if (p.lse != nullptr && there && lane % 4 == 0) p.lse[at] = lse;
#pragma unroll
  for (int part = 0; part < D / 32; part++) {
    uint32_t x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int element = (part * 4 + i) * 4 + r * 2;
      x[i] = pack(sum[element] * factor, sum[element + 1] * factor);
    }
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t other = __shfl_xor_sync(kAll, odd ? x[i] : x[i + 1], 1);
      (odd ? x[i] : x[i + 1]) = other;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t other = __shfl_xor_sync(kAll, upper ? x[i] : x[i + 2], 2);
      (upper ? x[i] : x[i + 2]) = other;
    }
    if (there)
      *reinterpret_cast<uint4*>(p.out + at * D + part * 32 + lane % 4 * 8) = make_uint4(x[0], x[1], x[2], x[3]);
  }
}

// The two warpgroups that compute. `which`: 0 or 1.
template <int D, bool kWindow>
__device__ __forceinline__ void compute(const Problem& p, const Shared<D> shared, int which) {
  using X = Layout<D>;
  const int lane = threadIdx.x % 32, thread = threadIdx.x % 128;
  const int row = which * 64 + thread / 32 * 16 + lane / 4;  // and 8 more
  const int group = p.heads / p.kv_heads;
  const float scale = p.scale * kLog2e;
  const auto leave = [&](uint32_t barrier) {
    if (lane == 0) arrive(barrier);
  };
  if (which == 1) arrive_named(kTurn + 0, 256);  // the first turn is the other's

  RingPlace<kSlots> place;
  RingPlace<kBuffers> buffer;
  Item item;
  int head;
  // Shuffled, a number is known to be the same in all lanes, and what is made of it stays in uniform registers.
  const auto uniform = [](int x) { return __shfl_sync(kAll, x, 0); };
  const auto queries = [&] { return matrix_at(shared.queries(uniform(buffer.slot)) + which * 8 * kAtom, 16, kAtom); };
  float scores[64];
  // Asks for the scores of an item's last tile, early enough that they are made while the item before is written out.
  const auto begin_item = [&] {
    wait_phase(shared.queries_filled(buffer.slot), buffer.parity);
    item = shared.work(buffer.slot)->item;
    head = shared.work(buffer.slot)->head;
    if (item.tokens > 0) wait_phase(shared.filled(place.slot), place.parity);  // else the scores are of anything
    begin_scores<D>(scores, queries(), shared.tile(place.slot));
  };
  begin_item();
  for (;;) {
    wait_products<0>(scores);
    if (item.tokens == 0) return;
    const int token[2] = {row / group, (row + 8) / group};
    // Tiles below `clear` lie before the first token, and from `inside` on in every token's window.
    const int clear = (item.position + 1) / kKeys;
    const int inside = kWindow ? max(0, item.position + item.tokens - p.window + kKeys - 1) / kKeys : 0;
    const auto bounds = [&](int tile) -> Bounds {
      const int first = tile * kKeys + lane % 4 * 2;
      return {{item.position + token[0] - first, item.position + token[1] - first}, p.window};
    };

    float sum[D / 2], top[2] = {kLowest, kLowest}, total[2] = {}, shrink[2];
    uint32_t weights[8][4];
#pragma unroll
    for (int i = 0; i < D / 2; i++) sum[i] = 0.f;

    leave(shared.emptied(place.slot));
    if (item.end - 1 == item.begin) leave(shared.queries_emptied(buffer.slot));
    // None of this warpgroup's rows may be there, as where few tokens ask. Then it computes nothing but keeps step, and
    // the matrix units are the other's, which so keeps up with the memory.
    const bool idle = which * 64 >= item.tokens * group;
    if (idle) {
      place.advance();
      for (int tile = item.end - 2; tile >= item.begin; tile--) {
        wait_phase(shared.filled(place.slot), place.parity);
        wait_named(kTurn + which, 256);
        arrive_named(kTurn + 1 - which, 256);
        leave(shared.emptied(place.slot));
        if (tile == item.begin) leave(shared.queries_emptied(buffer.slot));
        place.advance();
        wait_phase(shared.filled(place.slot), place.parity);
        leave(shared.emptied(place.slot));
        place.advance();
      }
      wait_phase(shared.filled(place.slot), place.parity);
      leave(shared.emptied(place.slot));
      place.advance();
      buffer.advance();
      begin_item();
      continue;
    }
    hide<kWindow>(scores, bounds(item.end - 1));
    weigh(scores, top, total, shrink, scale);
    round_weights(weights, scores);
    place.advance();

    if (item.end * kKeys > item.context) {  // V past the context's end may be NaN, and 0 * NaN is NaN
      RingPlace<kSlots> values = place;
      if (item.end - 1 > item.begin) values.advance();
      wait_phase(shared.filled(values.slot), values.parity);
      const int begin = item.context - (item.end - 1) * kKeys;
      for (int i = thread; i < (kKeys - begin) * (D / 8); i += 128) {
        const int key = begin + i / (D / 8), vector = i % (D / 8);  // which vector of a row it is does not matter
        const uint32_t at = X::kRing + values.slot * X::kTile + key / 8 * X::kDown + vector / 8 * kAtom + key % 8 * 128;
        *reinterpret_cast<uint4*>(shared.memory + at + vector % 8 * 16) = make_uint4(0, 0, 0, 0);
      }
      publish_writes();
      wait_named(kOwn + which, 128);
    }

    const auto step = [&](int tile, auto hidden) {
      place.slot = uniform(place.slot);
      const RingPlace<kSlots> keys = place;
      place.advance();
      const RingPlace<kSlots> values = place;
      place.advance();
      wait_phase(shared.filled(keys.slot), keys.parity);
      wait_named(kTurn + which, 256);
      begin_scores<D>(scores, queries(), shared.tile(keys.slot));
      wait_phase(shared.filled(values.slot), values.parity);
      begin_sum<D>(sum, weights, shared.tile(values.slot));
      arrive_named(kTurn + 1 - which, 256);
      wait_products<1>(scores);
      leave(shared.emptied(keys.slot));
      if (tile == item.begin) leave(shared.queries_emptied(buffer.slot));
      if (decltype(hidden)::value) hide<kWindow>(scores, bounds(tile));
      weigh(scores, top, total, shrink, scale);
      settle(total);
      wait_products<0>(sum);
      leave(shared.emptied(values.slot));
      if (__any_sync(kAll, shrink[0] != 1.f || shrink[1] != 1.f)) {
#pragma unroll
        for (int i = 0; i < D / 2; i++) sum[i] *= shrink[i / 2 % 2];
      }
      round_weights(weights, scores);
    };
    int tile = item.end - 2;
    for (; tile >= item.begin && tile >= clear; tile--) step(tile, std::true_type());
    for (; tile >= item.begin && tile >= inside; tile--) step(tile, std::false_type());
    if (kWindow)
      for (; tile >= item.begin; tile--) step(tile, std::true_type());

    place.slot = uniform(place.slot);
    const RingPlace<kSlots> last = place;
    wait_phase(shared.filled(last.slot), last.parity);
    begin_sum<D>(sum, weights, shared.tile(last.slot));
    place.advance();
    buffer.advance();
    const Item done = item;
    const int done_head = head;
    begin_item();
#pragma unroll
    for (int r = 0; r < 2; r++) {
      total[r] += __shfl_xor_sync(kAll, total[r], 1);
      total[r] += __shfl_xor_sync(kAll, total[r], 2);
      shrink[r] = total[r] > 0.f ? 1.f / total[r] : 0.f;  // of a part a row may see nothing
    }
    wait_products<1>(sum);
    leave(shared.emptied(last.slot));
    const float sums[2] = {(top[0] * scale + log2f(total[0])) * kLn2, (top[1] * scale + log2f(total[1])) * kLn2};
    if (done.part > 0) {
      const int64_t at = (int64_t(done.part - 1) * p.kv_heads + done_head) * p.part_rows + row;
      const bool there[2] = {token[0] < done.tokens, token[1] < done.tokens};
      write_part<D>(p, at, there, lane, sum, shrink, sums);
    } else {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int64_t at = int64_t(done.first_row + token[r]) * p.heads + done_head * group + (row + r * 8) % group;
        write_row<D>(p, at, token[r] < done.tokens, lane, r, sum, shrink[r], sums[r]);
      }
    }
  }
}

template <int D, bool kWindow>
__global__ void __launch_bounds__(kThreads, 1)
    prefill(const Problem p, const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap kv_map) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const Shared<D> shared{uint32_t(__cvta_generic_to_shared(memory)), memory};
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kSlots + kBuffers; slot++) {
      init_barrier(shared.filled(slot), 1);
      init_barrier(shared.emptied(slot), kWaiters);
    }
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<40>();
    if (threadIdx.x < 32) fill<D>(p, &q_map, &kv_map, shared, threadIdx.x);
  } else {
    take_registers<232>();
    compute<D, kWindow>(p, shared, __shfl_sync(kAll, threadIdx.x / 128, 0) - 1);
  }
}

constexpr int kMergeRows = 16;  // of a thread block

// Each thread 4 elements of a row.
template <int D>
__global__ void __launch_bounds__(D / 4 * kMergeRows) merge(const Problem p) {
  if (p.counts != nullptr && int(blockIdx.x) >= p.counts[1] * p.kv_heads) return;
  const Merge merge = p.merges[blockIdx.x / p.kv_heads];
  const int head = blockIdx.x % p.kv_heads, group = p.heads / p.kv_heads;
  const int row = blockIdx.y * kMergeRows + threadIdx.x / (D / 4), element = threadIdx.x % (D / 4) * 4;
  if (row >= merge.tokens * group) return;
  const float* sums = p.partial + int64_t(p.parts) * p.kv_heads * p.part_rows * D;
  const auto at = [&](int part) { return (int64_t(merge.first_part + part) * p.kv_heads + head) * p.part_rows + row; };
  float highest = kLowest;
  for (int part = 0; part < merge.parts; part++) highest = fmaxf(highest, sums[at(part)]);
  float total = 0.f, x[4] = {};
  for (int part = 0; part < merge.parts; part++) {
    const float weight = exp2f((sums[at(part)] - highest) * kLog2e);
    const float4 one = *reinterpret_cast<const float4*>(p.partial + at(part) * D + element);
    total += weight;
    x[0] += weight * one.x, x[1] += weight * one.y, x[2] += weight * one.z, x[3] += weight * one.w;
  }
  const int64_t to = int64_t(merge.first_row + row / group) * p.heads + head * group + row % group;
  *reinterpret_cast<uint2*>(p.out + to * D + element) =
      make_uint2(pack(x[0] / total, x[1] / total), pack(x[2] / total, x[3] / total));
  if (p.lse != nullptr && element == 0) p.lse[to] = highest + log2f(total) * kLn2;
}

template <int D, bool kWindow>
int launch(const Problem& p, const CUtensorMap& q_map, const CUtensorMap& kv_map, int blocks, cudaStream_t stream) {
  constexpr int bytes = Layout<D>::kBytes;
  const cudaError_t allowed =  // of the device that is current, so each time
      cudaFuncSetAttribute(prefill<D, kWindow>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (allowed != cudaSuccess) return allowed;
  prefill<D, kWindow><<<blocks, kThreads, bytes, stream>>>(p, q_map, kv_map);
  if (p.merges_of_head > 0)
    merge<D><<<dim3(p.merges_of_head * p.kv_heads, ceil_div(p.part_rows, kMergeRows)), D / 4 * kMergeRows, 0, stream>>>(p);
  return cudaGetLastError();
}

template <int D>
int launch(const Problem& p, const void* q, const void* pool, int64_t q_stride, int tokens, int64_t pool_blocks,
           int blocks, cudaStream_t stream) {
  const uint64_t group = p.heads / p.kv_heads, rows = uint64_t(pool_blocks) * p.layers * 2 * p.kv_heads;
  CUtensorMap q_map, kv_map;
  const uint32_t at_once = kRows / group, box_groups = p.box_tokens / 8;
  const cudaError_t q_code = make_map<3>(&q_map, q, {D, uint64_t(p.heads), uint64_t(tokens)},
                                         {D * 2, uint64_t(q_stride) * 2}, {64, uint32_t(group), at_once});
  if (q_code != cudaSuccess) return q_code;
  const cudaError_t kv_code =
      make_map<5>(&kv_map, pool, {64, 8, D / 64, uint64_t(p.block_tokens) / 8, rows},
                  {D * 2, 128, 8 * D * 2, uint64_t(p.block_tokens) * D * 2}, {64, 8, D / 64, box_groups, 1});
  if (kv_code != cudaSuccess) return kv_code;
  return p.window > 0 ? launch<D, true>(p, q_map, kv_map, blocks, stream)
                      : launch<D, false>(p, q_map, kv_map, blocks, stream);
}

constexpr int kMostPiece = 64;  // tiles

// One thread block. Of sequences of which one token asks, the newest: an item for every piece of its keys, the longest
// first, and a merge where there are several.
//   context_lens [S] int32, 0: nobody's    items [S * pieces], merges [S], counts [2]: how many of each
__global__ void __launch_bounds__(1024) plan_pieces(const int32_t* context_lens, Item* items, Merge* merges,
                                                    int32_t* counts, int sequences, int window, int piece) {
  __shared__ int places[kMostPiece + 1], merged, parted;  // of items of each length: how many, then where the next goes
  for (int i = threadIdx.x; i <= kMostPiece; i += blockDim.x) places[i] = 0;
  if (threadIdx.x == 0) merged = parted = 0;
  __syncthreads();
  const auto each = [&](auto visit) {
    for (int s = threadIdx.x; s < sequences; s += blockDim.x) {
      const int context = context_lens[s];
      if (context <= 0) continue;
      const int begin = window > 0 ? max(0, context - window) / kKeys : 0, end = (context + kKeys - 1) / kKeys;
      visit(s, context, begin, end, begin / piece, (end - 1) / piece);
    }
  };
  each([&](int, int, int begin, int end, int first, int last) {
    for (int i = first; i <= last; i++) atomicAdd(&places[min(end, (i + 1) * piece) - max(begin, i * piece)], 1);
  });
  __syncthreads();
  if (threadIdx.x == 0) {
    int before = 0;
    for (int length = kMostPiece; length > 0; length--) {
      const int count = places[length];
      places[length] = before;
      before += count;
    }
    counts[0] = before;
  }
  __syncthreads();
  each([&](int s, int context, int begin, int end, int first, int last) {
    const int parts = last - first + 1;
    int part = 0;
    if (parts > 1) {
      part = atomicAdd(&parted, parts);
      merges[atomicAdd(&merged, 1)] = {s, 1, part, parts};
    }
    for (int i = first; i <= last; i++) {
      const int from = max(begin, i * piece), to = min(end, (i + 1) * piece);
      items[atomicAdd(&places[to - from], 1)] =
          {s, 1, context - 1, context, s, from, to, parts > 1 ? part + i - first + 1 : 0};
    }
  });
  __syncthreads();
  if (threadIdx.x == 0) counts[1] = merged;
}

}  // namespace
#endif

// What `prefill_attention` does for one token of each sequence, its keys cut at multiples of `piece` tiles: see plan_pieces.
BATON_EXPORT int plan_token_pieces(const int32_t* context_lens, int32_t* items, int32_t* merges, int32_t* counts,
                                   int sequences, int window, int piece, cudaStream_t stream) {
#if __CUDA_ARCH_LIST__ == 900
  if (sequences < 0 || window < 0 || piece <= 0 || piece > kMostPiece) return cudaErrorInvalidValue;
  plan_pieces<<<1, 1024, 0, stream>>>(context_lens, reinterpret_cast<Item*>(items), reinterpret_cast<Merge*>(merges),
                                      counts, sequences, window, piece);
  return cudaGetLastError();
#else
  return cudaErrorInvalidValue;
#endif
}

// items, merges: as the structs, 8 and 4 int32 each. counts: null, or how many there are of them, and items_of_head and
// merges_of_head are how many there may be. part_rows: of a part in the workspace, all that an item has. taken: two zeros, which each launch leaves as it found them.
// `blocks`: at most as many thread blocks. Table entries past a sequence's context are not read.
BATON_EXPORT int prefill_attention(const void* q, const void* pool, const int32_t* block_tables, const int32_t* items,
                                   const int32_t* merges, const int32_t* counts, void* out, float* lse,
                                   float* partial, int32_t* taken,
                                   int64_t q_stride, int64_t pool_blocks, int tokens, int items_of_head,
                                   int merges_of_head, int parts, int part_rows, int heads, int kv_heads, int head_size,
                                   int block_tokens, int layers, int layer, int table_stride, int window, int blocks,
                                   float scale, cudaStream_t stream) {
#if __CUDA_ARCH_LIST__ == 900
  if (tokens == 0 || items_of_head == 0) return cudaSuccess;
  if (tokens < 0 || items_of_head < 0 || kv_heads <= 0 || heads % kv_heads != 0 || heads / kv_heads > kRows ||
      block_tokens % 16 != 0 || blocks <= 0 || part_rows > kRows || !(scale > 0.f) || pool_blocks * layers * 2 * kv_heads > INT_MAX)
    return cudaErrorInvalidValue;
  const Problem p{reinterpret_cast<const Item*>(items),
                  reinterpret_cast<const Merge*>(merges),
                  block_tables,
                  static_cast<__nv_bfloat16*>(out),
                  lse,
                  partial,
                  taken,
                  items_of_head,
                  merges_of_head,
                  parts,
                  counts,
                  part_rows,
                  heads,
                  kv_heads,
                  block_tokens,
                  std::gcd(block_tokens, kKeys),
                  layers,
                  layer,
                  table_stride,
                  window,
                  scale};
  blocks = int(std::min<int64_t>(blocks, int64_t(items_of_head) * kv_heads));
  switch (head_size) {
    case 64: return launch<64>(p, q, pool, q_stride, tokens, pool_blocks, blocks, stream);
    case 128: return launch<128>(p, q, pool, q_stride, tokens, pool_blocks, blocks, stream);
    default: return cudaErrorInvalidValue;
  }
#else
  return cudaErrorInvalidValue;
#endif
}
