// Products with 4-bit and 8-bit weights on x86: torch.ops.arimg.int4_product and int8_product, and kept_product, which
// knows its weights by a number. Built by kernels/__init__.py. How codes and scales lie in memory: kernels/products.py.
//
// 4 bits. With w_nk = scale_gn * (code_nk - 8) + zero_gn and x_mk = step_mg * q_mk, |q| <= 127 whole, in groups g of 64
// inputs:
//
//   y_mn = sum_g step_mg * (scale_gn * sum_k (code_nk - 8) q_mk + zero_gn * sum_k q_mk)
//
// 8 bits. With w_nk = scale_n * (code_nk - 128) and x_mk = step_m * (high_mk + low_mk / 126), |high|, |low| <= 63 whole,
// which keeps 14 bits of the activations:
//
//   y_mn = scale_n * step_m * (sum_k (code_nk - 128) high_mk + sum_k (code_nk - 128) low_mk / 126)
//
// Sums over k are whole numbers and groups are added in their order, so a row's result depends on no other row and not
// on how many there are. Seven bits because without VNNI pairs are added in 16 bits, where 2 * 255 * 63 fits.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <vector>

#ifndef __AVX2__
#error "needs AVX2"
#endif

namespace {

constexpr int64_t GROUP = 64, TILE = 16;
constexpr int64_t LINE = 64;     // bytes: the codes of a tile and 8 inputs of 4 bits, or 4 inputs of 8
constexpr int64_t AHEAD = 4096;  // bytes: processors foresee reading within a page of memory only
constexpr int DIGIT = 63, ZERO4 = 8, ZERO8 = 128;

#ifdef __AVX512BW__
constexpr int WIDTH = 64, ROWS = 4;  // bytes of a register; rows that share the reading of a tile
#else
constexpr int WIDTH = 32, ROWS = 2;
#endif
constexpr int LANES = WIDTH / 4, VECTORS = TILE / LANES;

// A lane for each output.
typedef float Floats __attribute__((vector_size(WIDTH)));
typedef int32_t Ints __attribute__((vector_size(WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(WIDTH / 2)));
typedef uint8_t Bytes __attribute__((vector_size(WIDTH)));

// sums + products of four neighbouring bytes, codes unsigned, those of q the same for every lane.
inline Ints dot(Ints sums, Bytes codes, int32_t q) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(q));
#elif defined(__AVX512BW__)
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)codes, _mm512_set1_epi32(q));
  return sums + (Ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#else
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, _mm256_set1_epi32(q));
  return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
}

template <typename T>
inline T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline Floats to_float(Ints values) { return __builtin_convertvector(values, Floats); }

inline Floats from_bfloat16(const at::BFloat16* values) {
  return (Floats)(__builtin_convertvector(load<Halves>(values), Ints) << 16);
}

// The largest of |x|; not a number where one of x is not finite.
inline float largest(const float* x, int64_t count) {
  float top = 0, poison = 0;
#pragma omp simd reduction(max : top) reduction(+ : poison)
  for (int64_t k = 0; k < count; k++) {
    top = std::max(top, std::fabs(x[k]));
    poison += x[k] * 0;
  }
  return top + poison;
}

// Whole numbers near x * per_step; returns their sum.
inline int32_t round(const float* x, float per_step, int64_t count, int8_t* q) {
  int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < count; k++) {
    const auto one = static_cast<int32_t>(std::nearbyint(x[k] * per_step));
    q[k] = static_cast<int8_t>(one);
    sum += one;
  }
  return sum;
}

// Rows of activations in 8 bits, a step per row and group.
struct Grouped {
  int64_t inputs, groups;
  std::vector<int8_t> q;
  std::vector<float> steps;
  std::vector<int32_t> sums;

