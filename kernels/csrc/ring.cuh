// A ring of slots in shared memory that the copy engine fills and others empty, in turns.
#pragma once

#include <cstdint>

namespace baton {

// A place in a ring, and whether it was passed an odd number of times.
template <int kCount>
struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kCount) slot = 0, parity ^= 1;
  }
};

}  // namespace baton
