// Asks for the beginning of each row of a weight that is read soon, while the memory has nothing else to do: it waits in
// the L2 cache then. Nothing writes weights, so whoever asks waits for no kernel.
#pragma once

#include <algorithm>

#include "common.cuh"
#include "ptx.cuh"

namespace baton {

constexpr int kMostAsking = 128;  // thread blocks
constexpr int kRowsOfAsking = 32;  // at least, of a block

struct Ahead {
  const char* weight;
  int64_t pitch;    // bytes from row to row
  int rows, bytes;  // asked for, of each row; 0: nothing is

  bool valid() const {
    return bytes >= 0 && bytes <= pitch && bytes % 16 == 0 && pitch % 16 == 0 &&
           reinterpret_cast<uintptr_t>(weight) % 16 == 0;
  }
  int blocks() const { return bytes == 0 ? 0 : std::min(kMostAsking, ceil_div(rows, kRowsOfAsking)); }

  // The share of a thread block, one of so many.
  __device__ void ask(int block, int blocks) const {
    for (int row = block * blockDim.x + threadIdx.x; row < rows; row += blocks * blockDim.x)
      prefetch_bytes(weight + row * pitch, bytes);
  }
};

}  // namespace baton
