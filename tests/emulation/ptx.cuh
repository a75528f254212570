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
inline void await_system(const uint32_t* at, uint32_t value) {
  const std::atomic_ref found(*const_cast<uint32_t*>(at));
  const auto until = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  while (int32_t(found.load() - value) < 0) {
    if (std::chrono::steady_clock::now() > until) emulation::fail("the other GPU sent nothing for a minute");
    std::this_thread::yield();
  }
}

}  // namespace baton
