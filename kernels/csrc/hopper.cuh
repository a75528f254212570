// Hopper's own instructions, a function each, and the maps of tensors that its copy engine reads by. sm_90a alone; PTX
// ISA 8.7. Shared memory is named by its 32-bit address.
//
// A tile in shared memory is made of atoms: 8 rows of 64 bfloat16 values, 128 bytes each, 1,024 bytes in all, at a
// multiple of 1,024. In an atom the 16-byte vector v of row r lies at place v ^ r ("128-byte swizzle"), so that neither
// rows nor columns meet a bank twice. The copy engine writes tiles so and the matrix units read them so.
#pragma once

#include <cstdint>
#include <cuda.h>  // types of the maps; nothing of the driver is linked
#include <cuda_runtime.h>

namespace baton {

constexpr int kAtom = 1024;  // bytes

// Barriers in shared memory, 8 bytes each. A phase of one ends when as many arrivals and bytes as expected have come;
// phases are told apart by their parity, from 0.

__device__ __forceinline__ void init_barrier(uint32_t at, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(at), "r"(arrivals) : "memory");
}

// What this thread has initialised is so for the copy engine too.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void arrive(uint32_t at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(at) : "memory");
}

// Arrives, and lets the phase expect so many bytes of copies as well.
__device__ __forceinline__ void arrive_expecting(uint32_t at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(at), "r"(bytes) : "memory");
}

// Until the phase of this parity has ended. The one before the first counts as ended, with parity 1.
__device__ __forceinline__ void wait_phase(uint32_t at, uint32_t parity) {
  uint32_t over;
  do {
    asm volatile(
        "{\n.reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n}\n"
        : "=r"(over)
        : "r"(at), "r"(parity)
        : "memory");
  } while (!over);
}

// The hardware's barriers 1 to 15, among `threads` threads that wait or arrive.

__device__ __forceinline__ void wait_named(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void arrive_named(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

// What this thread has written to shared memory is so for the copy engine and the matrix units too.
__device__ __forceinline__ void publish_writes() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// Registers of each thread of this warpgroup from now on.

template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kCount));
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// A box of a mapped tensor to shared memory; its bytes count at the barrier. What lies outside the tensor comes as
// zeros.

__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x0, int x1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];\n" ::"r"(
          to),
      "l"(map), "r"(barrier), "r"(x0), "r"(x1)
      : "memory");
}

__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x0, int x1,
                                         int x2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];\n" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x0), "r"(x1), "r"(x2)
      : "memory");
}

__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x0, int x1, int x2,
                                         int x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];\n" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
      : "memory");
}

__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x0, int x1, int x2,
                                         int x3, int x4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];\n" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4)
      : "memory");
}

// Where a matrix of atoms begins and how they lie. Along its rows of 64 values: `across` bytes from one atom to the
// next; `down`: bytes from 8 rows to the next 8.
__device__ __forceinline__ uint64_t matrix_at(uint32_t start, uint32_t across, uint32_t down) {
  return uint64_t(start >> 4 & 0x3fffu) | uint64_t(across >> 4) << 16 | uint64_t(down >> 4) << 32 | uint64_t(1) << 62;
}

// The same matrix, `bytes` further on.
__device__ __forceinline__ uint64_t moved(uint64_t matrix, int bytes) {
  return (matrix & 0xffffffff00000000u) | (uint32_t(matrix) + uint32_t(bytes >> 4));
}

// Products are asynchronous, in groups, in order. From open_products to the wait that names it, an accumulator and a
// matrix in registers belong to the matrix units, as does what they read in shared memory.
__device__ __forceinline__ void open_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void close_products() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

#define BATON_LIST_4 "%0, %1, %2, %3"
#define BATON_LIST_8 BATON_LIST_4 ", %4, %5, %6, %7"
#define BATON_LIST_16 BATON_LIST_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define BATON_LIST_32 BATON_LIST_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define BATON_LIST_64 BATON_LIST_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define BATON_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define BATON_8(d, i) BATON_4(d, i), BATON_4(d, i + 4)
#define BATON_16(d, i) BATON_8(d, i), BATON_8(d, i + 8)
#define BATON_32(d, i) BATON_16(d, i), BATON_16(d, i + 16)
#define BATON_64(d, i) BATON_32(d, i), BATON_32(d, i + 32)

