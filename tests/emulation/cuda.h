// CUDA kernels as plain C++: each thread of a block is a fiber, blocks run one after another on the calling thread.
// Included in front of a source that library.py has rewritten: <<<>>> became `emulation::launch`, shared memory static.
//
// A fiber runs until it must wait for others (a barrier, a shuffle, a matrix product), so what a kernel forgets to wait for
// shows as a wrong result, the more since each round of fibers goes in another order, and the blocks of each launch too.
// Shared memory begins as NaNs, and an asynchronous copy happens as late as it may (ptx.cuh, hopper.cuh). Not shown: what
// needs two blocks at once, which proxy a write was made for, and anything of speed.
#pragma once

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static
#undef __global__
#define __global__ [[maybe_unused]] static
#undef __device__
#define __device__ [[maybe_unused]]
#undef __grid_constant__
#define __grid_constant__
#undef __forceinline__
#define __forceinline__ inline
#undef __noinline__
#define __noinline__ inline
#undef __grid_constant__
#define __grid_constant__

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;
constexpr size_t kShared = 227 << 10;
alignas(1024) inline unsigned char shared_memory[kShared];

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s\n", what);
  std::abort();
}

// What waits until as many have come as are alive.
struct Barrier {
  int alive = 0, arrived = 0;
  uint64_t turn = 0;
  void pass_if_full() {
    if (arrived == alive && alive > 0) arrived = 0, turn++;
  }
};

struct Warp {
  Barrier barrier;
  uint64_t slots[2][kWarp][8];  // what lanes show each other, in turn
};

// What lies in shared memory for a barrier that threads and copies arrive at. A phase ends when both numbers are 0.
struct Phase {
  static constexpr uint8_t kMark = 0xb5;
  uint8_t mark, parity;
  uint16_t expected, missing;
  int16_t bytes;  // still to come, in 16s
  void arrive(int more) {
    if (missing == 0) fail("more arrivals at a barrier than it expects");
    bytes += more / 16, missing--;
    end_if_over();
  }
  void complete(int count) {
    bytes -= count / 16;
    end_if_over();
  }
  void end_if_over() {
    if (missing == 0 && bytes == 0) parity ^= 1, missing = expected;
  }
};
static_assert(sizeof(Phase) == 8);

// One lane's part of a matrix product that a warpgroup has begun: d += or = a b, a from registers or shared memory.
struct Product {
  float* d;
  const uint32_t* a;
  uint64_t a_matrix, b;
  int columns;
  bool add;
  std::vector<float> before;  // what d held, unless an earlier product in flight makes it
};

struct PendingCopy {
  void* to;
  const void* from;
  int bytes, zeros;
};

struct Thread {
  uint3 index;
  int lane;
  Warp* warp;
  uint64_t shows = 0;
  std::vector<PendingCopy> copies;             // not yet committed
  std::vector<std::vector<PendingCopy>> groups;  // committed, oldest first
  std::vector<Product> products;                 // of a group that is still open
  std::vector<std::vector<Product>> product_groups;  // oldest first
  void* stack_pointer = nullptr;
  std::unique_ptr<unsigned char[]> stack;
  const Barrier* awaited = nullptr;
  uint64_t awaited_turn = 0;
  const Phase* phase = nullptr;  // awaited, until its parity is another
  uint32_t parity = 0;
  bool over = false;
  bool waits() const {
    return over || (awaited && awaited->turn == awaited_turn) || (phase && phase->parity == parity);
  }
};

inline Thread* current;
inline void* scheduler_stack_pointer;
inline const std::function<void()>* body;
inline Barrier block_barrier, named_barriers[16];
struct Box {
  uint32_t begin, end;  // in shared memory
  std::function<void()> copy;
};
inline std::vector<Box> boxes;  // that have not been copied yet
inline int block_sum;
inline uint3 block_index;
inline dim3 block_size, grid_size;

// Saves the callee's registers on one stack and takes them from another (System V, x86-64).
extern "C" void emulation_switch(void** save, void* load);
asm(R"(
.text
.type emulation_switch,@function
.hidden emulation_switch
.weak emulation_switch
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch,.-emulation_switch
)");

inline void yield() { emulation_switch(&current->stack_pointer, scheduler_stack_pointer); }

