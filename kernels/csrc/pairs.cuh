// Two bfloat16 values in one word, the first in its lower half, as the tensor cores take them.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>

namespace baton {

// A bfloat16 is the upper half of a float.
__device__ __forceinline__ float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// Each rounded to the nearest.
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

}  // namespace baton
