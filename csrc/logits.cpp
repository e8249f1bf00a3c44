// The two passes over a tile of logits of one target a row: fastrl_fold_tile, fastrl_differentiate_tile. The statistics
// and formulas are those of fastrl_kernels/_linear_logprob_tiles.py. Rows are independent, so the number of threads
// changes nothing.

#include <cmath>

#include "common.hpp"
#include "kernels.hpp"

namespace fastrl {
namespace {

constexpr float kLowest = -1.0e30f;  // replaces -inf of a forbidden token

struct Nothing {};

// The first column of the largest logit, or -1 of a row without numbers.
int64_t owner_of(const Kernels& kernels, const float* x, int64_t n, float& best) {
  best = kernels.peak(x, n);
  for (int64_t from = 0; from < n; from += kBlock) {
    const int64_t to = from + kBlock < n ? from + kBlock : n;
    bool here = false;
    for (int64_t i = from; i < to; ++i) here = here | (x[i] == best);
    for (int64_t i = from; here && i < to; ++i) {
      if (x[i] == best) return i;
    }
  }
  return -1;
}

void fold(const Kernels& kernels, const float* x, int64_t n, float scale, int64_t column, float& top, float& rest,
          float& at_target) {
  float best;
  const int64_t owner = owner_of(kernels, x, n, best);
  if (column >= 0 && column < n) at_target = x[column] * scale;
  const float raw = best > kLowest ? best : kLowest, peak = raw * scale;
  const int64_t before = owner < 0 ? 0 : owner, after = owner + 1;
  const double others = kernels.exp_sum(x, before, scale, raw) + kernels.exp_sum(x + after, n - after, scale, raw);
  const float own_rest = static_cast<float>(others), high = peak > top ? peak : top;
  const float old_scale = std::exp(top - high), own_scale = std::exp(peak - high);
  rest = peak >= top ? own_rest + (rest + 1.0f) * old_scale : rest + (own_rest + 1.0f) * own_scale;
  top = high;
}

template <class Row>
int each_row(int64_t rows, int64_t width, int threads, const Row& row) {
  return for_each_problem<Nothing>(rows, threads, static_cast<double>(width), [&](Nothing&, int64_t i) { row(i); });
}

}  // namespace
}  // namespace fastrl

#define FASTRL_API extern "C" __attribute__((visibility("default")))

// tile [rows, width], `line` floats from one row to the next; column [rows]: the target's within the tile, or outside of
// it; scale [rows] multiplies logits. Updates top, rest and at_target [rows]. Returns 0, or 1 if out of memory.
FASTRL_API int fastrl_fold_tile(const float* tile, int64_t line, int64_t rows, int64_t width, const float* scale,
                                const int64_t* column, float* top, float* rest, float* at_target, int threads) {
  using namespace fastrl;
  const Kernels& kernels = *kernels_of(best_level());
  return each_row(rows, width, threads, [&](int64_t i) {
    fold(kernels, tile + i * line, width, scale[i], column[i], top[i], rest[i], at_target[i]);
  });
}

// out = -mass * scale * e^(scale * tile - lse), target * scale in the target's column, 0 in silent rows (bytes). out may
// be the tile. Returns 0, or 1 if out of memory.
FASTRL_API int fastrl_differentiate_tile(const float* tile, int64_t line, float* out, int64_t out_line, int64_t rows,
                                         int64_t width, const float* scale, const float* lse, const float* mass,
                                         const int64_t* column, const float* target, const uint8_t* silent,
                                         int threads) {
  using namespace fastrl;
  const Kernels& kernels = *kernels_of(best_level());
  return each_row(rows, width, threads, [&](int64_t i) {
    float* to = out + i * out_line;
    if (silent[i]) {
      for (int64_t j = 0; j < width; ++j) to[j] = 0.0f;
      return;
    }
    kernels.exp_scaled(tile + i * line, width, scale[i], lse[i], -mass[i] * scale[i], to);
    if (column[i] >= 0 && column[i] < width) to[column[i]] = target[i] * scale[i];
  });
}