inline void wait(Barrier& barrier) {
  current->awaited = &barrier;
  current->awaited_turn = barrier.turn;
  barrier.arrived++;
  barrier.pass_if_full();
  while (current->awaited->turn == current->awaited_turn) yield();
  current->awaited = nullptr;
}

inline void run_thread() {
  (*body)();
  current->over = true;
  for (Barrier* barrier : {&block_barrier, &current->warp->barrier}) {
    barrier->alive--;
    barrier->pass_if_full();
  }
  yield();
  fail("a thread that had ended ran on");
}

inline void prepare(Thread& thread) {
  if (!thread.stack) thread.stack.reset(new unsigned char[kStack]);
  uintptr_t top = reinterpret_cast<uintptr_t>(thread.stack.get() + kStack) & ~uintptr_t(15);
  void** frame = reinterpret_cast<void**>(top) - 2;  // so that the stack is aligned as after a call
  frame[0] = reinterpret_cast<void*>(&run_thread);
  frame[1] = nullptr;
  thread.stack_pointer = frame - 6;
  std::memset(thread.stack_pointer, 0, 6 * sizeof(void*));
}

inline void copy_a_box(std::mt19937& order) {
  std::swap(boxes[order() % boxes.size()], boxes.back());
  const Box box = std::move(boxes.back());
  boxes.pop_back();
  box.copy();
}

inline void run_block(std::vector<Thread>& threads, std::mt19937& order) {
  static std::vector<Warp> warps;
  warps.assign((threads.size() + kWarp - 1) / kWarp, Warp{});
  block_barrier = Barrier{int(threads.size())};
  for (Barrier& barrier : named_barriers) barrier = Barrier{};
  std::memset(shared_memory, 0xff, sizeof shared_memory);
  for (size_t i = 0; i < threads.size(); i++) {
    Thread& thread = threads[i];
    const unsigned x = block_size.x, y = block_size.y;
    thread.index = {unsigned(i) % x, unsigned(i) / x % y, unsigned(i) / (x * y)};
    thread.lane = int(i % kWarp);
    thread.warp = &warps[i / kWarp];
    thread.warp->barrier.alive++;
    thread.shows = 0;
    thread.copies.clear();
    thread.groups.clear();
    thread.products.clear();
    thread.product_groups.clear();
    thread.phase = nullptr;
    thread.over = false;
    thread.awaited = nullptr;
    prepare(thread);
  }
  std::vector<int> turns(threads.size());
  std::iota(turns.begin(), turns.end(), 0);
  for (size_t left = threads.size(); left > 0;) {
    std::shuffle(turns.begin(), turns.end(), order);
    bool moved = false;
    for (int at : turns) {
      Thread& thread = threads[at];
      if (thread.waits()) continue;
      moved = true;
      current = &thread;
      emulation_switch(&scheduler_stack_pointer, thread.stack_pointer);
      if (thread.over) left--;
    }
    if (!moved && boxes.empty()) fail("threads wait for each other for ever");
    if (!boxes.empty() && (!moved || order() % 4 == 0)) copy_a_box(order);
  }
  if (!boxes.empty()) fail("a block that ended before its copies");
}

template <typename Body>
void launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, Body run) {
  if (shared_bytes > kShared) fail("more shared memory than a block can have");
  static std::vector<Thread> threads;  // their stacks are kept for the next launch
  const std::function<void()> whole = run;
  body = &whole;
  grid_size = grid;
  block_size = block;
  threads.resize(size_t(block.x) * block.y * block.z);
  static unsigned launches = 0;
  std::mt19937 order(unsigned(threads.size()) + grid.x + launches++);
  std::vector<uint3> blocks;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) blocks.push_back({x, y, z});
  std::shuffle(blocks.begin(), blocks.end(), order);
  for (const uint3& at : blocks) {
    block_index = at;
    run_block(threads, order);
  }
}

template <typename Body>
void launch(dim3 grid, dim3 block, size_t shared_bytes, Body run) { launch(grid, block, shared_bytes, nullptr, run); }
template <typename Body>
void launch(dim3 grid, dim3 block, Body run) { launch(grid, block, 0, nullptr, run); }

// Every lane shows up to 64 bytes; what `lanes[i]` then holds is lane i's, until the next but one call.
template <typename T>
const uint64_t (*show(const T& value))[8] {
  static_assert(sizeof(T) <= 64);
  Thread& thread = *current;
  auto& slots = thread.warp->slots[thread.shows++ % 2];
  std::memcpy(slots[thread.lane], &value, sizeof(T));
  wait(thread.warp->barrier);
  return slots;
}

