// Stands in for kernels/csrc/hopper.cuh: the same functions, without PTX. What is asynchronous happens late: a product
// when it is waited for, a box at some random time, or when nothing else can go on. Until then its target holds NaNs.
#pragma once

#include <cuda.h>

namespace baton {

constexpr int kAtom = 1024;

inline unsigned char* hopper_shared(uint32_t address) { return emulation::shared_memory + int32_t(address); }

inline emulation::Phase& phase_at(uint32_t at) {
  auto& phase = *reinterpret_cast<emulation::Phase*>(hopper_shared(at));
  if (at % 8 != 0 || phase.mark != emulation::Phase::kMark) emulation::fail("a barrier that was not initialised");
  return phase;
}

inline void init_barrier(uint32_t at, int arrivals) {
  if (at % 8 != 0 || arrivals < 1 || arrivals > 60000) emulation::fail("a barrier that cannot be");
  *reinterpret_cast<emulation::Phase*>(hopper_shared(at)) = {
      emulation::Phase::kMark, 0, uint16_t(arrivals), uint16_t(arrivals), 0};
}

inline void publish_barriers() {}
inline void arrive(uint32_t at) { phase_at(at).arrive(0); }
inline void arrive_expecting(uint32_t at, int bytes) { phase_at(at).arrive(bytes); }

inline void wait_phase(uint32_t at, uint32_t parity) {
  auto& thread = *emulation::current;
  thread.phase = &phase_at(at);
  thread.parity = parity;
  while (thread.phase->parity == parity) emulation::yield();
  thread.phase = nullptr;
}

inline emulation::Barrier& named(int barrier, int threads) {
  auto& one = emulation::named_barriers[barrier];
  if (barrier < 1 || barrier > 15 || threads % 32 != 0) emulation::fail("a named barrier that cannot be");
  if (one.arrived > 0 && one.alive != threads) emulation::fail("a named barrier of two numbers of threads");
  one.alive = threads;
  return one;
}

inline void wait_named(int barrier, int threads) { emulation::wait(named(barrier, threads)); }

inline void arrive_named(int barrier, int threads) {
  auto& one = named(barrier, threads);
  one.arrived++;
  one.pass_if_full();
}

inline void publish_writes() {}

template <int kCount>
void take_registers() { static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256); }
template <int kCount>
void give_registers() { static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256); }

inline void prefetch_map(const CUtensorMap*) {}

struct Map {
  const unsigned char* base;
  int64_t sizes[5], strides[5];  // strides in bytes
  int32_t box[5], rank;
};

// A position in shared memory, with 128-byte swizzle.
inline unsigned char* swizzled(uint32_t address) { return hopper_shared(address ^ (address >> 7 & 7) << 4); }

inline void copy_map_box(uint32_t to, const CUtensorMap* from, uint32_t barrier, std::vector<int64_t> at) {
  Map map;
  std::memcpy(&map, from, sizeof map);
  if (int(at.size()) != map.rank) emulation::fail("a box of another rank than its map");
  if (to % kAtom != 0) emulation::fail("a box to an address that is not a multiple of 1,024");
  at.resize(5);
  int64_t rows = 1;
  for (int i = 1; i < map.rank; i++) rows *= map.box[i];
  std::memset(hopper_shared(to), 0xff, rows * 128);
  phase_at(barrier);
  emulation::boxes.push_back({to, uint32_t(to + rows * 128), [=] {
    for (int64_t row = 0; row < rows; row++) {
      int64_t left = row;
      const unsigned char* source = map.base;
      bool inside = true;
      for (int i = 1; i < map.rank; i++) {
        const int64_t x = at[i] + left % map.box[i];
        left /= map.box[i];
        inside = inside && x >= 0 && x < map.sizes[i];
        source += x * map.strides[i];
      }
      for (int64_t x = 0; x < 64; x++) {
        unsigned char* target = swizzled(uint32_t(to + row * 128 + x / 8 * 16)) + x % 8 * 2;
        if (inside && at[0] + x < map.sizes[0]) std::memcpy(target, source + (at[0] + x) * 2, 2);
        else std::memset(target, 0, 2);
      }
    }
    phase_at(barrier).complete(int(rows * 128));
  }});
}

