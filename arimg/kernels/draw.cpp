// Draws from laws over codes with counter-based noise: torch.ops.arimg.categorical. Built by kernels/__init__.py.
//
// argmax_v p_v / E_v with E_v = -log(1 - u_v): bit by bit what CounterNoise.categorical (arimg/noise.py) computes by
// numpy and torch, without storing noise for all codes.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

namespace {

constexpr int64_t BLOCKS = 64, WORDS = 4 * BLOCKS;  // Philox blocks side by side
constexpr int64_t PARTS = 4;  // of a law, for several threads
using Floats = at::vec::Vectorized<float>;

struct Key {
  uint32_t low, high, position, purpose, draw;
};

// Words of BLOCKS blocks from `first` on, in their order (Philox-4x32-10).
void philox(const Key& key, uint32_t first, float* words) {
  uint32_t a[BLOCKS], b[BLOCKS], c[BLOCKS], d[BLOCKS], low = key.low, high = key.high;
  for (uint32_t i = 0; i < BLOCKS; i++) a[i] = first + i, b[i] = key.position, c[i] = key.purpose, d[i] = key.draw;
  for (int round = 0; round < 10; round++, low += 0x9E3779B9u, high += 0xBB67AE85u)
    for (int i = 0; i < BLOCKS; i++) {
      const uint64_t even = uint64_t{0xD2511F53u} * a[i], odd = uint64_t{0xCD9E8D57u} * c[i];
      a[i] = static_cast<uint32_t>(odd >> 32) ^ b[i] ^ low;
      b[i] = static_cast<uint32_t>(odd);
      c[i] = static_cast<uint32_t>(even >> 32) ^ d[i] ^ high;
      d[i] = static_cast<uint32_t>(even);
    }
  for (int i = 0; i < BLOCKS; i++) {
    words[4 * i] = static_cast<float>(a[i]);
    words[4 * i + 1] = static_cast<float>(b[i]);
    words[4 * i + 2] = static_cast<float>(c[i]);
    words[4 * i + 3] = static_cast<float>(d[i]);
  }
}

struct Best {
  float ratio = -std::numeric_limits<float>::infinity();
  int64_t code = 0;

  void meet(float other, int64_t at) {  // the first of equals; a law that is not a number wins, as with numpy
    if (other > ratio || (other != other && ratio == ratio)) ratio = other, code = at;
  }
};

// Of codes first .. stop - 1; `first` is a multiple of WORDS.
Best best_of(const float* law, int64_t first, int64_t stop, const Key& key) {
  Best best;
  float ratios[WORDS];
  for (; first < stop; first += WORDS) {
    philox(key, static_cast<uint32_t>(first / 4), ratios);
    const int64_t count = std::min(WORDS, stop - first);
    Floats tops(best.ratio);
    for (int64_t i = 0; i < count; i += Floats::size()) {
      const int64_t some = std::min<int64_t>(Floats::size(), count - i);
      const Floats uniform = (Floats::loadu(ratios + i) + Floats(0.5f)) * Floats(0x1p-32f);
      const Floats noise = at::vec::minimum(uniform, Floats(1 - 0x1p-24f)).neg().log1p().neg();
      const Floats ratio = Floats::loadu(law + first + i, some) / noise;      // 0 beyond the last code
      ratio.store(ratios + i);
      tops = at::vec::maximum(tops, ratio);
    }
    const auto larger = [](Floats& x, Floats& y) { return at::vec::maximum(x, y); };
    if (at::vec::vec_reduce_all<float>(larger, tops) <= best.ratio) continue;
    for (int64_t i = 0; i < count; i++) best.meet(ratios[i], first + i);
  }
  return best;
}

// p (B, W, V) float32, seeds (B,) and positions (B, W) int64, all contiguous. codes (B, W) int64.
at::Tensor categorical(const at::Tensor& p, const at::Tensor& seeds, const at::Tensor& positions, int64_t purpose,
                       int64_t draw) {
  const int64_t width = p.size(1), codes = p.size(2);
  TORCH_CHECK(p.scalar_type() == at::kFloat && p.is_contiguous() && seeds.is_contiguous() && positions.is_contiguous());
  TORCH_CHECK(positions.numel() == p.size(0) * width && seeds.numel() == p.size(0));
  at::Tensor out = at::empty({p.size(0), width}, positions.options());
  const float* laws = p.const_data_ptr<float>();
  const int64_t *own_seeds = seeds.const_data_ptr<int64_t>(), *places = positions.const_data_ptr<int64_t>();
  const int64_t part = (codes + PARTS * WORDS - 1) / (PARTS * WORDS) * WORDS;
  std::vector<Best> found(out.numel() * PARTS);
  at::parallel_for(0, out.numel() * PARTS, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t law = i / PARTS, first = i % PARTS * part;
      const uint64_t seed = static_cast<uint64_t>(own_seeds[law / width]);
      const Key key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(places[law]),
                    static_cast<uint32_t>(purpose), static_cast<uint32_t>(draw)};
      found[i] = best_of(laws + law * codes, first, std::min(first + part, codes), key);
    }
  });
  int64_t* drawn = out.data_ptr<int64_t>();
  for (int64_t law = 0; law < out.numel(); law++) {
    Best best;
    for (int i = 0; i < PARTS; i++) best.meet(found[law * PARTS + i].ratio, found[law * PARTS + i].code);
    drawn[law] = best.code;
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(arimg, library) {
  library.def("categorical(Tensor p, Tensor seeds, Tensor positions, int purpose, int draw) -> Tensor");
  library.impl("categorical", c10::DispatchKey::CPU, categorical);
}