  Grouped(const float* x, int64_t rows, int64_t inputs_)
      : inputs(inputs_), groups(inputs / GROUP), q(rows * inputs), steps(rows * groups), sums(rows * groups) {
    for (int64_t g = 0; g < rows * groups; g++) {
      const float top = largest(x + g * GROUP, GROUP);
      sums[g] = round(x + g * GROUP, top > 0 ? 127 / top : 0, GROUP, q.data() + g * GROUP);
      steps[g] = top / 127;
    }
  }
};

// Rows of activations in two digits, all the high ones of a row and then all the low ones; a step per row.
struct Digits {
  int64_t inputs;
  std::vector<int8_t> q;
  std::vector<float> steps;
  std::vector<int32_t> sums;

  Digits(const float* x, int64_t rows, int64_t inputs_)
      : inputs(inputs_), q(2 * rows * inputs), steps(rows), sums(2 * rows) {
    std::vector<float> rest(inputs);
    for (int64_t m = 0; m < rows; m++, x += inputs) {
      const float top = largest(x, inputs), per_step = top > 0 ? DIGIT / top : 0;
      int8_t* high = q.data() + 2 * m * inputs;
      sums[2 * m] = round(x, per_step, inputs, high);
      for (int64_t k = 0; k < inputs; k++) rest[k] = x[k] * per_step - high[k];
      sums[2 * m + 1] = round(rest.data(), 2 * DIGIT, inputs, high + inputs);
      steps[m] = top / DIGIT;
    }
  }
};

// COUNT rows from `row` on, the outputs of one tile.
template <int COUNT>
void multiply(const uint8_t* codes, const at::BFloat16* scales, const Grouped& x, int64_t row, float* out,
              int64_t stride) {
  Floats total[COUNT][VECTORS] = {};
  for (int64_t g = 0; g < x.groups; g++, scales += 2 * TILE) {
    Ints low[COUNT][VECTORS] = {}, high[COUNT][VECTORS] = {};
    for (int64_t k = 0; k < GROUP; k += 8, codes += LINE) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + AHEAD), _MM_HINT_T0);
      for (int v = 0; v < VECTORS; v++) {
        const auto both = load<Bytes>(codes + v * WIDTH);
        for (int r = 0; r < COUNT; r++) {
          const int8_t* q = x.q.data() + (row + r) * x.inputs + g * GROUP + k;
          low[r][v] = dot(low[r][v], both & 15, load<int32_t>(q));
          high[r][v] = dot(high[r][v], both >> 4, load<int32_t>(q + 4));
        }
      }
    }
    for (int v = 0; v < VECTORS; v++) {
      const Floats scale = from_bfloat16(scales + v * LANES), zero = from_bfloat16(scales + TILE + v * LANES);
      for (int r = 0; r < COUNT; r++) {
        const int64_t at = (row + r) * x.groups + g;
        const Ints whole = low[r][v] + high[r][v] - ZERO4 * x.sums[at];
        total[r][v] += (scale * to_float(whole) + zero * float(x.sums[at])) * x.steps[at];
      }
    }
  }
  for (int r = 0; r < COUNT; r++) std::memcpy(out + (row + r) * stride, total[r], sizeof total[r]);
}

template <int COUNT>
void multiply(const uint8_t* codes, const float* scales, const Digits& x, int64_t row, float* out, int64_t stride) {
  Ints sums[2 * COUNT][VECTORS] = {};
  for (int64_t k = 0; k < x.inputs; k += 4, codes += LINE) {
    _mm_prefetch(reinterpret_cast<const char*>(codes + AHEAD), _MM_HINT_T0);
    for (int v = 0; v < VECTORS; v++) {
      const auto four = load<Bytes>(codes + v * WIDTH);
      for (int d = 0; d < 2 * COUNT; d++)
        sums[d][v] = dot(sums[d][v], four, load<int32_t>(x.q.data() + (2 * row + d) * x.inputs + k));
    }
  }
  for (int r = 0; r < COUNT; r++) {
    const int32_t* of_q = x.sums.data() + 2 * (row + r);
    for (int v = 0; v < VECTORS; v++) {
      const Floats high = to_float(sums[2 * r][v] - ZERO8 * of_q[0]);
      const Floats low = to_float(sums[2 * r + 1][v] - ZERO8 * of_q[1]);
      const Floats result = (high + low / (2.0f * DIGIT)) * load<Floats>(scales + v * LANES) * x.steps[row + r];
      std::memcpy(out + (row + r) * stride + v * LANES, &result, sizeof result);
    }
  }
}