template <typename T>
T shown(const uint64_t (*lanes)[8], int lane) {
  T value;
  std::memcpy(&value, lanes[lane & (kWarp - 1)], sizeof(T));
  return value;
}

inline void copy_group(std::vector<PendingCopy>& group) {
  for (const PendingCopy& copy : group) {
    if (copy.bytes) std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.zeros);
  }
  group.clear();
}

}  // namespace emulation

#define threadIdx (emulation::current->index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_size)
#define gridDim (emulation::grid_size)

inline void __syncthreads() { emulation::wait(emulation::block_barrier); }
inline int __syncthreads_count(int predicate) {
  __syncthreads();
  emulation::block_sum = 0;
  __syncthreads();
  emulation::block_sum += predicate != 0;
  __syncthreads();
  return emulation::block_sum;
}
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) > 0; }
inline void __syncwarp(unsigned = ~0u) { emulation::wait(emulation::current->warp->barrier); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __shfl_sync(unsigned, T value, int lane, int width = 32) {
  const int first = emulation::current->lane / width * width;
  return emulation::shown<T>(emulation::show(value), first + lane % width);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const int lane = emulation::current->lane;
  return emulation::shown<T>(emulation::show(value), lane ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int by) {
  const int lane = emulation::current->lane;
  return emulation::shown<T>(emulation::show(value), lane >= by ? lane - by : lane);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int by) {
  const int lane = emulation::current->lane;
  return emulation::shown<T>(emulation::show(value), lane + by < 32 ? lane + by : lane);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const auto lanes = emulation::show(predicate);
  unsigned all = 0;
  for (int i = 0; i < 32; i++) all |= unsigned(emulation::shown<int>(lanes, i) != 0) << i;
  return all;
}
inline int __any_sync(unsigned all, int predicate) { return __ballot_sync(all, predicate) != 0; }
inline int __all_sync(unsigned all, int predicate) { return __ballot_sync(all, predicate) == ~0u; }
template <typename T>
T __reduce_add_sync(unsigned, T value) {
  const auto lanes = emulation::show(value);
  T sum = 0;
  for (int i = 0; i < 32; i++) sum += emulation::shown<T>(lanes, i);
  return sum;
}
template <typename T>
T __reduce_max_sync(unsigned, T value) {
  const auto lanes = emulation::show(value);
  T top = emulation::shown<T>(lanes, 0);
  for (int i = 1; i < 32; i++) top = std::max(top, emulation::shown<T>(lanes, i));
  return top;
}

[[noreturn]] inline void __trap() { emulation::fail("a kernel gave up"); }
template <typename T> T __ldg(const T* from) { return *from; }
template <typename T> T __ldcg(const T* from) { return *from; }
template <typename T> T __ldcs(const T* from) { return *from; }
template <typename T> void __stcg(T* to, T value) { *to = value; }
template <typename T> void __stcs(T* to, T value) { *to = value; }
template <typename T, typename U> T atomicAdd(T* at, U by) { const T was = *at; *at = was + T(by); return was; }
template <typename T, typename U> T atomicMax(T* at, U by) { const T was = *at; *at = std::max(was, T(by)); return was; }
template <typename T, typename U> T atomicOr(T* at, U by) { const T was = *at; *at = was | T(by); return was; }
template <typename T, typename U> T atomicExch(T* at, U by) { const T was = *at; *at = T(by); return was; }
template <typename T> T atomicCAS(T* at, T is, T then) { const T was = *at; if (was == is) *at = then; return was; }

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __int_as_float(int x) { float y; std::memcpy(&y, &x, 4); return y; }
inline int __float_as_int(float x) { int y; std::memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }

inline size_t __cvta_generic_to_shared(const void* at) {  // 32 bits of it are used: what lies near `shared_memory` fits
  return size_t(static_cast<const unsigned char*>(at) - emulation::shared_memory);
}

extern "C" {
inline cudaError_t emulated_get_last_error() { return cudaSuccess; }
}
#define cudaGetLastError emulated_get_last_error
#define cudaFuncSetAttribute(...) cudaSuccess
#define cudaGetErrorString(code) "an error of the emulation's caller"
