// skinny_linear: y = x W^T for few rows of x. bfloat16, sums in float32. On Hopper hopper_linear.cu serves instead.
//   x [T, I], T from 1 to 64    weight [O, I]    out [T, O], or [T, O / 2] behind a gate
// Bound by memory: O * I * 2 bytes are read once, past which x, out and what thread blocks tell each other stay in the
// L2 cache. W is cut into tiles of 128 rows and those into chunks of 128 columns (32 KB), laid in a row:
//     tile 0: chunk 0 1 2 ... | tile 1: chunk 0 1 2 ... | ...
// There is one thread block for each multiprocessor, and each takes an equal run of that row (Stream-K, Osama et al.,
// PPoPP 2023), so all end together whatever the shape is. Where a run begins or ends inside a tile, its sums go to a
// workspace, and the last thread block of that tile to arrive adds them up in the order of their columns. How W is cut
// does not depend on x, so a row of `out` is bit for bit the same whatever the other rows are and however many.
//
// Chunks of W and x pass through a ring of shared memory that asynchronous copies fill, all but one of its stages under
// way at a time (96 KB of W and more). A warp has 32 rows of a tile as two matrices of 16, on m16n8k16:
//     y^T [16 rows of W, 8 tokens] += W [16, 16 columns] x^T [16 columns, 8 tokens]
// Which column is which within a product is for both sides to agree on, so a lane takes 8 neighbours, 16 bytes, for two
// products. Which row is which is free as well: they are chosen so that what a lane has of a token in the end is 8
// neighbours of `out`.
#include "common.cuh"
#include "pairs.cuh"
#include "ptx.cuh"

