// silu_gate: the gated activation, gate / (1 + e^-gate) * up.
//   gate_up [R, 2F], a row's gate before its up    out [R, F]
// Each thread makes 16 bytes of `out`, in float32 and rounded once. Bound by memory: 3 * R * F elements. Thread blocks are
// small, so that one row (14 of them, at F = 14336 in bfloat16) is read by many multiprocessors.
#include "launch.cuh"
#include "vectors.cuh"

namespace {

using baton::kPerVec;
using baton::pack;
using baton::unpack;

constexpr int kThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads)
gate_vecs(const uint4* gate_up, uint4* out, int vecs) {
  const int64_t row = blockIdx.x;
  const int at = blockIdx.y * kThreads + threadIdx.x;
  baton::let_next_begin();
  if (at >= vecs) return;
  baton::await_earlier();
  const uint4* from = gate_up + row * 2 * vecs + at;
  const uint4 halves[2] = {from[0], from[vecs]};
  float gate[kPerVec<T>], up[kPerVec<T>];
  unpack<T>(halves[0], gate);
  unpack<T>(halves[1], up);
#pragma unroll
  for (int e = 0; e < kPerVec<T>; e++) gate[e] = __fdividef(gate[e], 1.f + expf(-gate[e])) * up[e];
  out[row * vecs + at] = pack<T>(gate);
}

template <typename T>
int launch(const void* gate_up, void* out, int rows, int vecs, cudaStream_t stream) {
  const dim3 grid(rows, baton::ceil_div(vecs, kThreads));
  return baton::launch(gate_vecs<T>, grid, kThreads, 0, stream, static_cast<const uint4*>(gate_up),
                       static_cast<uint4*>(out), vecs);
}

}  // namespace

// vecs: vectors of 16 bytes in a row of `out`. dtype: 0 float32, 1 bfloat16.
BATON_EXPORT int silu_gate(const void* gate_up, void* out, int dtype, int rows, int vecs, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  if (rows < 0 || vecs <= 0 || vecs > 0xffff * kThreads) return cudaErrorInvalidValue;
  switch (dtype) {
    case 0: return launch<float>(gate_up, out, rows, vecs, stream);
    case 1: return launch<__nv_bfloat16>(gate_up, out, rows, vecs, stream);
    default: return cudaErrorInvalidValue;
  }
}
