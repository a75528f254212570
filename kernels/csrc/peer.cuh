// How long a kernel waits for another GPU's: what peer_sum.cu and peer_copy.cu share.
//
// A rank that is late is waited for: it may still load its weights. One that is dead is not noticed here but by the host,
// in seconds, which then ends this process, and the kernel with it; or it writes `stop`, where the process is to go on:
// every wait ends then, and what the kernels give is worth nothing. Should nobody do so, the kernel fails in the end, as a
// launch does that reads where it must not.
#pragma once

#include "common.cuh"
#include "ptx.cuh"

namespace baton {

constexpr uint64_t kPatienceNs = 600'000'000'000;
constexpr int kLooks = 1024;  // for what is waited for, between those at `stop` and the clock

// A number of a rank's: it rises by one and is never 0, which memory is at first, nor the same twice in a row when taken
// by 2, as the halves of an inbox are.
__device__ __forceinline__ uint32_t next_number(uint32_t number) { return number == ~0u ? 2u : number + 1u; }

// One wait, from its first look on.
class Wait {
 public:
  __device__ explicit Wait(const uint32_t* stop) : stop_(stop) {}

  // After a look in vain: whether to look again.
  __device__ bool goes_on() {
    if (++looks_ % kLooks != 0) return true;
    if (load_system(stop_) != 0u) return false;
    const uint64_t now = nanoseconds();
    if (since_ == 0) since_ = now;
    if (now - since_ > kPatienceNs) __trap();
    return true;
  }

 private:
  const uint32_t* stop_;
  uint32_t looks_ = 0;
  uint64_t since_ = 0;
};

// Until the number is there.
__device__ __forceinline__ void await_number(const uint32_t* at, uint32_t number, const uint32_t* stop) {
  Wait wait(stop);
  while (load_system(at) != number && wait.goes_on()) {
  }
}

}  // namespace baton
