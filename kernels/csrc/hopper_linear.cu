// hopper_linear: y = x W^T on Hopper's matrix units, at any number of rows. bfloat16, sums in float32. Elsewhere the launch
// says cudaErrorInvalidValue, and skinny_linear.cu serves.
//   x [T, I]    weight [O, I]    out [T, O], or [T, O / 2] behind a gate
//
// W is cut into tiles of 128 rows and those into chunks of kColumns columns, laid in a row:
//     tile 0: chunk 0 1 2 ... | tile 1: chunk 0 1 2 ... | ...
// of which each thread block, one a multiprocessor, takes an equal run ("Stream-K", Osama et al., PPoPP 2023), so all end
// together whatever the shape is. The piece of a tile in a run is summed up from zero on the matrix units, and a tile is
// the sum of its pieces in the order of their columns. The cut does not depend on x, so a row of `out` is bit for bit the
// same whatever the other rows are and however many.
//
// Few rows (`few`) are bound by memory: O * I * 2 bytes are read once. Sums of pieces go to a workspace, and the last
// thread block of a tile to arrive adds them up. The next product on the stream, whose weights nobody writes, fills its ring
// with them where a thread block of this one has ended and others have not.
// Many rows (`many`) are bound by the matrix units: 2 T O I operations. A thread block does whole tiles for kMany rows of
// x at a time, and adds pieces up in registers, cut where those of few rows are.
//
// Both have a warp that asks the copy engine for boxes of W and x, and two warpgroups of 64 rows of the tile each that do
//     y^T [64, N tokens] += W [64, 16 columns] x^T [16 columns, N tokens]
// from shared memory. Behind a gate a tile has 64 of its rows and the 64 of the other half that they meet, 8 by 8: the two
// that make an element of `out` are then a lane's own.
#include "common.cuh"

#if __CUDA_ARCH_LIST__ == 900
#include "hopper.cuh"
#include "launch.cuh"
#include "pairs.cuh"
#include "ptx.cuh"
#include "ring.cuh"

#include <climits>

namespace {

using namespace baton;

// On an H200 a ring of which two thread blocks fit (111 KB) was 2 to 38 % slower over a layer, one of which three fit 20 to
// 40 %, and kColumns 128 with the former as slow from 32 rows on. To be tried: kGroup 4, 16; kMostStages 12.
constexpr int kColumns = 64;               // of W in a chunk
constexpr int kMostFew = 64;               // rows of x
constexpr int kRingBytes = 220 << 10;      // of few rows: one thread block at a time on a multiprocessor
constexpr int kMany = 128;                 // rows of x at a time
constexpr int kManyRingBytes = 224 << 10;
constexpr int kGroup = 8;                  // slabs of x that take turns at a tile, so that the L2 cache holds both
constexpr int kRows = 128;                 // of W in a tile
constexpr int kMostStages = 8;
constexpr int kComputing = 256;            // threads
constexpr int kMeeting = 1;                // named barrier of those
constexpr unsigned kAll = 0xffffffffu;

struct Problem {
  const __nv_bfloat16* bias;  // [O], or null
  __nv_bfloat16* out;
  float* partial;             // [cuts][2][kRows * kTokens]
  int32_t* arrived;           // [tiles], zeros between launches
  int64_t out_stride;         // elements between two tokens
  int tokens, outputs;        // outputs: columns of `out`
  int tiles, chunks, cuts;    // chunks: of a tile; cuts: how many runs W is cut into
  bool add;
};

// Which run a chunk is in, and where that begins; chunks are counted through all tiles.
__device__ __forceinline__ int run_of(const Problem& p, int64_t chunk) {
  return int(((chunk + 1) * p.cuts - 1) / (int64_t(p.tiles) * p.chunks));
}
__device__ __forceinline__ int64_t run_begin(const Problem& p, int run) {
  return int64_t(p.tiles) * p.chunks * run / p.cuts;
}

template <int kTokens_, int kRing, bool kGate_>
struct Layout {
  static constexpr int kTokens = kTokens_;                 // rows of x in a slab
  static constexpr bool kGate = kGate_;
  static constexpr int kOutputs = kGate ? kRows / 2 : kRows;  // columns of `out` of a tile
  static constexpr int kWeight = kRows * kColumns * 2;     // bytes of W in a stage, x behind them
  static constexpr int kStage = kWeight + kTokens * kColumns * 2;
  static constexpr int kRest = kMostStages * 16 + 16;      // barriers, and who has arrived
  static constexpr int kRoom = (kRing - kRest) / kStage;
  static constexpr int kStages = kRoom < kMostStages ? kRoom : kMostStages;
  static constexpr int kBarriers = kStages * kStage;
  static constexpr int kBytes = kBarriers + kRest;
  static constexpr int kElements = kTokens / 2;            // of a tile's sums in one thread
  static_assert(kStages >= 2 && kBytes <= kSharedBytes);
};

template <typename X>
struct Ring {
  uint32_t start;
  __device__ __forceinline__ uint32_t weight(int slot) const { return start + slot * X::kStage; }
  __device__ __forceinline__ uint32_t x(int slot) const { return weight(slot) + X::kWeight; }
  __device__ __forceinline__ uint32_t filled(int slot) const { return start + X::kBarriers + slot * 16; }
  __device__ __forceinline__ uint32_t emptied(int slot) const { return filled(slot) + 8; }

