// Listwise losses and their gradients: fastrl_listwise_loss. The formulas are those of fastrl_kernels/listwise_loss.py.
// Double inside; lists are independent, so the number of threads changes nothing.

#include <algorithm>
#include <cmath>

#include "exact.hpp"

namespace fastrl {
namespace {

constexpr double kSmallestGap = 1e-30;  // relative to the largest

struct Lists {
  const float *score, *reward;
  const uint8_t* mask;  // or null
  int64_t lists, items;
  double beta, gamma;
  float *loss, *grad;
};

struct Scratch {
  Buffer<double> s_room, r_room, grad_room, other_room;
  Buffer<int64_t> place_room;
  double *s, *r, *grad, *other;
  int64_t* place;

  void reserve(int64_t items) {
    const int64_t width = padded(items) + kLanes;
    s = s_room.reserve(width);
    r = r_room.reserve(width);
    grad = grad_room.reserve(width);
    other = other_room.reserve(width);
    place = place_room.reserve(width);
  }
};

FASTRL_INLINE f64x4 load4(const double* from) {
  f64x4 v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

FASTRL_INLINE f64x4 to_power(f64x4 x, double gamma) {
  if (gamma == 0.0) return all4(1.0);
  if (gamma == 1.0) return x;
  if (gamma == 2.0) return x * x;
  f64x4 y;
  for (int l = 0; l < 4; ++l) y[l] = gamma == 0.5 ? std::sqrt(x[l]) : std::pow(x[l], gamma);
  return y;
}

// Pairs of `n` items, each once. Items beyond are NaN in reward, so that they make no pair.
FASTRL_INLINE double perpo(Scratch& x, int64_t n, double gamma) {
  double top = n ? x.r[0] : 0.0, bottom = top;
  for (int64_t i = 0; i < n; ++i) {
    top = x.r[i] > top ? x.r[i] : top;
    bottom = x.r[i] < bottom ? x.r[i] : bottom;
  }
  const double widest = top > bottom ? top - bottom : 1.0, per_widest = 1.0 / widest;
  f64x4 weights = {}, losses = {};
  for (int64_t i = 0; i < n; ++i) x.grad[i] = 0.0;
  for (int64_t i = n; i < n + kLanes; ++i) {
    x.grad[i] = x.s[i] = 0.0;
    x.r[i] = std::numeric_limits<double>::quiet_NaN();
  }
  for (int64_t i = 0; i + 1 < n; ++i) {
    const f64x4 s_i = all4(x.s[i]), r_i = all4(x.r[i]);
    f64x4 pulls = {};
    for (int64_t j = i + 1; j < n; j += 4) {
      const f64x4 gap = r_i - load4(x.r + j), step = s_i - load4(x.s + j);
      const i64x4 better = gap > 0.0, apart = better | (gap < 0.0);
      const f64x4 size = magnitude(gap) * per_widest;
      const f64x4 capped = size > kSmallestGap ? size : all4(kSmallestGap);
      const f64x4 weight = apart ? to_power(capped, gamma) : f64x4{};
      const f64x4 lead = apart ? (better ? step : -step) : f64x4{};
      const f64x4 decay = exponential(-magnitude(lead));
      const i64x4 ahead = lead >= 0.0;
      weights += weight;
      losses += weight * (log_one_more(decay) - (ahead ? f64x4{} : lead));
      const f64x4 pull = weight * (ahead ? decay : all4(1.0)) / (1.0 + decay);
      const f64x4 signed_pull = better ? pull : -pull;
      const f64x4 sum = load4(x.grad + j) + signed_pull;
      __builtin_memcpy(x.grad + j, &sum, sizeof sum);
      pulls += signed_pull;
    }
    x.grad[i] -= total(pulls);
  }
  const double all = total(weights), scale = all > 0.0 ? 1.0 / all : 0.0;
  for (int64_t i = 0; i < n; ++i) x.grad[i] *= scale;
  return total(losses) * scale;
}

// Suffixes of the items by falling reward, ties in their order; sums are kept relative to their largest term.
FASTRL_INLINE double listmle(Scratch& x, int64_t n) {
  int64_t* order = x.place + 0;
  double* lse = x.other;
  for (int64_t i = 0; i < n; ++i) order[i] = i;
  const double* r = x.r;
  std::sort(order, order + n, [r](int64_t a, int64_t b) { return r[a] > r[b] || (r[a] == r[b] && a < b); });
  double top = -kInf, sum = 0.0, loss = 0.0;
  for (int64_t k = n - 1; k >= 0; --k) {
    const double s = x.s[order[k]];
    if (s > top) {
      sum = sum * std::exp(top - s) + 1.0;
      top = s;
    } else {
      sum += std::exp(s - top);
    }
    lse[k] = top + std::log(sum);
    loss += lse[k] - s;
  }
  double inverses = 0.0;  // sum of exp(-lse) so far, times exp(lse), which falls from one item to the next
  for (int64_t k = 0; k < n; ++k) {
    inverses = (k ? inverses * std::exp(lse[k] - lse[k - 1]) : 0.0) + 1.0;
    x.grad[order[k]] = std::exp(x.s[order[k]] - lse[k]) * inverses - 1.0;
  }
  return loss;
}

FASTRL_INLINE void one_list(const Lists& a, bool by_order, Scratch& x, int64_t b) {
  const int64_t first = b * a.items;
  x.reserve(a.items);
  int64_t n = 0;
  bool finite = true;
  for (int64_t i = 0; i < a.items; ++i) {
    if (a.mask && !a.mask[first + i]) continue;
    x.s[n] = a.beta * static_cast<double>(a.score[first + i]);
    x.r[n] = a.reward[first + i];
    finite = finite && std::isfinite(x.s[n]) && std::isfinite(x.r[n]);
    ++n;
  }
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double loss = !finite ? nan : by_order ? listmle(x, n) : perpo(x, n, a.gamma);
  a.loss[b] = static_cast<float>(loss);
  int64_t k = 0;
  for (int64_t i = 0; i < a.items; ++i) {
    const bool live = !a.mask || a.mask[first + i];
    a.grad[first + i] = live ? static_cast<float>(finite ? a.beta * x.grad[k] : nan) : 0.0f;
    k += live;
  }
}

void one_baseline(const Lists& a, bool by_order, Scratch& x, int64_t b) { one_list(a, by_order, x, b); }
#if FASTRL_HAS_AVX2_BUILD
FASTRL_AVX2 void one_avx2(const Lists& a, bool by_order, Scratch& x, int64_t b) { one_list(a, by_order, x, b); }
#endif

}  // namespace
}  // namespace fastrl

// score and reward [lists, items], mask likewise (bytes) or null. by_order: ListMLE, else PerPO. Writes loss [lists] and
// its gradient [lists, items]; a list with a live number that is not finite is NaN. Returns 0, or 1 if out of memory.
extern "C" __attribute__((visibility("default"))) int fastrl_listwise_loss(
    const float* score, const float* reward, const uint8_t* mask, int64_t lists, int64_t items, int by_order,
    double beta, double gamma, float* loss, float* grad, int threads) {
  using namespace fastrl;
  const Lists a{score, reward, mask, lists, items, beta, gamma, loss, grad};
  auto one = one_baseline;
#if FASTRL_HAS_AVX2_BUILD
  if (has_avx2()) one = one_avx2;
#endif
  const double size = static_cast<double>(items), work = by_order ? 100.0 * size : 10.0 * size * size;
  return for_each_problem<Scratch>(lists, threads, work, [&](Scratch& x, int64_t b) { one(a, by_order != 0, x, b); });
}
