// Sixteen bytes, as a thread loads them, and the floats that they stand for.
#pragma once

#include "common.cuh"
#include "pairs.cuh"

namespace baton {

template <typename T>
constexpr int kPerVec = kVecBytes / int(sizeof(T));  // elements

template <typename T>
__device__ __forceinline__ void unpack(const uint4& raw, float (&x)[kPerVec<T>]);

template <>
__device__ __forceinline__ void unpack<float>(const uint4& raw, float (&x)[4]) {
  x[0] = __uint_as_float(raw.x), x[1] = __uint_as_float(raw.y);
  x[2] = __uint_as_float(raw.z), x[3] = __uint_as_float(raw.w);
}

template <>
__device__ __forceinline__ void unpack<__nv_bfloat16>(const uint4& raw, float (&x)[8]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; i++) x[2 * i] = low_half(words[i]), x[2 * i + 1] = high_half(words[i]);
}

// Each rounded to the nearest T.
template <typename T>
__device__ __forceinline__ uint4 pack(const float (&x)[kPerVec<T>]);

template <>
__device__ __forceinline__ uint4 pack<float>(const float (&x)[4]) {
  return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
}

template <>
__device__ __forceinline__ uint4 pack<__nv_bfloat16>(const float (&x)[8]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) words[i] = pack(x[2 * i], x[2 * i + 1]);
  return {words[0], words[1], words[2], words[3]};
}

}  // namespace baton