// (M, N) float32 of x (M, K) float32, codes (N/16, bytes) and scales (N/16, numbers of a tile).
template <typename Rows, typename Scale>
at::Tensor product(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scales, int64_t bytes) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && codes.size(1) == bytes);
  const int64_t rows = x.size(0), tiles = codes.size(0), stride = tiles * TILE, of_tile = scales.numel() / tiles;
  at::Tensor out = at::empty({rows, stride}, x.options());
  const Rows given(x.const_data_ptr<float>(), rows, x.size(1));
  const uint8_t* all_codes = codes.const_data_ptr<uint8_t>();
  const Scale* all_scales = scales.const_data_ptr<Scale>();
  float* results = out.data_ptr<float>();
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; tile++) {
      const uint8_t* own_codes = all_codes + tile * bytes;
      const Scale* own_scales = all_scales + tile * of_tile;
      float* own = results + tile * TILE;
      int64_t row = 0;
      for (; row + ROWS <= rows; row += ROWS) multiply<ROWS>(own_codes, own_scales, given, row, own, stride);
      for (; row + 2 <= rows; row += 2) multiply<2>(own_codes, own_scales, given, row, own, stride);
      for (; row < rows; row++) multiply<1>(own_codes, own_scales, given, row, own, stride);
    }
  });
  return out;
}

// codes (N/16, 8 K); scales (N/16, K/64, 2, 16) bfloat16.
at::Tensor int4_product(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scales) {
  return product<Grouped, at::BFloat16>(x, codes, scales, x.size(1) * TILE / 2);
}

// codes (N/16, 16 K); scales (N/16, 16) float32.
at::Tensor int8_product(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scales) {
  return product<Digits, float>(x, codes, scales, x.size(1) * TILE);
}

struct Weights {
  at::Tensor codes, scales;
};

std::mutex guard;
std::vector<Weights> kept;  // by number

int64_t keep_weights(const at::Tensor& codes, const at::Tensor& scales) {
  const std::lock_guard<std::mutex> lock(guard);
  kept.push_back({codes, scales});
  return static_cast<int64_t>(kept.size()) - 1;
}

void drop_weights(int64_t number) {
  const std::lock_guard<std::mutex> lock(guard);
  kept.at(number) = {};
}

Weights weights_of(int64_t number) {
  const std::lock_guard<std::mutex> lock(guard);
  return kept.at(number);
}

at::Tensor kept_product(const at::Tensor& x, int64_t number, int64_t outputs) {
  const Weights weights = weights_of(number);
  TORCH_CHECK(weights.codes.defined() && weights.codes.size(0) * TILE == outputs, "no such weights: ", number);
  if (weights.scales.scalar_type() == at::kFloat) return int8_product(x, weights.codes, weights.scales);
  return int4_product(x, weights.codes, weights.scales);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(arimg, library) {
  library.def("keep_weights(Tensor codes, Tensor scales) -> int");
  library.def("drop_weights(int number) -> ()", drop_weights);
  library.def("kept_product(Tensor x, int number, int outputs) -> Tensor");
  library.impl("keep_weights", c10::DispatchKey::CPU, keep_weights);
  library.impl("kept_product", c10::DispatchKey::CPU, kept_product);
  library.def("int4_product(Tensor x, Tensor codes, Tensor scales) -> Tensor");
  library.def("int8_product(Tensor x, Tensor codes, Tensor scales) -> Tensor");
  library.impl("int4_product", c10::DispatchKey::CPU, int4_product);
  library.impl("int8_product", c10::DispatchKey::CPU, int8_product);
}
