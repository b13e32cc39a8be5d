// Attention in float32, over keys and values in float32 or bfloat16: torch.ops.arimg.attention. Built by
// kernels/__init__.py.
//
// Under a mask, as passes over a cache have one, a query takes its slots in their order, in vectors that begin at slot 0:
// what it gets depends neither on how many queries there are beside it nor on how many slots behind those it sees.
//
// Without one a whole sequence is read at once. Then keys are turned first, and scores are products of matrices.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

namespace {

using Floats = at::vec::Vectorized<float>;
constexpr int64_t LANES = Floats::size();
constexpr int64_t QUERIES = LANES / 4;   // that share the reading of values
constexpr int64_t VECTORS = 4;           // of channels at a time
constexpr int64_t GRAIN = 1 << 15;       // products that are worth a thread
constexpr float NEVER = -std::numeric_limits<float>::infinity();

// `count` <= LANES numbers, the rest zeros.
template <typename T>
inline Floats read(const T* from, int64_t count = LANES) {
  if constexpr (std::is_same_v<T, float>) {
    return Floats::loadu(from, count);
  } else {
    return at::vec::convert<float>(at::vec::Vectorized<T>::loadu(from, count));
  }
}

// Slots in whole pairs of vectors.
inline int64_t whole(int64_t count) { return (count + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }

template <int64_t COUNT>
using Constant = std::integral_constant<int64_t, COUNT>;

// Calls run(number of vectors, first channel, channels of the last vector) for all channels in their order.
template <typename Run>
inline void by_channels(int64_t size, const Run& run) {
  int64_t first = 0;
  for (; first + VECTORS * LANES <= size; first += VECTORS * LANES) run(Constant<VECTORS>{}, first, Constant<LANES>{});
  if (first + 2 * LANES <= size) run(Constant<2>{}, first, Constant<LANES>{}), first += 2 * LANES;
  if (first + LANES <= size) run(Constant<1>{}, first, Constant<LANES>{}), first += LANES;
  if (first < size) run(Constant<1>{}, first, size - first);
}

// Of COUNT = 2^n vectors, the sums of neighbouring lanes, n times over: if COUNT = LANES, the sum of each.
template <int64_t COUNT, typename Make>
inline Floats sums_of(const Make& make, int64_t first = 0) {
  if constexpr (COUNT == 1) {
    return make(first);
  } else {
    const Floats a = sums_of<COUNT / 2>(make, first), b = sums_of<COUNT / 2>(make, first + COUNT / 2);
    const auto [even, odd] = at::vec::deinterleave2(a, b);
    return even + odd;
  }
}

// scores_i += query . key_i for LANES keys; key(i, v, n) is the v-th vector of the i-th, of n channels.
template <int64_t COUNT>
inline void score(const float* query, const auto& key, auto tail, float* scores) {
  Floats q[COUNT];
  for (int64_t v = 0; v < COUNT; v++) q[v] = read(query + v * LANES, v + 1 < COUNT ? LANES : tail);
  const Floats sums = sums_of<LANES>([&](int64_t i) {
    Floats products = q[0] * key(i, 0, COUNT > 1 ? LANES : tail);
    for (int64_t v = 1; v < COUNT; v++)
      products = at::vec::fmadd(q[v], key(i, v, v + 1 < COUNT ? LANES : tail), products);
    return products;
  });
  (read(scores) + sums).store(scores);
}

// Scores become exp(score - top); 0 where they are not visible, and from `slots` to `stop`. Returns the sum.
float soften(const bool* visible, int64_t slots, int64_t stop, float* scores) {
  if (visible != nullptr)
    for (int64_t s = 0; s < slots; s++) scores[s] = visible[s] ? scores[s] : NEVER;
  std::fill(scores + slots, scores + stop, NEVER);
  const auto larger = [](Floats x, Floats y) { return at::vec::maximum(x, y); };
  Floats tops(NEVER), total(0.0f);
  for (int64_t s = 0; s < stop; s += LANES) tops = larger(tops, read(scores + s));
  const Floats top(at::vec::vec_reduce_all<float>(larger, tops));
  for (int64_t s = 0; s < stop; s += LANES) {
    const Floats weights = (read(scores + s) - top).exp_u20();
    weights.store(scores + s);
    total = total + weights;
  }
  return at::vec::vec_reduce_all<float>([](Floats x, Floats y) { return x + y; }, total);
}

// out_q = sum_s weights_qs value_s / total_q for ROWS queries.
template <int64_t ROWS, int64_t COUNT, typename T>
void mix(const float* weights, int64_t apart, const float* totals, const T* values, int64_t stride, int64_t slots,
         auto tail, float* out, int64_t out_stride) {
  Floats sums[ROWS][COUNT];
  for (auto& of_query : sums)
    for (Floats& one : of_query) one = Floats(0.0f);
  for (int64_t s = 0; s < slots; s++)
    for (int64_t v = 0; v < COUNT; v++) {
      const Floats value = read(values + s * stride + v * LANES, v + 1 < COUNT ? LANES : tail);
      for (int64_t q = 0; q < ROWS; q++) sums[q][v] = at::vec::fmadd(Floats(weights[q * apart + s]), value, sums[q][v]);
    }
  for (int64_t q = 0; q < ROWS; q++)
    for (int64_t v = 0; v < COUNT; v++)
      (sums[q][v] / Floats(totals[q])).store(out + q * out_stride + v * LANES, v + 1 < COUNT ? LANES : tail);
}

// What the queries of one head read; slots lie a stride apart.
template <typename T>
struct Head {
  const T *keys, *values;
  int64_t key_stride, value_stride, slots, size;
  const bool* mask;  // nullptr if query w sees the slots 0 .. w
  int64_t mask_stride;

  const bool* visible(int64_t w) const { return mask == nullptr ? nullptr : mask + w * mask_stride; }

  // How many slots query w need look at.
  int64_t reach(int64_t w) const {
    if (mask == nullptr) return w + 1;
    int64_t count = slots;
    while (count > 1 && !visible(w)[count - 1]) count--;
    return count;
  }

  // Adds the scores of LANES slots from s on: as they lie, or where that is less work or impossible, from a copy.
  void score_slots(const float* queries, int64_t rows, int64_t s, float* scores) const {
    const bool inside = s + LANES <= slots;
    by_channels(size, [&](auto vectors, int64_t c, auto tail) {
      const T* from = keys + s * key_stride + c;
      const auto meet = [&](const auto& key) {
        for (int64_t q = 0; q < rows; q++)
          score<vectors()>(queries + q * size + c, key, tail, scores + q * whole(slots) + s);
      };
      if (inside && (std::is_same_v<T, float> || rows == 1))
        return meet([&](int64_t i, int64_t v, auto n) { return read(from + i * key_stride + v * LANES, n); });
      Floats copy[LANES][vectors()];
      for (int64_t i = 0; i < LANES; i++)
        for (int64_t v = 0; v < vectors(); v++)
          copy[i][v] = read(from + (inside ? i : std::min(i, slots - 1 - s)) * key_stride + v * LANES,
                            v + 1 < vectors() ? LANES : tail);
      meet([&](int64_t i, int64_t v, auto) { return copy[i][v]; });
    });
  }

  // Query q looks at reaches[q] slots, none of them beyond `stop`.
  void mix_slots(const float* weights, const float* totals, const int64_t* reaches, int64_t rows, int64_t stop,
                 float* out, int64_t out_stride) const {
    by_channels(size, [&](auto vectors, int64_t c, auto tail) {
      if (rows == QUERIES)
        return mix<QUERIES, vectors()>(weights, whole(slots), totals, values + c, value_stride, stop, tail, out + c,
                                       out_stride);
      for (int64_t q = 0; q < rows; q++)
        mix<1, vectors()>(weights + q * whole(slots), 0, totals + q, values + c, value_stride, reaches[q], tail,
                          out + q * out_stride + c, 0);
    });
  }
};

// Queries of a head, QUERIES at a time.
struct Block {
  int64_t slots, size;
  std::vector<float> queries, scores, turned;  // (QUERIES, size), (QUERIES, whole(slots)), (size, whole(slots))

  Block(int64_t slots_, int64_t size_)
      : slots(slots_), size(size_), queries(QUERIES * size), scores(QUERIES * whole(slots)) {}

  template <typename T>
  void turn(const Head<T>& head) {
    turned.assign(size * whole(slots), 0.0f);
    for (int64_t s = 0; s < slots; s += LANES)
      for (int64_t c = 0; c < size; c++)
        for (int64_t i = s; i < std::min(s + LANES, slots); i++)
          turned[c * whole(slots) + i] = head.keys[i * head.key_stride + c];
  }

  // The scores of all QUERIES with the turned keys of slots 0 .. stop - 1.
  void score_turned(int64_t stop) {
    for (int64_t s = 0; s < stop; s += 2 * LANES) {
      Floats sums[QUERIES][2];
      for (auto& pair : sums) pair[0] = pair[1] = Floats(0.0f);
      for (int64_t c = 0; c < size; c++) {
        const float* at = turned.data() + c * whole(slots) + s;
        const Floats keys[2] = {read(at), read(at + LANES)};
        for (int64_t q = 0; q < QUERIES; q++) {
          const Floats query(queries[q * size + c]);
          for (int v = 0; v < 2; v++) sums[q][v] = at::vec::fmadd(query, keys[v], sums[q][v]);
        }
      }
      for (int64_t q = 0; q < QUERIES; q++)
        for (int v = 0; v < 2; v++) sums[q][v].store(scores.data() + q * whole(slots) + s + v * LANES);
    }
  }

  // Queries first .. first + rows - 1.
  template <typename T>
  void attend(const Head<T>& head, const float* given, int64_t stride, int64_t first, int64_t rows, float* out,
              int64_t out_stride) {
    const float scale = 1 / std::sqrt(static_cast<float>(size));
    float totals[QUERIES];
    int64_t reaches[QUERIES], stop = 0;
    for (int64_t q = 0; q < rows; q++) {
      stop = std::max(stop, reaches[q] = head.reach(first + q));
      for (int64_t c = 0; c < size; c++) queries[q * size + c] = given[(first + q) * stride + c] * scale;
    }
    if (head.mask == nullptr) {
      score_turned(stop);
    } else {
      std::fill(scores.begin(), scores.end(), 0.0f);
      for (int64_t s = 0; s < stop; s += LANES) head.score_slots(queries.data(), rows, s, scores.data());
    }
    for (int64_t q = 0; q < rows; q++)
      totals[q] = soften(head.visible(first + q), reaches[q], whole(stop), scores.data() + q * whole(slots));
    head.mix_slots(scores.data(), totals, reaches, rows, stop, out + first * out_stride, out_stride);
  }
};

template <typename T>
void attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask,
            at::Tensor& out) {
  const int64_t rows = q.size(0), heads = q.size(1), width = q.size(2), size = q.size(3), slots = k.size(2);
  const int64_t blocks = (width + QUERIES - 1) / QUERIES, group = heads / k.size(1);
  const int64_t cost = std::max<int64_t>(width / blocks * slots * size, 1);
  at::parallel_for(0, rows * heads * blocks, (GRAIN + cost - 1) / cost, [&](int64_t begin, int64_t end) {
    Block block(slots, size);
    for (int64_t i = begin; i < end; i++) {
      const int64_t first = i % blocks * QUERIES, h = i / blocks % heads, r = i / blocks / heads;
      const auto at = [&](const at::Tensor& x, int64_t number) { return r * x.stride(0) + number * x.stride(1); };
      const Head<T> head{k.const_data_ptr<T>() + at(k, h / group), v.const_data_ptr<T>() + at(v, h / group),
                         k.stride(2), v.stride(2), slots, size,
                         mask ? mask->const_data_ptr<bool>() + at(*mask, 0) : nullptr, mask ? mask->stride(2) : 0};
      if (!mask && (i == begin || first == 0)) block.turn(head);
      block.attend(head, q.const_data_ptr<float>() + at(q, h), q.stride(2), first, std::min(QUERIES, width - first),
                   out.data_ptr<float>() + (r * width * heads + h) * size, heads * size);
    }
  });
}

// q (R, H, W, E) float32; k and v (R, G, S, E), both float32 or bfloat16; the last axis contiguous.
// mask (R, 1, W, S) bool, or nothing: query w sees the slots 0 .. w. (R, W, H, E).
at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const std::optional<at::Tensor>& mask) {
  TORCH_CHECK(q.scalar_type() == at::kFloat && q.stride(3) == 1 && k.stride(3) == 1 && v.stride(3) == 1);
  TORCH_CHECK(k.scalar_type() == v.scalar_type() && k.sizes() == v.sizes());
  TORCH_CHECK(mask ? mask->stride(3) == 1 && mask->size(3) == k.size(2) : q.size(2) <= k.size(2));
  at::Tensor out = at::empty({q.size(0), q.size(2), q.size(1), q.size(3)}, q.options());
  if (k.scalar_type() == at::kFloat) {
    attend<float>(q, k, v, mask, out);
  } else {
    attend<at::BFloat16>(q, k, v, mask, out);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(arimg, library) {
  library.def("attention(Tensor q, Tensor k, Tensor v, Tensor? mask) -> Tensor");
  library.impl("attention", c10::DispatchKey::CPU, attention);
}