  __device__ __forceinline__ void prepare() const {
    for (int slot = 0; slot < X::kStages; slot++) {
      init_barrier(filled(slot), 1);
      init_barrier(emptied(slot), kComputing / 32);
    }
    publish_barriers();
  }

  // Asks for a chunk of W; the phase of its slot ends when x's has come as well.
  __device__ __forceinline__ void fetch_weight(const CUtensorMap* map, int slot, int tile, int chunk) const {
    arrive_expecting(filled(slot), X::kStage);
#pragma unroll
    for (int column = 0; column < kColumns; column += 64) {
      const uint32_t to = weight(slot) + column * kRows * 2;
      if (X::kGate) copy_box(to, map, filled(slot), chunk * kColumns + column, 0, 0, tile * (kRows / 16));
      else copy_box(to, map, filled(slot), chunk * kColumns + column, tile * kRows);
    }
  }

  __device__ __forceinline__ void fetch_x(const CUtensorMap* map, int slot, int token, int chunk) const {
#pragma unroll
    for (int column = 0; column < kColumns; column += 64)
      copy_box(x(slot) + column * X::kTokens * 2, map, filled(slot), chunk * kColumns + column, token);
  }

  // Begins to add the product of what a slot holds, of a warpgroup's 64 rows.
  __device__ __forceinline__ void begin_products(float (&sum)[X::kElements], int slot, int which) const {
    const uint64_t rows = matrix_at(weight(slot) + which * 8 * kAtom, 16, kAtom);
    const uint64_t tokens = matrix_at(x(slot), 16, kAtom);
    open_products();
#pragma unroll
    for (int k = 0; k < kColumns / 16; k++)
      multiply_rows<true>(sum, moved(rows, k / 4 * kRows * 128 + k % 4 * 32),
                          moved(tokens, k / 4 * X::kTokens * 128 + k % 4 * 32));
    close_products();
  }
};

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

// Of a token's 16 outputs, four lanes have two of the lower 8 as x and two of the upper 8 as y; then lanes 0 and 2 have
// four of the lower, 1 and 3 four of the upper, as x and y. And back.
__device__ __forceinline__ void widen(uint32_t& x, uint32_t& y, bool odd) {
  const uint32_t other = __shfl_xor_sync(kAll, odd ? x : y, 1);
  (odd ? x : y) = other;
}

// The sums of a tile, bias, gate or what is there, to `out`, for tokens from `first_token` on. warp: of the tile's 8.
template <typename X>
__device__ __forceinline__ void finish(const Problem& p, const float (&sum)[X::kElements], int tile, int first_token,
                                       int warp, int lane) {
  const int eighth = lane / 4, quarter = lane % 4;
  const bool odd = lane & 1;
  const int first = tile * X::kOutputs + warp * (X::kOutputs / 8);  // output
  float bias[2] = {};
  if (p.bias != nullptr) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int output = first + eighth + (X::kGate ? 0 : h * 8);
      if (output < p.outputs) bias[h] = __bfloat162float(p.bias[output + (X::kGate ? h * p.outputs : 0)]);
    }
  }
  const int mine = first + (X::kGate ? quarter * 2 : odd ? 8 + quarter * 2 - 2 : quarter * 2);
  const bool is_there = mine < p.outputs;
