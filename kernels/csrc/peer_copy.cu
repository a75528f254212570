// peer_copy: bytes of one of two ranks to the other: a call of send there, one of receive here.
//   x [n] bytes    out [rows, stride] bytes, of which the received are put at `column` of each row, and `own` [rows, row]
//   before it where there is one: so the parts of the ranks come to lie side by side
//   slots [S, kSlotBytes]    came, taken [S], of who receives    acked, sent [S], of who sends    zeros at first
// A thread block of each rank has a slot in the receiver's memory and passes its bytes through it, a slot at a time: who
// sends fills it and says so in `came`; who receives empties it and says so in `acked`, and only then is it filled again.
// Slots count for themselves, on the device, so that a captured launch counts on, and any number of them may be in use.
// Both ranks cut n bytes alike. Bound by the link; few bytes by latency: there, and a number after them.
#include "launch.cuh"
#include "peer.cuh"

namespace {

using baton::await_number;
using baton::ceil_div;
using baton::next_number;

constexpr int kThreads = 512;
constexpr int kSlotBytes = 256 << 10;
constexpr int kShareBytes = 4 << 10;  // of a thread block, at least: fewer bytes are for fewer blocks

// Each round passes a share for every thread block, one after the other.
struct Cut {
  int64_t bytes;  // in all
  int share;      // bytes, at most a slot

  __device__ int64_t begin(int round) const { return (int64_t(round) * gridDim.x + blockIdx.x) * share; }
  __device__ int words(int round, int word) const {
    const int64_t left = bytes - begin(round);
    return left <= 0 ? 0 : int(left < share ? left : share) / word;
  }
};

template <typename Word>
__global__ void __launch_bounds__(kThreads) send(const char* x, char* slots_there, uint32_t* came_there,
                                                 const uint32_t* acked_here, uint32_t* sent, const uint32_t* stop,
                                                 const Cut cut) {
  baton::let_next_begin();
  baton::await_earlier();
  uint32_t number = __ldcg(sent + blockIdx.x);
  auto* slot = reinterpret_cast<Word*>(slots_there + int64_t(blockIdx.x) * kSlotBytes);
  for (int round = 0, words; (words = cut.words(round, sizeof(Word))) > 0; round++) {
    if (threadIdx.x == 0) await_number(acked_here + blockIdx.x, number, stop);  // it has emptied the slot
    __syncthreads();
    const auto* from = reinterpret_cast<const Word*>(x + cut.begin(round));
#pragma unroll 4
    for (int i = threadIdx.x; i < words; i += kThreads) slot[i] = from[i];
    baton::fence_system();
    __syncthreads();
    number = next_number(number);
    if (threadIdx.x == 0) baton::signal_system(came_there + blockIdx.x, number);
  }
  __syncthreads();  // all have read the count
  if (threadIdx.x == 0) sent[blockIdx.x] = number;
}

template <typename Word>
__device__ __forceinline__ Word load(const Word* at) {
  return *const_cast<const volatile Word*>(at);
}
template <>
__device__ __forceinline__ uint4 load<uint4>(const uint4* at) {
  return __ldcg(at);
}

template <typename Word>
__global__ void __launch_bounds__(kThreads) receive(const char* own, char* out, const char* slots_here,
                                                    const uint32_t* came_here, uint32_t* acked_there, uint32_t* taken,
                                                    const uint32_t* stop, const Cut cut, int64_t row, int64_t stride,
                                                    int64_t column) {
  baton::let_next_begin();
  baton::await_earlier();
  uint32_t number = __ldcg(taken + blockIdx.x);
  const auto* slot = reinterpret_cast<const Word*>(slots_here + int64_t(blockIdx.x) * kSlotBytes);
  const int row_words = int(row / sizeof(Word));
  for (int round = 0, words; (words = cut.words(round, sizeof(Word))) > 0; round++) {
    const int64_t first = cut.begin(round) / int64_t(sizeof(Word));
    const auto place = [&](int i, int64_t at) {  // of the i-th word in out
      const int64_t word = first + i, r = word / row_words;
      return reinterpret_cast<Word*>(out + r * stride + at) + (word - r * row_words);
    };
    if (own != nullptr) {
      for (int i = threadIdx.x; i < words; i += kThreads) *place(i, 0) = reinterpret_cast<const Word*>(own)[first + i];
    }
    number = next_number(number);
    if (threadIdx.x == 0) await_number(came_here + blockIdx.x, number, stop);
    __syncthreads();
#pragma unroll 4
    for (int i = threadIdx.x; i < words; i += kThreads) *place(i, column) = load(slot + i);
    __syncthreads();
    if (threadIdx.x == 0) baton::signal_system(acked_there + blockIdx.x, number);
  }
  __syncthreads();  // all have read the count
  if (threadIdx.x == 0) taken[blockIdx.x] = number;
}

// The same on both ranks: bytes alone decide.
int blocks_of(int64_t bytes, int slots) {
  const int64_t shares = ceil_div<int64_t>(bytes, kShareBytes);
  return int(shares < slots ? shares : slots);
}

Cut cut_of(int64_t bytes, int blocks) {
  const int64_t share = ceil_div<int64_t>(ceil_div<int64_t>(bytes, blocks), kShareBytes) * kShareBytes;
  return {bytes, int(share < kSlotBytes ? share : kSlotBytes)};
}

// Calls `with` a value of the widest word that divides all that is asked.
template <typename With>
int widest(int64_t bits, With with) {
  if (bits % 16 == 0) return with(uint4{});
  if (bits % 4 == 0) return with(uint32_t{});
  if (bits % 2 == 0) return with(uint16_t{});
  return with(uint8_t{});
}

}  // namespace

BATON_EXPORT int peer_send(const void* x, void* slots_there, uint32_t* came_there, const uint32_t* acked_here,
                           uint32_t* sent, const uint32_t* stop, int64_t bytes, int slots, cudaStream_t queue) {
  if (bytes == 0) return cudaSuccess;
  if (bytes < 0 || slots <= 0) return cudaErrorInvalidValue;
  const int blocks = blocks_of(bytes, slots);
  return widest(int64_t(reinterpret_cast<uintptr_t>(x)) | bytes, [&](auto word) {
    return baton::launch(send<decltype(word)>, dim3(blocks), kThreads, 0, queue, static_cast<const char*>(x),
                         static_cast<char*>(slots_there), came_there, acked_here, sent, stop, cut_of(bytes, blocks));
  });
}

// rows of `row` bytes each are received; own null: `column` is 0.
BATON_EXPORT int peer_receive(const void* own, void* out, const void* slots_here, const uint32_t* came_here,
                              uint32_t* acked_there, uint32_t* taken, const uint32_t* stop, int64_t rows, int64_t row,
                              int64_t stride, int slots, cudaStream_t queue) {
  const int64_t bytes = rows * row;
  if (bytes == 0) return cudaSuccess;
  if (bytes < 0 || slots <= 0 || stride < row) return cudaErrorInvalidValue;
  const int blocks = blocks_of(bytes, slots);
  const int64_t column = own == nullptr ? 0 : row;
  const auto bits = int64_t(reinterpret_cast<uintptr_t>(out) | reinterpret_cast<uintptr_t>(own)) | row | stride;
  return widest(bits, [&](auto word) {
    return baton::launch(receive<decltype(word)>, dim3(blocks), kThreads, 0, queue, static_cast<const char*>(own),
                         static_cast<char*>(out), static_cast<const char*>(slots_here), came_here, acked_there, taken,
                         stop, cut_of(bytes, blocks), row, stride, column);
  });
}
