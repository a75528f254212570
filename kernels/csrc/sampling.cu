// choose_tokens: a token for each row of logits, and logprobs, without ranking the vocabulary. docs/sampling.md.
//   logits [S, V] float or bfloat16, V <= 2^18    tokens [S] int64, largest [S] float
//   own [S] float, top [S, n] float, top_ids [S, n] int64, of rows that ask for logprobs
// Three kernels, of which greedy rows need the first alone:
//   survey   the first best of each row
//   weigh    a histogram of weights by distance from the best, and from it the bins that matter
//   choose   the tokens of these bins, sorted: cuts, token, logprobs
// Sums of weights are integers, so that nothing depends on how rows are cut into parts. Bound by memory: each kernel reads
// S * V logits, the last two from L2 where they fit; but `weigh` by shared memory's atomics where a row's tokens lie close.
// count_tokens: the tables of rows learn which tokens were chosen.
#include "sampling.cuh"

namespace {

using namespace baton;

__device__ __forceinline__ Best joined(Best a, Best b) {
  return {max(a.edited, b.edited), max(a.raw, b.raw), a.bad | b.bad};
}

// What a thread block has to do: a part of a row, for one task.
struct Place {
  int s, part;
  Task task;
};
__device__ __forceinline__ Place place() { return {int(blockIdx.y), int(blockIdx.x), Task(blockIdx.z)}; }

__device__ __forceinline__ bool is_nobodys(const Problem& p, int s) { return p.rows && p.at[s] < 0; }

__device__ __forceinline__ int part_begin(const Problem& p, int part) {  // in groups
  return int(int64_t(groups_of(p.vocab)) * part / p.parts);
}

// What a row asks for.
struct Wishes {
  int top_k;     // 0: no draw
  int logprobs;  // -1: none
  Scale scale;   // of the task
  bool some;     // the task is among them, and the logits allow it
};
__device__ __forceinline__ Wishes wishes_of(const Problem& p, const Row* row, const Best& best, Task task) {
  const uint64_t from = task == kDraw ? best.edited : best.raw;
  Wishes found{row ? row->top_k : 0, min(row ? row->logprobs : p.given, p.vocab), {logit_of(from), kLog2e}, false};
  if (task == kDraw && row) found.scale.rate = row->rate;
  const bool wanted = task == kDraw ? found.top_k > 0 : found.logprobs >= 0;
  found.some = wanted && best.bad == 0 && found.scale.best > -INFINITY;
  return found;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) survey(const __grid_constant__ Problem p) {
  const Place here = place();
  if (is_nobodys(p, here.s)) return;
  const Line<T> line = line_of<T>(p, here.s, kDraw);
  const bool edits = line.touched || line.allowed;
  int key = INT32_MIN, token = 0, raw_key = INT32_MIN, raw_token = 0;
  bool bad = false;
  visit<4 / sizeof(T)>(line, part_begin(p, here.part), part_begin(p, here.part + 1),
        [&](int group, float(&x)[kGroup], const Group<T>& from) {
#pragma unroll
          for (int i = 0; i < kGroup; i++) {
            if (group * kGroup + i >= p.vocab) continue;
            bad |= !(x[i] < INFINITY);
            const int found = ordered(x[i]);
            if (found > raw_key) raw_key = found, raw_token = group * kGroup + i;
          }
          if (!edits) return;
          line.edit(from, group, x);
#pragma unroll
          for (int i = 0; i < kGroup; i++) {
            if (group * kGroup + i >= p.vocab) continue;
            const int found = ordered(x[i]);
            if (found > key) key = found, token = group * kGroup + i;
          }
        });
  const uint64_t raw = pack(raw_key, raw_token);
  Best best{edits ? pack(key, token) : raw, raw, bad};
  best.edited = reduce(best.edited, [](uint64_t a, uint64_t b) { return max(a, b); });
  best.raw = reduce(best.raw, [](uint64_t a, uint64_t b) { return max(a, b); });
  best.bad = reduce(best.bad, [](uint32_t a, uint32_t b) { return a | b; });

  State& state = p.states[here.s];
  if (threadIdx.x == 0) state.parts[here.part] = best;
  if (!comes_last(&state.surveyed, p.parts) || threadIdx.x != 0) return;
  for (int part = 0; part < p.parts; part++) {
    const Best& its = state.parts[part];
    best = joined(best, {__ldcg(&its.edited), __ldcg(&its.raw), __ldcg(&its.bad)});
  }
  state.all = best;
  if (!p.largest) return;
  const int chosen = token_of(best.edited);
  const bool nothing_left = line.allowed && logit_of(best.edited) == -INFINITY;
  p.tokens[here.s] = chosen;
  p.largest[here.s] = best.bad || nothing_left ? NAN : line.raw(chosen);
}

constexpr Range kNone{0, 0, kBins, -1};

__device__ __forceinline__ Range range_of(const Histogram& h, int first, int last) {
  return {h.mass_before[first], h.counts[first], first, last};
}

// Where top_k and top_p cut, and where the number falls: each in one bin, or one of a few while a cut before it is known
// only as far as its bin goes. Masses in [low, high].
__device__ Plan plan_of(const Histogram& h, const Row& row, uint64_t least_mass, double number, int vocab) {
  Plan plan{h.total, least_mass, number, kNone, kNone, kNone};
  uint64_t low = h.total, high = h.total;
  if (row.top_k < vocab) {
    const int bin = h.bin_of_rank(row.top_k - 1);
    if (h.mass_before[bin] < h.total) {  // else what is cut off weighs nothing
      plan.top_k = range_of(h, bin, bin);
      low = max(h.mass_before[bin], uint64_t(1)), high = h.mass_after(bin);
    }
  }
  if (row.top_p < 1) {
    const uint64_t least = share_up(row.top_p, low), most = share_up(row.top_p, high);
    const int last = h.bin_of_mass(most - 1);
    plan.top_p = range_of(h, h.bin_of_mass(least - 1), last);
    low = least, high = min(high, h.mass_after(last));
  }
  low = min(low, least_mass), high = min(high, least_mass);
  plan.token = range_of(h, h.bin_of_mass(share_down(number, low)), h.bin_of_mass(share_down(number, high)));
  return plan;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) weigh(const __grid_constant__ Problem p) {
  extern __shared__ __align__(16) unsigned char shared[];
  Histogram& h = *reinterpret_cast<Histogram*>(shared);
  const Place here = place();
  if (is_nobodys(p, here.s)) return;
  const Line<T> line = line_of<T>(p, here.s, here.task);
  State& state = p.states[here.s];
  const Wishes wishes = wishes_of(p, line.row, state.all, here.task);
  if (!wishes.some) return;
  const Scale scale = wishes.scale;
  const bool draws = here.task == kDraw;
  const bool ranks = draws ? wishes.top_k < p.vocab : wishes.logprobs > 0;
  const float least = draws ? line.row->least : -INFINITY;
  const bool has_least = least > -INFINITY;
  h.clear();
  uint64_t least_mass = 0;
  visit_tokens<4 / sizeof(T)>(line, part_begin(p, here.part), part_begin(p, here.part + 1), [&](int, float x) {
    const float octaves = scale.octaves(x);
    const int bin = Scale::bin(octaves);
    const uint64_t units = Scale::units(octaves);
    h.add(bin, units);
    // Nobody asks how many the last bin has: there may be thousands, all that a mask forbids.
    if (ranks && bin < kBins - 1) atomicAdd(&h.counts[bin], 1u);
    if (has_least && octaves >= least) least_mass += units;
  });
  if (has_least) least_mass = reduce(least_mass, [](uint64_t a, uint64_t b) { return a + b; });
  __syncthreads();
  uint64_t mass[Histogram::kEach];
  uint32_t count[Histogram::kEach];
  h.read(mass, count);
  if (p.parts > 1) {
    uint32_t* records = p.histograms + int64_t(here.s * 2 + here.task) * p.parts * kRecord;
    uint32_t* record = records + here.part * kRecord;
    for (int i = threadIdx.x; i < 3 * kBins / 4; i += kThreads)
      __stcg(reinterpret_cast<uint4*>(record) + i, reinterpret_cast<const uint4*>(shared)[i]);
    if (threadIdx.x == 0) __stcg(reinterpret_cast<uint64_t*>(record + 3 * kBins), least_mass);
    if (!comes_last(&state.arrived[here.task], p.parts)) return;
    for (int part = 0; part < p.parts; part++) {
      if (part == here.part) continue;
      const uint32_t* its = records + part * kRecord;
      static_assert(Histogram::kEach == 4);
      const uint4* vecs = reinterpret_cast<const uint4*>(its) + threadIdx.x;
      const uint4 low = __ldcg(vecs), high = __ldcg(vecs + kBins / 4), counts = __ldcg(vecs + kBins / 2);
      const uint32_t lows[] = {low.x, low.y, low.z, low.w}, highs[] = {high.x, high.y, high.z, high.w};
      const uint32_t more[] = {counts.x, counts.y, counts.z, counts.w};
#pragma unroll
      for (int i = 0; i < 4; i++) mass[i] += uint64_t(highs[i]) << 32 | lows[i], count[i] += more[i];
      least_mass += __ldcg(reinterpret_cast<const uint64_t*>(its + 3 * kBins));
    }
  }
  h.sum_up(mass, count);
  if (threadIdx.x != 0) return;
  if (draws) {
    const double number = uniform(line.row->stream, uint64_t(p.positions[here.s]));
    state.plans[kDraw] = plan_of(h, *line.row, has_least ? least_mass : h.total, number, p.vocab);
  } else {
    Plan plan{h.total, 0, 0, kNone, kNone, kNone};
    if (ranks) plan.top_k = range_of(h, 0, h.bin_of_rank(wishes.logprobs - 1));
    state.plans[kLogprobs] = plan;
  }
}

// The fast path's memory: candidates best first, and the running sums of what they weigh.
struct Candidates {
  uint64_t packed[kCandidates], sums[kCandidates];

