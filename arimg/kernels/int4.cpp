// Products with 4-bit weights on x86: torch.ops.arimg.int4_product. Built by kernels/__init__.py.
//
// With w_nk = scale_gn * (code_nk - 8) + zero_gn and x_mk = step_mg * q_mk, |q| <= 127 whole, in groups g of 64 inputs:
//
//   y_mn = sum_g step_mg * (scale_gn * sum_k (code_nk - 8) q_mk + zero_gn * sum_k q_mk)
//
// Sums over k are whole numbers and groups are added in their order, so a row's result depends on no other row and not
// on how many there are. How codes and scales lie in memory: kernels/int4.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#ifndef __AVX2__
#error "needs AVX2"
#endif

namespace {

constexpr int64_t GROUP = 64, TILE = 16, LANES = 8, VECTORS = TILE / LANES, DEPTH = 8;
constexpr int64_t AHEAD = 4096;  // bytes: processors foresee reading within a page of memory only

// Rows of activations in 8 bits, a step per row and group.
struct Rounded {
  std::vector<int8_t> q;
  std::vector<float> steps;
  std::vector<int32_t> sums;

  Rounded(const float* x, int64_t groups) : q(groups * GROUP), steps(groups), sums(groups) {
    for (int64_t g = 0; g < groups; g++) {
      const float* values = x + g * GROUP;
      int8_t* whole = q.data() + g * GROUP;
      float top = 0, poison = 0;  // the latter is not a number where a value is not finite
#pragma omp simd reduction(max : top) reduction(+ : poison)
      for (int k = 0; k < GROUP; k++) {
        top = std::max(top, std::fabs(values[k]));
        poison += values[k] * 0;
      }
      const float per_step = top > 0 ? 127 / top : 0;
      int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int k = 0; k < GROUP; k++) {
        const auto one = static_cast<int32_t>(std::nearbyint(values[k] * per_step));
        whole[k] = static_cast<int8_t>(one);
        sum += one;
      }
      steps[g] = top / 127 + poison;
      sums[g] = sum;
    }
  }
};

// sums + products of four neighbouring bytes, codes unsigned. Without VNNI pairs are added in 16 bits, where
// 2 * 15 * 127 fits.
inline __m256i dot(__m256i sums, __m256i codes, __m256i q) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return _mm256_dpbusd_epi32(sums, codes, q);
#else
  return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, q), _mm256_set1_epi16(1)));
#endif
}

inline __m256i four_bytes(const int8_t* q) {
  int32_t bytes;
  std::memcpy(&bytes, q, sizeof bytes);
  return _mm256_set1_epi32(bytes);
}

inline __m256 to_float(const at::BFloat16* values) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// ROWS rows from `row` on, 16 outputs.
template <int ROWS>
void multiply(const uint8_t* codes, const at::BFloat16* scales, const Rounded& x, int64_t row, int64_t groups,
              float* out, int64_t stride) {
  const __m256i low_half = _mm256_set1_epi8(15);
  __m256 total[ROWS][VECTORS];
  for (auto& sums : total) std::fill_n(sums, VECTORS, _mm256_setzero_ps());
  for (int64_t g = 0; g < groups; g++, scales += 2 * TILE) {
    __m256i low[ROWS][VECTORS], high[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECTORS; v++) low[r][v] = high[r][v] = _mm256_setzero_si256();
    for (int k = 0; k < GROUP; k += DEPTH)
      for (int v = 0; v < VECTORS; v++, codes += 32) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + AHEAD), _MM_HINT_T0);
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
        const __m256i first = _mm256_and_si256(both, low_half);
        const __m256i second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_half);
        for (int r = 0; r < ROWS; r++) {
          const int8_t* q = x.q.data() + ((row + r) * groups + g) * GROUP + k;
          low[r][v] = dot(low[r][v], first, four_bytes(q));
          high[r][v] = dot(high[r][v], second, four_bytes(q + DEPTH / 2));
        }
      }
    for (int v = 0; v < VECTORS; v++) {
      const __m256 scale = to_float(scales + v * LANES), zero = to_float(scales + TILE + v * LANES);
      for (int r = 0; r < ROWS; r++) {
        const int64_t at = (row + r) * groups + g;
        const __m256i whole = _mm256_add_epi32(low[r][v], high[r][v]);
        const __m256i centred = _mm256_sub_epi32(whole, _mm256_set1_epi32(8 * x.sums[at]));
        const __m256 offset = _mm256_mul_ps(zero, _mm256_set1_ps(static_cast<float>(x.sums[at])));
        const __m256 part = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(centred), offset);
        total[r][v] = _mm256_fmadd_ps(part, _mm256_set1_ps(x.steps[at]), total[r][v]);
      }
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++) _mm256_storeu_ps(out + (row + r) * stride + v * LANES, total[r][v]);
}

// x (M, K) float32, contiguous; codes (N/16, 8 K) bytes; scales (N/16, K/64, 2, 16) bfloat16. (M, N) float32.
at::Tensor int4_product(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scales) {
  const int64_t rows = x.size(0), groups = x.size(1) / GROUP, tiles = codes.size(0);
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && codes.size(1) == x.size(1) * TILE / 2);
  at::Tensor out = at::empty({rows, tiles * TILE}, x.options());
  const Rounded rounded(x.const_data_ptr<float>(), rows * groups);
  const uint8_t* all_codes = codes.const_data_ptr<uint8_t>();
  const at::BFloat16* all_scales = scales.const_data_ptr<at::BFloat16>();
  float* results = out.data_ptr<float>();
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; tile++) {
      const uint8_t* own_codes = all_codes + tile * codes.size(1);
      const at::BFloat16* own_scales = all_scales + tile * groups * 2 * TILE;
      float* own = results + tile * TILE;
      int64_t row = 0;
      for (; row + 2 <= rows; row += 2) multiply<2>(own_codes, own_scales, rounded, row, groups, own, tiles * TILE);
      for (; row < rows; row++) multiply<1>(own_codes, own_scales, rounded, row, groups, own, tiles * TILE);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(arimg, library) {
  library.def("int4_product(Tensor x, Tensor codes, Tensor scales) -> Tensor");
  library.impl("int4_product", c10::DispatchKey::CPU, int4_product);
}