inline void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x0, int x1) {
  copy_map_box(to, map, barrier, {x0, x1});
}
inline void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x0, int x1, int x2) {
  copy_map_box(to, map, barrier, {x0, x1, x2});
}
inline void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x0, int x1, int x2, int x3) {
  copy_map_box(to, map, barrier, {x0, x1, x2, x3});
}
inline void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x0, int x1, int x2, int x3, int x4) {
  copy_map_box(to, map, barrier, {x0, x1, x2, x3, x4});
}

inline uint64_t matrix_at(uint32_t start, uint32_t across, uint32_t down) {
  return uint64_t(start >> 4 & 0x3fffu) | uint64_t(across >> 4) << 16 | uint64_t(down >> 4) << 32 | uint64_t(1) << 62;
}

// The same matrix, `bytes` further on.
inline uint64_t moved(uint64_t matrix, int bytes) {
  return (matrix & 0xffffffff00000000u) | (uint32_t(matrix) + uint32_t(bytes >> 4));
}

// As the PTX ISA has it: bits 0 to 13 the start, 16 to 29 the leading, 32 to 45 the stride dimension's offset, each in
// 16 bytes; 49 to 51 the base's offset; 62 and 63 the swizzle, 1 for 128 bytes.
struct Matrix {
  uint32_t start, leading, stride;
  explicit Matrix(uint64_t bits)
      : start(uint32_t(bits & 0x3fff) << 4), leading(uint32_t(bits >> 16 & 0x3fff) << 4),
        stride(uint32_t(bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1) emulation::fail("a matrix without 128-byte swizzle");
    if ((bits >> 49 & 7) != 0 || (start >> 7 & 7) != 0) emulation::fail("a matrix that begins inside an atom");
  }
  // 16 columns of `row`, K-major; the leading offset is not read.
  float major(int row, int k) const { return value(start + row / 8 * stride + row % 8 * 128 + k * 2); }
  // MN-major: a row of K is contiguous over 64 columns.
  float minor(int column, int k) const {
    return value(start + column / 64 * leading + k / 8 * stride + k % 8 * 128 + column % 64 * 2);
  }
  // The atom of this number along the stride offset, and of that along the leading one, is not on its way.
  void check(int down, int across) const {
    const uint32_t atom = (start & ~1023u) + down * stride + across * leading;
    for (const emulation::Box& box : emulation::boxes)
      if (atom < box.end && box.begin < atom + kAtom) emulation::fail("a product of what was not waited for");
  }
  static float value(uint32_t address) {
    uint16_t bits;
    std::memcpy(&bits, swizzled(address & ~15u) + (address & 15u), 2);
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
};

inline float part_of(uint32_t pair, int which) {
  const uint32_t bits = (which ? pair >> 16 : pair & 0xffffu) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void open_products() {}

inline void close_products() {
  auto& thread = *emulation::current;
  thread.product_groups.push_back(std::move(thread.products));
  thread.products.clear();
}

// Until it is waited for, the accumulator shows NaNs.
inline void promise(emulation::Product product) {
  auto& thread = *emulation::current;
  for (int i = 0; thread.lane == 0 && product.a == nullptr && i < product.columns / 8; i++) Matrix(product.b).check(i, 0);
  for (int i = 0; thread.lane == 0 && product.a == nullptr && i < 8; i++) Matrix(product.a_matrix).check(i, 0);
  for (int i = 0; thread.lane == 0 && product.a != nullptr && i < product.columns / 32; i++)
    Matrix(product.b).check(i % 2, i / 2);
  const auto is_same = [&](const emulation::Product& other) { return other.d == product.d; };
  bool pending = std::any_of(thread.products.begin(), thread.products.end(), is_same);
  for (const auto& group : thread.product_groups) pending |= std::any_of(group.begin(), group.end(), is_same);
  if (!pending) {
    product.before.assign(product.d, product.d + product.columns / 2);
    std::fill(product.d, product.d + product.columns / 2, NAN);
  }
  thread.products.push_back(std::move(product));
}

template <bool kAdd, int kElements>
void multiply_rows(float (&d)[kElements], uint64_t a, uint64_t b) {
  promise({d, nullptr, a, b, kElements * 2, kAdd, {}});
}
template <int kElements>
void multiply_columns(float (&d)[kElements], const uint32_t (&a)[4], uint64_t b) {
  promise({d, a, 0, b, kElements * 2, true, {}});
}

// One warp's 16 rows of a product, by one of its lanes.
__attribute__((optimize("O3"))) inline void multiply_warp(emulation::Product* const (&lanes)[32], int warp_in_group) {
  const emulation::Product& one = *lanes[0];
  const Matrix b(one.b);
  const bool rows_of_b = one.a == nullptr;  // else its columns
  static float left[16][16], right[16][256], sums[16][256];
  for (int lane = 0; lane < 32; lane++) {
    const emulation::Product& own = *lanes[lane];
    if (own.b != one.b || own.a_matrix != one.a_matrix || own.columns != one.columns || own.add != one.add ||
        (own.a == nullptr) != rows_of_b)
      emulation::fail("lanes of a warp that multiply different matrices");
    for (int i = 0; i < one.columns / 2; i++)
      sums[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2] = own.add ? own.d[i] : 0.f;
    for (int i = 0; i < 8 && !rows_of_b; i++)
      left[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2] = part_of(own.a[i / 2], i % 2);
  }
  if (rows_of_b) {
    const Matrix a(one.a_matrix);
    for (int row = 0; row < 16; row++)
      for (int k = 0; k < 16; k++) left[row][k] = a.major(warp_in_group * 16 + row, k);
  }
  for (int column = 0; column < one.columns; column++)
    for (int k = 0; k < 16; k++) right[k][column] = rows_of_b ? b.major(column, k) : b.minor(column, k);
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < 16; k++)
      for (int column = 0; column < one.columns; column++) sums[row][column] += left[row][k] * right[k][column];
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < one.columns / 2; i++)
      lanes[lane]->d[i] = sums[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2];
}