namespace {

using baton::commit_copies;
using baton::copy_16;
using baton::high_half;
using baton::low_half;
using baton::multiply;
using baton::pack;
using baton::transposed;
using baton::wait_copies;

constexpr int kWarps = 4, kThreads = kWarps * 32;
constexpr int kRows = 128;              // of W in a tile
constexpr int kChunk = 128;             // columns
constexpr int kRowBytes = kChunk * 2;   // of a row of W or x in a stage
constexpr int kStep = 32;               // columns of two products
constexpr int kMaxTokens = 64;

struct Problem {
  const __nv_bfloat16* x;
  const unsigned char* weight;
  const __nv_bfloat16* bias;  // [O], or null
  __nv_bfloat16* out;
  float* partial;             // [blocks][2][kRows * tokens of whole tiles]
  int32_t* arrived;           // [tiles], zeros between launches
  int64_t x_stride, out_stride;  // elements between two tokens
  int tokens, outputs, inputs;   // outputs: columns of `out`
  bool gate, add;
};

// 16 bytes of a row of bfloat16 in shared memory: halves of 128 bytes are swapped in every other row, so that 8 lanes
// that read 64 bytes of two rows meet no bank twice.
__device__ __forceinline__ int place(int row, int vec) {
  return row * kChunk * 2 + (vec ^ (row % 2 * 4)) * 16;
}

template <int kTiles_>
struct Layout {
  static constexpr int kTiles = kTiles_;      // of 8 tokens
  static constexpr int kTokens = kTiles * 8;
  static constexpr int kX = kRows * kRowBytes;  // where x begins in a stage
  static constexpr int kStage = kX + kTokens * kRowBytes;
  static constexpr int kRest = 16;            // who has arrived
  static constexpr int kRoom = (baton::kSharedBytes - kRest) / kStage;
  static constexpr int kStages = kRoom < 8 ? kRoom : 8;
  static constexpr int kBytes = kStages * kStage + kRest;
  static constexpr int kPartial = kRows * kTokens;  // floats
  static_assert(kStages >= 2);
};

struct Cursor {
  int tile, chunk;
};

// Of rows `row` and `row` + 2, this lane's 8 columns of a step, for two products.
__device__ __forceinline__ void load_rows(uint32_t (&a)[2][4], const unsigned char* tile, int row, int step,
                                          int quarter) {
  const uint4 low = *reinterpret_cast<const uint4*>(tile + place(row, step * 4 + quarter));
  const uint4 high = *reinterpret_cast<const uint4*>(tile + place(row + 2, step * 4 + quarter));
  a[0][0] = low.x, a[0][1] = high.x, a[0][2] = low.y, a[0][3] = high.y;
  a[1][0] = low.z, a[1][1] = high.z, a[1][2] = low.w, a[1][3] = high.w;
}

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

template <typename X>
__global__ void __launch_bounds__(kThreads, 1) skinny(const Problem p) {
  constexpr int kTiles = X::kTiles;
  extern __shared__ __align__(16) unsigned char shared[];
  int32_t* arrived = reinterpret_cast<int32_t*>(shared + X::kStages * X::kStage);
  const uint32_t ring = uint32_t(__cvta_generic_to_shared(shared));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int eighth = lane / 4, quarter = lane % 4;  // a lane's place in a matrix: row or token, and columns

  const int tile_outputs = p.gate ? kRows / 2 : kRows;
  const int chunks = baton::ceil_div(p.inputs, kChunk);
  const int64_t items = int64_t(baton::ceil_div(p.outputs, tile_outputs)) * chunks;
  const int64_t blocks = gridDim.x;  // no more than items
  const int64_t begin = items * blockIdx.x / blocks, end = items * (blockIdx.x + 1) / blocks;

  // The copies of a thread: one vector of every kPass-th row. Behind a gate, half a tile is rows of the gate, and half the
  // rows of W that they meet, p.outputs further down.
  constexpr int kVecs = kRowBytes / 16, kPass = kThreads / kVecs, kPasses = kRows / kPass;
  const int64_t row_bytes = int64_t(p.inputs) * 2;
  const int64_t weight_step = kPass * row_bytes, lift = p.gate ? (p.outputs - kRows / 2) * row_bytes : 0;
  const auto fetch = [&](const Cursor& c, int stage) {
    const uint32_t to = ring + stage * X::kStage;
    const int column = c.chunk * kChunk;
    {
      const int row = threadIdx.x / kVecs, vec = threadIdx.x % kVecs;
      const bool there = column + vec * 8 < p.inputs;
      const int first = c.tile * tile_outputs + row;
      const unsigned char* from = p.weight + first * row_bytes + int64_t(c.chunk) * kRowBytes + vec * 16;
      int left = p.outputs - first;  // what lies in other rows of a matrix concerns no row: it stays as it was
#pragma unroll
      for (int pass = 0; pass < kPasses; pass++) {
        if (pass == kPasses / 2) from += lift, left += p.gate ? kRows / 2 : 0;
        if (pass * kPass < left) copy_16(to + place(row + pass * kPass, vec), from, there);
        from += weight_step;
      }
    }
    constexpr int kXVecs = kChunk / 8, kXPass = kThreads / kXVecs;
    const int row = threadIdx.x / kXVecs, vec = threadIdx.x % kXVecs;
    const bool there = column + vec * 8 < p.inputs;
    const __nv_bfloat16* from = p.x + row * p.x_stride + column + vec * 8;
#pragma unroll
    for (int pass = 0; pass * kXPass < X::kTokens; pass++) {
      if (pass * kXPass + row < p.tokens) copy_16(to + X::kX + place(row + pass * kXPass, vec), from, there);
      from += kXPass * p.x_stride;
    }
    commit_copies();
  };
  const auto advance = [&](Cursor& c) {
    if (++c.chunk == chunks) c.chunk = 0, c.tile++;
  };

  Cursor now{int(begin / chunks), int(begin % chunks)}, ahead = now;
  int64_t fetched = begin;
#pragma unroll 1  // a launch begins with instructions that no cache holds
  for (int stage = 0; stage < X::kStages - 1; stage++) {
    if (fetched < end) {
      fetch(ahead, stage);
      advance(ahead), fetched++;
    } else {
      commit_copies();
    }
  }

  // Row `eighth` of upper (i < 2) and lower half of matrix j is row `mine` + j * apart, or 2 more, of the tile. A lane's
  // values when they have been transposed are then neighbours, those of the two matrices too if there is no gate.
  const int apart = p.gate ? kRows / 2 : 4;
  const int mine = p.gate ? warp * 16 + eighth / 2 * 4 + eighth % 2 : warp * 32 + eighth / 2 * 8 + eighth % 2;
  float sum[2][kTiles][4] = {};           // rows of matrix j, tokens 8 n + quarter * 2 and the next

  // From sums to `out`, of all columns.
  const auto finish = [&](int tile) {
    const int per_lane = p.gate ? 4 : 8;  // outputs of one token
    const int first = tile * tile_outputs + warp * 4 * per_lane;
    const bool is_there = first + quarter * per_lane < p.outputs;
    float bias[2][2] = {};
    if (p.bias != nullptr) {
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int output = tile * tile_outputs + mine + h * 2 + (p.gate ? 0 : j * apart);
          if (output < p.outputs) bias[j][h] = __bfloat162float(p.bias[output + (p.gate ? j * p.outputs : 0)]);
        }
    }
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      const int token = n * 8 + eighth;  // of what is read and written; sums are of other tokens
      __nv_bfloat16* to = p.out + token * p.out_stride + first + quarter * per_lane;
      uint4 there{};
      if (p.add && is_there && token < p.tokens) there = *reinterpret_cast<const uint4*>(to);
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum[j][n][i] += bias[j][i / 2];
      if (p.gate) {
#pragma unroll
        for (int i = 0; i < 4; i++) sum[0][n][i] = silu(sum[0][n][i]) * sum[1][n][i];
      } else if (p.add) {
        const uint32_t old[4] = {transposed(there.x), transposed(there.y), transposed(there.z), transposed(there.w)};
#pragma unroll
        for (int i = 0; i < 8; i++)
          sum[i / 4][n][i % 4] += i % 2 ? high_half(old[i / 2]) : low_half(old[i / 2]);
      }
      uint32_t y[4];
#pragma unroll
      for (int i = 0; i < 4; i++) y[i] = transposed(pack(sum[i / 2][n][i % 2 * 2], sum[i / 2][n][i % 2 * 2 + 1]));
      if (is_there && token < p.tokens) {
        if (p.gate) *reinterpret_cast<uint2*>(to) = {y[0], y[1]};
        else *reinterpret_cast<uint4*>(to) = {y[0], y[1], y[2], y[3]};
      }
    }
  };

  // The thread block's part of a tile is over.
  const auto end_tile = [&](int tile) {
    const int owner = int(((int64_t(tile) * chunks + 1) * blocks - 1) / items);  // thread block with the first chunk
    const int last = int((int64_t(tile + 1) * chunks * blocks - 1) / items);
    if (owner != last) {
      const int block = blockIdx.x;
      float* part = p.partial + (int64_t(block) * 2 + (block == owner)) * X::kPartial;
#pragma unroll
      for (int i = 0; i < 2 * kTiles; i++) {
        const float(&from)[4] = sum[i / kTiles][i % kTiles];
        __stcg(reinterpret_cast<float4*>(part) + i * kThreads + threadIdx.x, float4{from[0], from[1], from[2], from[3]});
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        __threadfence();  // for all threads, which the barriers around it order
        *arrived = atomicAdd(p.arrived + tile, 1);
        __threadfence();
      }
      __syncthreads();
      if (*arrived != last - owner) return;

      // Whoever comes last has all parts before it. Several are asked for at once; one that isn't there is zeros.
      constexpr int kAtOnce = kTiles < 4 ? 8 / kTiles : 2;
      if (threadIdx.x == 0) p.arrived[tile] = 0;
#pragma unroll
      for (int i = 0; i < 2 * kTiles; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) sum[i / kTiles][i % kTiles][e] = 0.f;
      for (int from = owner; from <= last; from += kAtOnce) {
        float4 parts[kAtOnce][2 * kTiles];
#pragma unroll
        for (int u = 0; u < kAtOnce; u++) {
          const int b = from + u;
          const float* other = p.partial + (int64_t(b) * 2 + (b == owner)) * X::kPartial;
#pragma unroll
          for (int i = 0; i < 2 * kTiles; i++)
            parts[u][i] = b > last ? float4{} : __ldcg(reinterpret_cast<const float4*>(other) + i * kThreads + threadIdx.x);
        }
#pragma unroll
        for (int u = 0; u < kAtOnce; u++) {
#pragma unroll
          for (int i = 0; i < 2 * kTiles; i++) {
            float(&to)[4] = sum[i / kTiles][i % kTiles];
            to[0] += parts[u][i].x, to[1] += parts[u][i].y, to[2] += parts[u][i].z, to[3] += parts[u][i].w;
          }
        }
      }
    }
    finish(tile);
  };

  int stage = 0;
  for (int64_t item = begin; item < end; item++) {
    wait_copies<X::kStages - 2>();
    __syncthreads();  // all threads' copies are here, and all are done with the stage before
    if (fetched < end) {
      fetch(ahead, stage == 0 ? X::kStages - 1 : stage - 1);
      advance(ahead), fetched++;
    } else {
      commit_copies();
    }
    const unsigned char* tile = shared + stage * X::kStage;
#pragma unroll
    for (int step = 0; step < kChunk / kStep; step++) {
      uint32_t w[2][2][4];
#pragma unroll
      for (int j = 0; j < 2; j++) load_rows(w[j], tile, mine + j * apart, step, quarter);
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
        const uint4 x = *reinterpret_cast<const uint4*>(tile + X::kX + place(n * 8 + eighth, step * 4 + quarter));
#pragma unroll
        for (int j = 0; j < 2; j++) {
          multiply(sum[j][n], w[j][0], x.x, x.y);
          multiply(sum[j][n], w[j][1], x.z, x.w);
        }
      }
    }
    stage = stage + 1 == X::kStages ? 0 : stage + 1;
    const Cursor done = now;
    advance(now);
    if (now.chunk != 0 && item + 1 < end) continue;
    end_tile(done.tile);