  // Of `count` in any order.
  __device__ void sort(int count) {
    int size = 2;
    while (size < count) size *= 2;
    for (int i = count + threadIdx.x; i < size; i += kThreads) packed[i] = 0;
    for (int run = 2; run <= size; run *= 2)
      for (int step = run / 2; step > 0; step /= 2) {
        __syncthreads();
        for (int i = threadIdx.x; i < size / 2; i += kThreads) {
          const int a = 2 * i - (i & (step - 1)), b = a + step;
          const uint64_t left = packed[a], right = packed[b];
          if ((left < right) == ((a & run) == 0)) packed[a] = right, packed[b] = left;
        }
      }
    __syncthreads();
  }

  __device__ void sum_up(int count, const Scale& scale) {
    const int each = (count + kThreads - 1) / kThreads, first = threadIdx.x * each, end = min(first + each, count);
    uint64_t mine = 0, all;
    for (int i = first; i < end; i++) mine += Scale::units(scale.octaves(logit_of(packed[i])));
    uint64_t sum = sum_before(mine, &all);
    for (int i = first; i < end; i++) sums[i] = sum += Scale::units(scale.octaves(logit_of(packed[i])));
    __syncthreads();
  }

  // Where the candidates of a range begin.
  __device__ int first_of(const Range& range, int count, const Scale& scale) const {
    int low = 0, high = count;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (Scale::bin(scale.octaves(logit_of(packed[middle]))) < range.first) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  // The running sum over all tokens up to candidate i, which lies in the range.
  __device__ uint64_t mass_up_to(int i, const Range& range, int first) const {
    return range.mass_before + sums[i] - (first > 0 ? sums[first - 1] : 0);
  }

  // The candidate of the range at which that passes `mass`.
  __device__ int passing(uint64_t mass, const Range& range, int first, int count) const {
    int low = first, high = count - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (mass_up_to(middle, range, first) > mass) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  // One thread: cuts, then the token.
  __device__ int draw(int count, const Plan& plan, const Row& row, const Scale& scale) const {
    uint64_t left = plan.total;
    if (plan.top_k.last >= 0) {
      const int first = first_of(plan.top_k, count, scale);
      left = mass_up_to(first + row.top_k - 1 - int(plan.top_k.count_before), plan.top_k, first);
    }
    if (row.top_p < 1) {
      const int first = first_of(plan.top_p, count, scale);
      left = mass_up_to(passing(share_up(row.top_p, left) - 1, plan.top_p, first, count), plan.top_p, first);
    }
    left = min(left, plan.least_mass);
    const int first = first_of(plan.token, count, scale);
    return token_of(packed[passing(share_down(plan.number, left), plan.token, first, count)]);
  }
};

// A token and the running sum up to it, over the whole row best first.
struct Found {
  uint64_t packed, mass;
};

// The slow path, one thread block for a row: the token at which the running sum passes `mass`, or that `rank` others are
// better than (rank -1: by mass). By 11, 11 and 10 bits of the ordered logit; equals by counting along the ids.
template <typename T>
__device__ __noinline__ Found find(const Problem& p, int s, Task task, uint64_t mass, int rank, Histogram& h) {
  const Line<T> line = line_of<T>(p, s, task);
  const Scale scale = wishes_of(p, line.row, p.states[s].all, task).scale;
  __shared__ int chosen;
  uint32_t prefix = 0, count_before = 0;
  uint64_t mass_before = 0;
  for (int shift = 21, bits = 11; bits > 0; bits = min(11, shift), shift -= bits) {
    const uint32_t mask = (1u << bits) - 1;
    const int above = shift + bits;
    __syncthreads();
    h.clear();
    visit_tokens<1>(line, 0, line.groups(), [&](int, float x) {
      const uint32_t key = uint32_t(ordered(x)) ^ 0x80000000u;
      if (above < 32 && (key ^ prefix) >> above != 0) return;
      const int bin = int(mask - (key >> shift & mask));
      h.add(bin, Scale::units(scale.octaves(x)));
      atomicAdd(&h.counts[bin], 1u);
    });
    __syncthreads();
    uint64_t masses[Histogram::kEach];
    uint32_t counts[Histogram::kEach];
    h.read(masses, counts);
    __syncthreads();
    h.sum_up(masses, counts);
    const int bin = rank < 0 ? h.bin_of_mass(mass - mass_before) : h.bin_of_rank(rank - count_before);
    mass_before += h.mass_before[bin], count_before += h.counts[bin];
    prefix |= (mask - uint32_t(bin)) << shift;
  }
  const uint64_t packed = uint64_t(prefix) << 32;
  const uint64_t units = Scale::units(scale.octaves(logit_of(packed)));
  int equals = rank < 0 ? int((mass - mass_before) / units) : rank - int(count_before);  // that come before it
  mass_before += uint64_t(equals + 1) * units;
  for (int base = 0; base < line.groups(); base += kThreads) {
    const int group = base + int(threadIdx.x);
    unsigned here = 0;  // which of the group
    if (group < line.groups()) {
      float x[kGroup];
      const Group<T> from = line.fetch(group);
      line.unpack(from, x);
      line.edit(from, group, x);
      for (int i = 0; i < kGroup; i++) {
        const bool same = (uint32_t(ordered(x[i])) ^ 0x80000000u) == prefix;
        here |= unsigned(same && group * kGroup + i < line.vocab) << i;
      }
    }
    int all;
    const int before = sum_before(__popc(here), &all);
    if (equals >= before && equals < before + __popc(here)) {
      for (int skip = equals - before; skip > 0; skip--) here &= here - 1;
      chosen = group * kGroup + __ffs(int(here)) - 1;
    }
    if (equals < all) break;
    equals -= all;
  }
  __syncthreads();
  return {packed | uint32_t(~chosen), mass_before};
}

template <typename T>
__device__ __noinline__ int draw_slowly(const Problem& p, int s, Histogram& h) {
  const Row& row = p.rows[p.at[s]];
  const Plan& plan = p.states[s].plans[kDraw];
  uint64_t left = plan.total;
  if (row.top_k < p.vocab) left = find<T>(p, s, kDraw, 0, row.top_k - 1, h).mass;
  if (row.top_p < 1) left = find<T>(p, s, kDraw, share_up(row.top_p, left) - 1, -1, h).mass;
  left = min(left, plan.least_mass);
  return token_of(find<T>(p, s, kDraw, share_down(plan.number, left), -1, h).packed);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) choose(const __grid_constant__ Problem p) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ int found, offset;
  Candidates& candidates = *reinterpret_cast<Candidates*>(shared);
  Histogram& h = *reinterpret_cast<Histogram*>(shared);
  const Place here = place();
  if (is_nobodys(p, here.s)) return;
  const Line<T> line = line_of<T>(p, here.s, here.task);
  State& state = p.states[here.s];
  const Wishes wishes = wishes_of(p, line.row, state.all, here.task);
  const Scale scale = wishes.scale;
  const bool draws = here.task == kDraw;
  const int best_count = draws ? 0 : wishes.logprobs;
  float* top = p.top + int64_t(here.s) * p.most;
  int64_t* top_ids = p.top_ids + int64_t(here.s) * p.most;
  if (!wishes.some) {
    if (draws || here.part != 0) return;
    if (threadIdx.x == 0 && wishes.logprobs >= 0) p.own[here.s] = NAN;  // of logits that are none
    for (int i = threadIdx.x; i < best_count; i += kThreads) top[i] = NAN, top_ids[i] = 0;
    return;
  }
  const Plan& plan = state.plans[here.task];
  int count = 0;
  if (draws || best_count > 0) {
    if (threadIdx.x == 0) found = 0;
    __syncthreads();
    const int firsts[] = {plan.top_k.first, plan.top_p.first, plan.token.first};
    const int lasts[] = {plan.top_k.last, plan.top_p.last, plan.token.last};
    visit_tokens<1>(line, part_begin(p, here.part), part_begin(p, here.part + 1), [&](int token, float x) {
      const int bin = Scale::bin(scale.octaves(x));
      bool matters = false;
#pragma unroll
      for (int r = 0; r < 3; r++) matters |= bin >= firsts[r] && bin <= lasts[r];
      if (!matters) return;
      const int i = atomicAdd(&found, 1);
      if (i < p.capacity) candidates.packed[i] = pack(ordered(x), token);
    });
    __syncthreads();
    count = found;
    if (p.parts > 1) {
      uint64_t* list = p.lists + int64_t(here.s * 2 + here.task) * kCandidates;
      if (threadIdx.x == 0) offset = int(atomicAdd(&state.candidates[here.task], uint32_t(count)));
      __syncthreads();
      for (int i = threadIdx.x; i < min(count, p.capacity - offset); i += kThreads)
        __stcg(list + offset + i, candidates.packed[i]);
      if (!comes_last(&state.arrived[here.task], p.parts)) return;
      count = int(__ldcg(&state.candidates[here.task]));
      __syncthreads();
      if (threadIdx.x == 0) state.candidates[here.task] = 0;
      for (int i = threadIdx.x; i < min(count, p.capacity); i += kThreads)
        candidates.packed[i] = __ldcg(list + i);
    }
    __syncthreads();
  } else if (here.part != 0) {
    return;
  }

  const bool fits = count <= p.capacity;
  int token = -1;
  if (draws) {
    if (fits) {
      candidates.sort(count);
      candidates.sum_up(count, scale);
      if (threadIdx.x == 0) token = candidates.draw(count, plan, *line.row, scale);
    } else {
      token = draw_slowly<T>(p, here.s, h);
    }
    if (threadIdx.x == 0) p.tokens[here.s] = token;
    if (wishes.logprobs < 0) return;
  } else if (best_count > 0 && !fits) {
    const uint64_t last = find<T>(p, here.s, kLogprobs, 0, best_count - 1, h).packed;
    if (threadIdx.x == 0) found = 0;
    __syncthreads();
    visit_tokens<1>(line, 0, line.groups(), [&](int its, float x) {
      const uint64_t packed = pack(ordered(x), its);
      if (packed >= last) candidates.packed[atomicAdd(&found, 1)] = packed;
    });
    __syncthreads();
    count = found;
  }
  // Logprobs. Whoever knows the token last says how likely it was.
  const float best = logit_of(state.all.raw);
  const float log_sum = float(log(double(draws ? state.plans[kLogprobs].total : plan.total) * exp2(-double(kUnits))));
  if (!draws && best_count > 0) {
    candidates.sort(count);
    for (int i = threadIdx.x; i < best_count; i += kThreads) {
      const uint64_t packed = candidates.packed[i];
      top[i] = (logit_of(packed) - best) - log_sum;
      top_ids[i] = token_of(packed);
    }
  }
  if (threadIdx.x != 0) return;
  if (!draws && wishes.top_k > 0 && logit_of(state.all.edited) > -INFINITY) return;  // the draw's thread block does
  if (!draws) token = int(max(p.tokens[here.s], int64_t(0)));
  p.own[here.s] = (line.raw(token) - best) - log_sum;
}

__global__ void count_chosen(const Row* rows, const int32_t* at, const int64_t* tokens, int16_t* counts,
                             uint32_t* touched, int count, int vocab, int words) {
  const int s = blockIdx.x * blockDim.x + threadIdx.x;
  if (s >= count || at[s] < 0 || !(rows[at[s]].flags & kCounts)) return;
  const int token = int(tokens[s]);
  if (token < 0) return;
  int16_t& entry = counts[int64_t(at[s]) * vocab + token];
  if ((entry & 0x7fff) != 0x7fff) entry = int16_t(entry + 1);
  atomicOr(&touched[int64_t(at[s]) * words + token / 32], 1u << token % 32);
}

template <typename T>
cudaError_t launch(const Problem& p, int rows, bool more, cudaStream_t stream) {
  survey<T><<<dim3(p.parts, rows), kThreads, 0, stream>>>(p);
  if (more) {
    const dim3 grid(p.parts, rows, 2);
    weigh<T><<<grid, kThreads, sizeof(Histogram), stream>>>(p);
    choose<T><<<grid, kThreads, max(sizeof(Candidates), sizeof(Histogram)), stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace

// `more`: some row draws, or asks for logprobs. dtype: 0 float, 1 bfloat16.
BATON_EXPORT int choose_tokens(const void* logits, const void* rows, const int32_t* at, const int32_t* positions,
                               const int16_t* counts, const uint32_t* touched, const int64_t* biases,
                               const uint32_t* masks, const int32_t* mask_of, int64_t* tokens, float* largest,
                               float* own, float* top, int64_t* top_ids, void* states, uint32_t* histograms,
                               uint64_t* lists, int64_t stride, int dtype, int sequences, int vocab, int parts, int most,
                               int given, int capacity, int more, cudaStream_t stream) {
  if (sequences == 0) return cudaSuccess;
  if (sequences < 0 || sequences > 65535 || vocab <= 0 || vocab > 1 << 18 || parts <= 0 || parts > kMaxParts ||
      capacity < 0 || capacity > kCandidates)
    return cudaErrorInvalidValue;
  const int bytes = dtype == 0 ? 4 : 2;
  const bool vectors = vocab % kGroup == 0 && stride * bytes % kVecBytes == 0 &&
                       reinterpret_cast<uintptr_t>(logits) % kVecBytes == 0;
  const Problem p{logits, static_cast<const Row*>(rows), at, positions, counts, touched, biases, masks, mask_of, tokens,
                  largest, own, top, top_ids, static_cast<State*>(states), histograms, lists, stride, vocab,
                  ceil_div(vocab, 32), parts, most, given, capacity, vectors};
  return dtype == 0 ? launch<float>(p, sequences, more != 0, stream)
                    : launch<__nv_bfloat16>(p, sequences, more != 0, stream);
}

BATON_EXPORT int count_tokens(const void* rows, const int32_t* at, const int64_t* tokens, int16_t* counts,
                              uint32_t* touched, int sequences, int vocab, cudaStream_t stream) {
  if (sequences == 0) return cudaSuccess;
  if (sequences < 0 || vocab <= 0) return cudaErrorInvalidValue;
  constexpr int threads = 128;
  count_chosen<<<ceil_div(sequences, threads), threads, 0, stream>>>(static_cast<const Row*>(rows), at, tokens, counts,
                                                                    touched, sequences, vocab, ceil_div(vocab, 32));
  return cudaGetLastError();
}