// kElements, and the places of the three operands after the accumulator's.
#define BATON_ROWS(count, columns, a_at, b_at, add_at) \
  if constexpr (kElements == count) \
    asm volatile( \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %" add_at ", 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32.bf16.bf16 {" BATON_LIST_##count "}, %" a_at ", %" b_at \
        ", add, 1, 1, 0, 0;\n}\n" \
        : BATON_##count(d, 0) \
        : "l"(a), "l"(b), "n"(int(kAdd)))

// d [64, N] = or += a [64, 16] b^T, both from shared memory, rows of 16 values of one atom's columns; b has N rows, 8, 16,
// 32, 64 or 128. Warp w of the warpgroup has rows 16 w to 16 w + 15; lane l elements 8 j + l % 4 * 2 and the next
// of row l / 4 as d[4 j], d[4 j + 1], and of row l / 4 + 8 as d[4 j + 2], d[4 j + 3].
template <bool kAdd, int kElements>
__device__ __forceinline__ void multiply_rows(float (&d)[kElements], uint64_t a, uint64_t b) {
  static_assert(kElements == 4 || kElements == 8 || kElements == 16 || kElements == 32 || kElements == 64);
  BATON_ROWS(4, "8", "4", "5", "6");
  BATON_ROWS(8, "16", "8", "9", "10");
  BATON_ROWS(16, "32", "16", "17", "18");
  BATON_ROWS(32, "64", "32", "33", "34");
  BATON_ROWS(64, "128", "64", "65", "66");
}

// d [64, N] += a [64, 16] b [16, N], a from registers as four of multiply_rows' d[8 k ...] rounded, b's rows from
// shared memory.
__device__ __forceinline__ void multiply_columns(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" BATON_LIST_64 "}, {%64, %65, %66, %67}, %68, "
      "1, 1, 1, 1;\n"
      : BATON_32(d, 0), BATON_32(d, 32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void multiply_columns(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" BATON_LIST_32 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
      : BATON_32(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// All groups but the newest are over. d: what they made; nothing that reads it can be moved before the wait.
#define BATON_WAIT(count) \
  if constexpr (kElements == count) \
    asm volatile("wgmma.wait_group.sync.aligned %" #count ";\n" : BATON_##count(d, 0) : "n"(kNewest) : "memory")

template <int kNewest, int kElements>
__device__ __forceinline__ void wait_products(float (&d)[kElements]) {
  static_assert(kElements == 4 || kElements == 8 || kElements == 16 || kElements == 32 || kElements == 64);
  BATON_WAIT(4);
  BATON_WAIT(8);
  BATON_WAIT(16);
  BATON_WAIT(32);
  BATON_WAIT(64);
}

// The same where newer groups still add to what the older ones made: what they read of shared memory is free again.
template <int kNewest>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kNewest) : "memory");
}

// What makes x, two numbers of which none is below zero, is done before the next wait, not after it, where the compiler
// would have it: it moves no wait over a barrier of the warp, and this one's mask hangs on x.
__device__ __forceinline__ void settle(const float (&x)[2]) {
  asm volatile(
      "{\n.reg .pred below;\n.reg .f32 sum;\n.reg .b32 mask;\n"
      "add.f32 sum, %0, %1;\nsetp.lt.f32 below, sum, 0f00000000;\nselp.b32 mask, 0, -1, below;\n"
      "bar.warp.sync mask;\n}\n" ::"f"(x[0]),
      "f"(x[1])
      : "memory");
}

#undef BATON_ROWS
#undef BATON_WAIT
#undef BATON_LIST_4
#undef BATON_LIST_8
#undef BATON_LIST_16
#undef BATON_LIST_32
#undef BATON_LIST_64
#undef BATON_4
#undef BATON_8
#undef BATON_16
#undef BATON_32
#undef BATON_64

// 2^x, to 2 units in the last place; 0 where that is not a normal number.
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// A map of bfloat16 values from `base`, dimension 0 innermost and of stride 1; strides in bytes, of dimension 1 on,
// multiples of 16; a box's innermost dimension is 64. Host code.
template <int kRank>
cudaError_t make_map(CUtensorMap* map, const void* base, const uint64_t (&sizes)[kRank],
                     const uint64_t (&strides)[kRank - 1], const uint32_t (&box)[kRank]) {
  static void* encode = nullptr;  // the driver's, asked for by name so that nothing links to it
  if (encode == nullptr) {
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t code =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t code = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &encode, cudaEnableDefault, &found);
#endif
    if (code != cudaSuccess) return code;
    if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  }
  uint32_t steps[kRank];
  for (uint32_t& step : steps) step = 1;
  const CUresult code = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank, const_cast<void*>(base), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return code == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace baton