#pragma unroll
  for (int n = 0; n < X::kTokens / 8; n++) {
    if (first_token + n * 8 >= p.tokens) break;
    const int token = first_token + n * 8 + eighth;  // of what is read and written; sums are of other tokens
    __nv_bfloat16* to = p.out + token * p.out_stride + mine;
    const bool writes = is_there && token < p.tokens;
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; i++) y[i] = sum[n * 4 + i] + bias[i / 2];
    if constexpr (X::kGate) {
      const uint32_t gated = transposed(pack(silu(y[0]) * y[2], silu(y[1]) * y[3]));
      if (writes) *reinterpret_cast<uint32_t*>(to) = gated;
    } else {
      if (p.add) {
        uint2 old{};
        if (writes) old = *reinterpret_cast<const uint2*>(to);
        widen(old.x, old.y, odd);
        const uint32_t low = transposed(old.x), high = transposed(old.y);
        y[0] += low_half(low), y[1] += high_half(low), y[2] += low_half(high), y[3] += high_half(high);
      }
      uint2 made{transposed(pack(y[0], y[1])), transposed(pack(y[2], y[3]))};
      widen(made.x, made.y, odd);
      if (writes) *reinterpret_cast<uint2*>(to) = made;
    }
  }
}

// A thread block's piece of a tile goes to the workspace. The last of the tile's to arrive has its sums in the end.
template <typename X>
__device__ __forceinline__ bool merge(const Problem& p, float (&sum)[X::kElements], int tile, int32_t* arrived) {
  constexpr int kVecs = X::kElements / 4, kAtOnce = kVecs < 4 ? 8 / kVecs : 2;
  const int block = blockIdx.x;
  const int owner = run_of(p, int64_t(tile) * p.chunks), last = run_of(p, int64_t(tile + 1) * p.chunks - 1);
  if (owner == last) return true;
  const auto part = [&](int of) {
    return reinterpret_cast<float4*>(p.partial + (int64_t(of) * 2 + (of == owner)) * kRows * X::kTokens) + threadIdx.x;
  };
#pragma unroll
  for (int i = 0; i < kVecs; i++)
    __stcg(part(block) + i * kComputing, float4{sum[i * 4], sum[i * 4 + 1], sum[i * 4 + 2], sum[i * 4 + 3]});
  __threadfence();
  wait_named(kMeeting, kComputing);
  if (threadIdx.x == 0) *arrived = atomicAdd(p.arrived + tile, 1);
  wait_named(kMeeting, kComputing);
  if (*arrived != last - owner) return false;
  __threadfence();
  if (threadIdx.x == 0) p.arrived[tile] = 0;
#pragma unroll
  for (int i = 0; i < X::kElements; i++) sum[i] = 0.f;
  for (int from = owner; from <= last; from += kAtOnce) {
    float4 parts[kAtOnce][kVecs];
#pragma unroll
    for (int u = 0; u < kAtOnce; u++)
#pragma unroll
      for (int i = 0; i < kVecs; i++)
        parts[u][i] = from + u > last ? float4{} : __ldcg(part(from + u) + i * kComputing);
#pragma unroll
    for (int u = 0; u < kAtOnce; u++)
#pragma unroll
      for (int i = 0; i < kVecs; i++) {
        sum[i * 4] += parts[u][i].x, sum[i * 4 + 1] += parts[u][i].y;
        sum[i * 4 + 2] += parts[u][i].z, sum[i * 4 + 3] += parts[u][i].w;
      }
  }
  return true;
}

// One thread block for each run. The last warp asks for copies, the others compute.
template <typename X>
__global__ void __launch_bounds__(kComputing + 32, 2)
    few(const Problem p, const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap x_map) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const Ring<X> ring{uint32_t(__cvta_generic_to_shared(memory))};
  const int warp = __shfl_sync(kAll, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  let_next_begin();
  if (threadIdx.x == kComputing) {
    prefetch_map(&weight_map), prefetch_map(&x_map);
    ring.prepare();
  }
  __syncthreads();
  const int64_t begin = run_begin(p, blockIdx.x);
  const int count = int(run_begin(p, blockIdx.x + 1) - begin);
  int tile = int(begin / p.chunks), chunk = int(begin % p.chunks);
  RingPlace<X::kStages> place;
  if (warp == kComputing / 32) {
    if (lane != 0) return;
    const auto advance = [&](int& of, int& at) {
      if (++at == p.chunks) at = 0, of++;
    };
    const int ahead = count < X::kStages ? count : X::kStages;
    int next_tile = tile, next_chunk = chunk;
    for (int slot = 0; slot < ahead; slot++) {
      ring.fetch_weight(&weight_map, slot, next_tile, next_chunk);
      advance(next_tile, next_chunk);
    }
    await_earlier();
    for (int i = 0; i < count; i++) {
      if (i >= ahead) {
        wait_phase(ring.emptied(place.slot), place.parity ^ 1);
        ring.fetch_weight(&weight_map, place.slot, tile, chunk);
      }
      ring.fetch_x(&x_map, place.slot, 0, chunk);
      advance(tile, chunk);
      place.advance();
    }
    return;
  }

  await_earlier();
  const int which = warp / 4;
  float sum[X::kElements];
  for (int i = 0; i < count;) {
    const int end = min(count, i + p.chunks - chunk);
#pragma unroll
    for (int e = 0; e < X::kElements; e++) sum[e] = 0.f;
    int slot = -1;  // that products in flight may still read
    for (; i < end; i++) {
      wait_phase(ring.filled(place.slot), place.parity);
      ring.begin_products(sum, place.slot, which);
      if (slot >= 0) {
        wait_products<1>();
        if (lane == 0) arrive(ring.emptied(slot));
      }
      slot = place.slot;
      place.advance();
    }
    wait_products<0>(sum);
    if (lane == 0) arrive(ring.emptied(slot));
    if (merge<X>(p, sum, tile, reinterpret_cast<int32_t*>(memory + X::kBytes - 16)))
      finish<X>(p, sum, tile, 0, warp, lane);
    chunk = 0, tile++;
  }
}