#pragma unroll
    for (int i = 0; i < 2 * kTiles; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) sum[i / kTiles][i % kTiles][e] = 0.f;
  }
}

template <int kTiles>
int launch(const Problem& p, int blocks, cudaStream_t stream) {
  using X = Layout<kTiles>;
  const cudaError_t allowed =  // of the device that is current, so each time
      cudaFuncSetAttribute(skinny<X>, cudaFuncAttributeMaxDynamicSharedMemorySize, X::kBytes);
  if (allowed != cudaSuccess) return allowed;
  const int tiles = baton::ceil_div(p.outputs, p.gate ? kRows / 2 : kRows);
  const int64_t items = int64_t(tiles) * baton::ceil_div(p.inputs, kChunk);
  skinny<X><<<int(items < blocks ? items : blocks), kThreads, X::kBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

// inputs is a multiple of 64, outputs of 8, rows of x and out lie multiples of 8 apart; all pointers are multiples of 16.
// outputs counts the columns of `out`: behind a gate, weight and bias have twice as many rows, the gate's first. add: y is
// added to what `out` holds. partial has room for blocks * 2 * 128 * 64 floats, arrived for a zero for each 128 rows of
// the weight.
BATON_EXPORT int skinny_linear(const void* x, const void* weight, const void* bias, void* out, float* partial,
                               int32_t* arrived, int64_t x_stride, int64_t out_stride, int tokens, int outputs,
                               int inputs, int gate, int add, int blocks, cudaStream_t stream) {
  if (tokens == 0 || outputs == 0) return cudaSuccess;
  if (tokens < 0 || tokens > kMaxTokens || outputs < 0 || outputs % 8 != 0 || inputs <= 0 || inputs % 64 != 0 ||
      x_stride % 8 != 0 || out_stride % 8 != 0 || blocks <= 0 || (gate && add))
    return cudaErrorInvalidValue;
  const Problem p{static_cast<const __nv_bfloat16*>(x),
                  static_cast<const unsigned char*>(weight),
                  static_cast<const __nv_bfloat16*>(bias),
                  static_cast<__nv_bfloat16*>(out),
                  partial,
                  arrived,
                  x_stride,
                  out_stride,
                  tokens,
                  outputs,
                  inputs,
                  gate != 0,
                  add != 0};
  if (tokens <= 8) return launch<1>(p, blocks, stream);
  if (tokens <= 16) return launch<2>(p, blocks, stream);
  if (tokens <= 32) return launch<4>(p, blocks, stream);
  return launch<8>(p, blocks, stream);
}
