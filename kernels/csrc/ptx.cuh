// The instructions of the GPU that C++ has no word for, a function each. PTX ISA 8.7; all from sm_80 on. Shared memory is
// named by its 32-bit address.
#pragma once

#include <cstdint>

namespace baton {

// 16 bytes, both addresses multiples of 16; zeros where nothing is there.
__device__ __forceinline__ void copy_16(uint32_t to, const void* from, bool there) {
  const int size = there ? 16 : 0;  // of what is not copied there are zeros
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(size));
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n"); }

// All this thread's copies are here but those of its newest groups.
template <int kNewest>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kNewest));
}

// Four 8 x 8 matrices of 16-bit elements: lanes 8 i to 8 i + 7 name the rows of the i-th, 16 bytes each. Lane l gets
// elements l % 4 * 2 and the next of row l / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(from));
}

// As load_matrices, each matrix transposed.
__device__ __forceinline__ void load_transposed(uint32_t (&x)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(from));
}

// Of one 8 x 8 matrix that the warp holds as load_matrices gives it.
__device__ __forceinline__ uint32_t transposed(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(y) : "r"(x));
  return y;
}

// c [16, 8] += a [16, 16] b [16, 8], bfloat16 into float32.
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What this thread wrote is there for every GPU of the host, and the host, before what it writes next.
__device__ __forceinline__ void fence_system() { __threadfence_system(); }

// A number for another GPU to wait for, once all that this thread wrote, or met at a barrier, is there.
__device__ __forceinline__ void signal_system(uint32_t* at, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;\n" ::"l"(at), "r"(value) : "memory");
}

// A number that another GPU, or the host, writes. What was there before it is there for whoever has seen it.
__device__ __forceinline__ uint32_t load_system(const uint32_t* at) {
  uint32_t found;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];\n" : "=r"(found) : "l"(at) : "memory");
  return found;
}

// Two words for another GPU, each with a flag that arrives with it: of 16 bytes, the halves are written whole.
__device__ __forceinline__ void store_flagged(uint4* to, uint32_t a, uint32_t b, uint32_t flag) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %3, %2, %3};\n" ::"l"(to), "r"(a), "r"(b), "r"(flag) : "memory");
}

// What store_flagged writes, in its order: word, flag, word, flag.
__device__ __forceinline__ uint4 load_flagged(const uint4* from) {
  uint4 found;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
               : "l"(from)
               : "memory");
  return found;
}

// By a clock that every multiprocessor reads alike.
__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;\n" : "=l"(now));
  return now;
}

}  // namespace baton
