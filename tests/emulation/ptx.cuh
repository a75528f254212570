// Stands in for kernels/csrc/ptx.cuh: the same functions, without PTX. Layouts as in the PTX ISA, "Matrix fragments".
#pragma once

namespace baton {

inline void* at_shared(uint32_t address) { return emulation::shared_memory + int32_t(address); }

inline void copy_16(uint32_t to, const void* from, bool there) {
  if (to % 16 != 0) emulation::fail("an asynchronous copy to an address that is not a multiple of 16");
  emulation::current->copies.push_back({at_shared(to), from, there ? 16 : 0, there ? 0 : 16});
}

inline void commit_copies() {
  auto& thread = *emulation::current;
  thread.groups.push_back(std::move(thread.copies));
  thread.copies.clear();
}

template <int kNewest>
void wait_copies() {
  auto& groups = emulation::current->groups;
  while (groups.size() > kNewest) {
    emulation::copy_group(groups.front());
    groups.erase(groups.begin());
  }
}

inline void load_matrices(uint32_t (&x)[4], uint32_t from) {
  const auto lanes = emulation::show(from);
  const int lane = emulation::current->lane;
  for (int i = 0; i < 4; i++) {
    const char* row = static_cast<const char*>(at_shared(emulation::shown<uint32_t>(lanes, i * 8 + lane / 4)));
    std::memcpy(&x[i], row + lane % 4 * 4, 4);
  }
}

inline void load_transposed(uint32_t (&x)[4], uint32_t from) {
  const auto lanes = emulation::show(from);
  const int lane = emulation::current->lane;
  for (int i = 0; i < 4; i++) {
    uint16_t pair[2];
    for (int j = 0; j < 2; j++) {
      const char* row = static_cast<const char*>(at_shared(emulation::shown<uint32_t>(lanes, i * 8 + lane % 4 * 2 + j)));
      std::memcpy(&pair[j], row + lane / 4 * 2, 2);
    }
    std::memcpy(&x[i], pair, 4);
  }
}

inline uint32_t transposed(uint32_t x) {
  const auto lanes = emulation::show(x);
  const int lane = emulation::current->lane;
  uint32_t y = 0;
  for (int j = 0; j < 2; j++) {
    const int row = lane % 4 * 2 + j, column = lane / 4;
    const uint32_t pair = emulation::shown<uint32_t>(lanes, row * 4 + column / 2);
    y |= (pair >> (column % 2 * 16) & 0xffffu) << (j * 16);
  }
  return y;
}

inline float half_of(uint32_t pair, int which) {
  uint32_t bits = (which ? pair >> 16 : pair & 0xffffu) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// m16n8k16, bfloat16 in, float32 out.
inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Parts { uint32_t a[4], b[2]; } mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto lanes = emulation::show(mine);
  const int lane = emulation::current->lane;
  Parts all[32];
  for (int i = 0; i < 32; i++) all[i] = emulation::shown<Parts>(lanes, i);
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    float sum = c[i];
    for (int k = 0; k < 16; k++) {
      const float left = half_of(all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k % 2);
      const float right = half_of(all[column * 4 + k % 8 / 2].b[k / 8], k % 2);
      sum += left * right;
    }
    c[i] = sum;
  }
}

// Another GPU is another process that shares memory with this one.
inline void fence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void signal_system(uint32_t* at, uint32_t value) { std::atomic_ref(*at).store(value); }
inline uint32_t load_system(const uint32_t* at) {
  std::this_thread::yield();  // who waits has nothing else to do
  return std::atomic_ref(*const_cast<uint32_t*>(at)).load();
}

inline uint64_t with_flag(uint32_t word, uint32_t flag) { return word | uint64_t(flag) << 32; }
inline void store_flagged(uint4* to, uint32_t a, uint32_t b, uint32_t flag) {
  auto* halves = reinterpret_cast<uint64_t*>(to);
  std::atomic_ref(halves[0]).store(with_flag(a, flag));
  std::atomic_ref(halves[1]).store(with_flag(b, flag));
}
inline uint4 load_flagged(const uint4* from) {
  std::this_thread::yield();
  auto* halves = reinterpret_cast<uint64_t*>(const_cast<uint4*>(from));
  const uint64_t first = std::atomic_ref(halves[0]).load(), second = std::atomic_ref(halves[1]).load();
  return {uint32_t(first), uint32_t(first >> 32), uint32_t(second), uint32_t(second >> 32)};
}

inline uint64_t nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace baton
