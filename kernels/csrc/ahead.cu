// fetch_ahead: see ahead.cuh. A kernel for where none of those that follow could ask: the next one begins meanwhile.
//   weight [rows, pitch bytes], which nothing writes
#include "ahead.cuh"
#include "launch.cuh"

namespace {

constexpr int kThreads = 64;

__global__ void __launch_bounds__(kThreads) ask(const baton::Ahead ahead) {
  baton::let_next_begin();
  ahead.ask(blockIdx.x, gridDim.x);
  baton::await_earlier();  // who waits for this kernel waits for those before it
}

}  // namespace

BATON_EXPORT int fetch_ahead(const void* weight, int64_t pitch, int rows, int bytes, cudaStream_t queue) {
  const baton::Ahead ahead{static_cast<const char*>(weight), pitch, rows, bytes};
  if (rows < 0 || !ahead.valid()) return cudaErrorInvalidValue;
  if (ahead.blocks() == 0) return cudaSuccess;
  return baton::launch(ask, dim3(ahead.blocks()), kThreads, 0, queue, ahead);
}