template <int kNewest>
void wait_products() {
  auto& thread = *emulation::current;
  if (thread.products.size() > 0) emulation::fail("a wait for products whose group was not closed");
  while (thread.product_groups.size() > kNewest) {
    for (emulation::Product& product : thread.product_groups.front()) {
      if (!product.before.empty()) std::copy(product.before.begin(), product.before.end(), product.d);
      const auto shown = emulation::show(&product);
      if (thread.lane == 0) {
        emulation::Product* lanes[32];
        for (int i = 0; i < 32; i++) lanes[i] = emulation::shown<emulation::Product*>(shown, i);
        multiply_warp(lanes, int(threadIdx.x) / 32 % 4);
      }
      __syncwarp();
    }
    thread.product_groups.erase(thread.product_groups.begin());
  }
}

template <int kNewest, typename D>
void wait_products(D&) { wait_products<kNewest>(); }

inline void settle(const float (&)[2]) { __syncwarp(); }

inline float power_of_two(float x) { return std::exp2(x); }

template <int kRank>
cudaError_t make_map(CUtensorMap* map, const void* base, const uint64_t (&sizes)[kRank],
                     const uint64_t (&strides)[kRank - 1], const uint32_t (&box)[kRank]) {
  static_assert(sizeof(Map) <= sizeof(CUtensorMap) && kRank >= 1 && kRank <= 5);
  Map made{static_cast<const unsigned char*>(base), {}, {}, {}, kRank};
  bool valid = reinterpret_cast<uintptr_t>(base) % 16 == 0 && box[0] == 64;
  for (int i = 0; i < kRank; i++) {
    made.sizes[i] = int64_t(sizes[i]);
    made.strides[i] = i == 0 ? 2 : int64_t(strides[i - 1]);
    made.box[i] = int32_t(box[i]);
    valid = valid && sizes[i] >= 1 && sizes[i] <= uint64_t(1) << 32 && box[i] >= 1 && box[i] <= 256;
    if (i > 0) valid = valid && strides[i - 1] % 16 == 0 && strides[i - 1] < uint64_t(1) << 40;
  }
  if (!valid) return cudaErrorInvalidValue;
  std::memcpy(map, &made, sizeof made);
  return cudaSuccess;
}

}  // namespace baton