// Tiles and slabs of kTokens rows of x in the order in which thread blocks take them.
struct Work {
  int tile, slab;
};

template <typename X>
__device__ __forceinline__ Work work_at(const Problem& p, int index, int slabs) {
  const int group = index / (kGroup * p.tiles), in_group = index % (kGroup * p.tiles);
  const int size = min(kGroup, slabs - group * kGroup);
  return {in_group / size, group * kGroup + in_group % size};
}

// As many thread blocks as there are multiprocessors. The first warpgroup asks for copies, the others compute.
template <typename X>
__global__ void __launch_bounds__(kComputing + 128, 1)
    many(const Problem p, const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap x_map) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const Ring<X> ring{uint32_t(__cvta_generic_to_shared(memory))};
  const int lane = threadIdx.x % 32;
  let_next_begin();
  if (threadIdx.x == 0) {
    prefetch_map(&weight_map), prefetch_map(&x_map);
    ring.prepare();
  }
  __syncthreads();
  const int slabs = ceil_div(p.tokens, X::kTokens), works = p.tiles * slabs;
  RingPlace<X::kStages> place;
  if (threadIdx.x < 128) {
    give_registers<40>();
    if (threadIdx.x != 0) return;
    await_earlier();
    for (int index = blockIdx.x; index < works; index += gridDim.x) {
      const Work work = work_at<X>(p, index, slabs);
      for (int chunk = 0; chunk < p.chunks; chunk++) {
        wait_phase(ring.emptied(place.slot), place.parity ^ 1);
        ring.fetch_weight(&weight_map, place.slot, work.tile, chunk);
        ring.fetch_x(&x_map, place.slot, work.slab * X::kTokens, chunk);
        place.advance();
      }
    }
    return;
  }

  take_registers<232>();
  await_earlier();
  const int which = __shfl_sync(kAll, threadIdx.x / 128, 0) - 1, warp = __shfl_sync(kAll, threadIdx.x / 32, 0) - 4;
  for (int index = blockIdx.x; index < works; index += gridDim.x) {
    const Work work = work_at<X>(p, index, slabs);
    const int64_t first = int64_t(work.tile) * p.chunks;
    float sum[X::kElements], total[X::kElements];
#pragma unroll
    for (int e = 0; e < X::kElements; e++) total[e] = 0.f;
    for (int chunk = 0; chunk < p.chunks;) {
      const int64_t border = run_begin(p, run_of(p, first + chunk) + 1) - first;
      const int end = border < p.chunks ? int(border) : p.chunks;
#pragma unroll
      for (int e = 0; e < X::kElements; e++) sum[e] = 0.f;
      int slot = -1;
      for (; chunk < end; chunk++) {
        place.slot = __shfl_sync(kAll, place.slot, 0);  // shuffled, it is known to be the same in all lanes
        wait_phase(ring.filled(place.slot), place.parity);
        ring.begin_products(sum, place.slot, which);
        if (slot >= 0) {
          wait_products<1>();
          if (lane == 0) arrive(ring.emptied(slot));
        }
        slot = place.slot;
        place.advance();
      }
      wait_products<0>(sum);
      if (lane == 0) arrive(ring.emptied(slot));
#pragma unroll
      for (int e = 0; e < X::kElements; e++) total[e] += sum[e];
    }
    finish<X>(p, total, work.tile, work.slab * X::kTokens, warp, lane);
  }
}

struct Call {
  Problem p;
  const __nv_bfloat16 *x, *weight;
  int64_t x_stride;
  int inputs, blocks;
  cudaStream_t stream;
};

template <typename X, typename Kernel>
int launch_with(const Call& c, Kernel kernel, int blocks, int threads) {
  const uint64_t row = uint64_t(c.inputs) * 2, outputs = c.p.outputs;
  CUtensorMap weight_map, x_map;
  const cudaError_t weight_code =
      X::kGate ? make_map<4>(&weight_map, c.weight, {uint64_t(c.inputs), 8, 2, outputs / 8},
                             {row, outputs * row, 8 * row}, {64, 8, 2, kRows / 16})
               : make_map<2>(&weight_map, c.weight, {uint64_t(c.inputs), outputs}, {row}, {64, kRows});
  if (weight_code != cudaSuccess) return weight_code;
  const cudaError_t x_code = make_map<2>(&x_map, c.x, {uint64_t(c.inputs), uint64_t(c.p.tokens)},
                                         {uint64_t(c.x_stride) * 2}, {64, X::kTokens});
  if (x_code != cudaSuccess) return x_code;
  const cudaError_t allowed =  // of the device that is current, so each time
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, X::kBytes);
  if (allowed != cudaSuccess) return allowed;
  return launch(kernel, dim3(blocks), threads, X::kBytes, c.stream, c.p, weight_map, x_map);
}

template <int kTokens, bool kGate>
int launch_few(const Call& c) {
  using X = Layout<kTokens, kRingBytes, kGate>;
  return launch_with<X>(c, few<X>, c.p.cuts, kComputing + 32);
}

template <bool kGate>
int launch_any(Call c) {
  c.p.tiles = ceil_div(c.p.outputs, kGate ? kRows / 2 : kRows);
  c.p.chunks = ceil_div(c.inputs, kColumns);
  const int64_t all = int64_t(c.p.tiles) * c.p.chunks;
  c.p.cuts = int(all < c.blocks ? all : c.blocks);
  if (c.p.tokens <= 8) return launch_few<8, kGate>(c);
  if (c.p.tokens <= 16) return launch_few<16, kGate>(c);
  if (c.p.tokens <= 32) return launch_few<32, kGate>(c);
  if (c.p.tokens <= kMostFew) return launch_few<64, kGate>(c);
  using X = Layout<kMany, kManyRingBytes, kGate>;
  const int64_t works = int64_t(c.p.tiles) * ceil_div(c.p.tokens, kMany);
  if (works > INT_MAX / 2) return cudaErrorInvalidValue;
  return launch_with<X>(c, many<X>, int(works < c.blocks ? works : c.blocks), kComputing + 128);
}

}  // namespace
#endif

// inputs is a multiple of 64, outputs of 8, rows of x and out lie multiples of 8 apart; all pointers are multiples of 16.
// outputs counts the columns of `out`: behind a gate, weight and bias have twice as many rows, the gate's first. add: y is
// added to what `out` holds. partial has room for blocks * 2 * 128 * 64 floats, arrived for a zero for each 128 rows of
// the weight.
BATON_EXPORT int hopper_linear(const void* x, const void* weight, const void* bias, void* out, float* partial,
                               int32_t* arrived, int64_t x_stride, int64_t out_stride, int tokens, int outputs,
                               int inputs, int gate, int add, int blocks, cudaStream_t stream) {
#if __CUDA_ARCH_LIST__ == 900
  if (tokens == 0 || outputs == 0) return cudaSuccess;
  if (tokens < 0 || outputs < 0 || outputs % 8 != 0 || inputs <= 0 || inputs % 64 != 0 || x_stride % 8 != 0 ||
      out_stride % 8 != 0 || blocks <= 0 || (gate && add))
    return cudaErrorInvalidValue;
  const Call call{{static_cast<const __nv_bfloat16*>(bias), static_cast<__nv_bfloat16*>(out), partial, arrived,
                   out_stride, tokens, outputs, 0, 0, 0, add != 0},
                  static_cast<const __nv_bfloat16*>(x),
                  static_cast<const __nv_bfloat16*>(weight),
                  x_stride,
                  inputs,
                  blocks,
                  stream};
  return gate ? launch_any<true>(call) : launch_any<false>(call);
#else
  return cudaErrorInvalidValue;
#endif
}
