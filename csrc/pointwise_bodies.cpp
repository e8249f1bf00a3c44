// The bodies of pointwise.hpp, once for all instruction sets, and their tables. Formulas: _activations.py, gated.py,
// rms_norm.py and rope.py of fastrl_kernels.

#include "wide.hpp"

#include "kernels.hpp"
#include "pointwise.hpp"

#include <cmath>
#include <cstring>

namespace fastrl {
namespace {

// Of n numbers, full vectors and then one that is partly filled: at(i, count).
template <int L, class At>
FASTRL_INLINE void sweep(int64_t n, const At& at) {
  int64_t i = 0;
  for (; i + L <= n; i += L) at(i, L);
  if (i < n) at(i, static_cast<int>(n - i));
}

template <int L>
FASTRL_INLINE Floats<L> some(const float* from, int count) {
  if (__builtin_expect(count == L, 1)) return load<L>(from);
  float part[L] = {};
  std::memcpy(part, from, static_cast<size_t>(count) * sizeof(float));
  return load<L>(part);
}

template <int L>
FASTRL_INLINE void put(float* to, Floats<L> v, int count) {
  if (__builtin_expect(count == L, 1)) {
    store<L>(to, v);
    return;
  }
  float part[L];
  store<L>(part, v);
  std::memcpy(to, part, static_cast<size_t>(count) * sizeof(float));
}

// x with its sign bit set (-|x|), or cleared.
template <int L, bool Negative>
FASTRL_INLINE Floats<L> with_sign(Floats<L> x) {
  Ints<L> bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  bits = Negative ? bits | 0x80000000u : bits & 0x7fffffffu;
  __builtin_memcpy(&x, &bits, sizeof bits);
  return x;
}

// The logistic function of z, and 1 minus it, each to a few units in its last place.
template <int L>
FASTRL_INLINE void logistic(Floats<L> z, Floats<L>& value, Floats<L>& rest) {
  const Floats<L> e = exponential_below<L>(with_sign<L, true>(z)), share = 1.0f / (1.0f + e), less = e * share;
  value = z < 0.0f ? less : share;
  rest = z < 0.0f ? share : less;
}

// e^(-x^2 / 2) and the normal distribution function at x. That of -|x| is e^(-x^2 / 2) times a polynomial in
// t = 1 / (1 + |x| 0.4 / sqrt 2), fitted by least squares to erfc(a) e^(a^2) / 2 at |x| = a sqrt 2, 4e-8 of itself.
template <int L>
FASTRL_INLINE void normal(Floats<L> x, Floats<L>& bell, Floats<L>& below) {
  const Floats<L> t = 1.0f / (1.0f + with_sign<L, false>(x) * 0.282842712474619f);
  bell = exponential_below<L>(x * x * -0.5f);
  Floats<L> p = t * -1.382559590e-02f + 9.411954308e-02f;
  p = p * t - 2.388235937e-01f;
  p = p * t + 2.608046442e-01f;
  p = p * t - 1.324230179e-01f;
  p = p * t + 1.313065898e-01f;
  p = p * t + 6.630270386e-02f;
  p = p * t + 1.071810640e-01f;
  p = p * t + 1.125055551e-01f;
  p = p * t + 1.128521248e-01f;
  const Floats<L> tail = p * t * bell;
  below = x < 0.0f ? tail : 1.0f - tail;
}

constexpr float kTanhGate = 1.5957691216057308f;  // 2 sqrt(2 / pi)

// act(x), and its derivative.
template <int L, int K, bool Slope>
FASTRL_INLINE Floats<L> opened(Floats<L> x, Floats<L>& slope) {
  Floats<L> gate, rest;
  if constexpr (K == kGelu) {
    normal<L>(x, rest, gate);
    if (Slope) slope = gate + x * 0.3989422804014327f * rest;
  } else if constexpr (K == kGeluTanh) {
    logistic<L>(x * kTanhGate * (1.0f + x * x * 0.044715f), gate, rest);
    // far out, where x^3 would overflow, the gate or its rest is 0 before
    const Floats<L> near = x > 20.0f ? all<L>(20.0f) : (x < -20.0f ? all<L>(-20.0f) : x);
    if (Slope) slope = gate + near * gate * rest * kTanhGate * (1.0f + near * near * 0.134145f);
  } else {
    constexpr float kSpeed = K == kQuickGelu ? 1.702f : 1.0f;
    logistic<L>(x * kSpeed, gate, rest);
    if (Slope) slope = gate + x * kSpeed * gate * rest;
  }
  return x * gate;
}

template <int L, int K>
FASTRL_INLINE void gated_row(const Gated& g, int64_t at, int64_t n) {
  sweep<L>(n, [&](int64_t i, int count) __attribute__((always_inline)) {
    Floats<L> x = some<L>(g.gate + at + i, count), unused;
    if (g.gate_bias) x += some<L>(g.gate_bias + i, count);
    Floats<L> y = opened<L, K, false>(x, unused);
    if (g.up) {
      Floats<L> up = some<L>(g.up + at + i, count);
      if (g.up_bias) up += some<L>(g.up_bias + i, count);
      y *= up;
    }
    put<L>(g.out + at + i, y, count);
  });
}

template <int L, int K>
FASTRL_INLINE void gated_backward_row(const Gated& g, int64_t at, int64_t n) {
  sweep<L>(n, [&](int64_t i, int count) __attribute__((always_inline)) {
    Floats<L> x = some<L>(g.gate + at + i, count), slope;
    if (g.gate_bias) x += some<L>(g.gate_bias + i, count);
    const Floats<L> y = opened<L, K, true>(x, slope), grad = some<L>(g.grad + at + i, count);
    Floats<L> d_gate = grad * slope;
    if (g.up) {
      Floats<L> up = some<L>(g.up + at + i, count);
      if (g.up_bias) up += some<L>(g.up_bias + i, count);
      d_gate = grad * up * slope;
      const Floats<L> d_up = grad * y;
      put<L>(g.grad_up + at + i, d_up, count);
      if (g.up_bias_sum) put<L>(g.up_bias_sum + i, some<L>(g.up_bias_sum + i, count) + d_up, count);
    }
    put<L>(g.grad_gate + at + i, d_gate, count);
    if (g.gate_bias_sum) put<L>(g.gate_bias_sum + i, some<L>(g.gate_bias_sum + i, count) + d_gate, count);
  });
}

template <int L, int K>
FASTRL_INLINE void gated_rows(const Gated& g, int64_t rows, int64_t n, bool backward) {
  for (int64_t r = 0; r < rows; ++r) {
    if (backward) {
      gated_backward_row<L, K>(g, r * n, n);
    } else {
      gated_row<L, K>(g, r * n, n);
    }
  }
}

template <int L, bool Backward>
FASTRL_INLINE void gated(const Gated& g, int64_t rows, int64_t n, int kind) {
  if (kind == kSilu) gated_rows<L, kSilu>(g, rows, n, Backward);
  if (kind == kGelu) gated_rows<L, kGelu>(g, rows, n, Backward);
  if (kind == kGeluTanh) gated_rows<L, kGeluTanh>(g, rows, n, Backward);
  if (kind == kQuickGelu) gated_rows<L, kQuickGelu>(g, rows, n, Backward);
}

constexpr int64_t kRun = 1024;  // numbers that are summed in floats, before their sum is added in doubles

// The sum of term(i, count), vectors, over n numbers.
template <int L, class Term>
FASTRL_INLINE double summed(int64_t n, const Term& term) {
  double whole = 0.0;
  for (int64_t from = 0; from < n; from += kRun) {
    const int64_t to = from + kRun < n ? from + kRun : n;
    Floats<L> even = {}, odd = {};
    int64_t i = from;
    for (; i + 2 * L <= to; i += 2 * L) {
      even += term(i, L);
      odd += term(i + L, L);
    }
    if (i + L <= to) {
      even += term(i, L);
      i += L;
    }
    if (i < to) odd += term(i, static_cast<int>(to - i));
    whole += static_cast<double>(total<L>(even + odd));
  }
  return whole;
}

FASTRL_INLINE float norm_scale(double squares, int64_t n, double eps) {
  return static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(n) + eps));
}

template <int L>
FASTRL_INLINE void norm_rows(const Norm& x, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = x.residual + r * n;
    double squares;
    if (x.x) {
      const float *other = x.x + r * n, *residual = from;
      float* total = x.total + r * n;
      squares = summed<L>(n, [&](int64_t i, int count) __attribute__((always_inline)) {
        const Floats<L> v = some<L>(residual + i, count) + some<L>(other + i, count);
        put<L>(total + i, v, count);
        return v * v;
      });
      from = total;
    } else {
      squares = summed<L>(n, [&](int64_t i, int count) __attribute__((always_inline)) {
        const Floats<L> v = some<L>(from + i, count);
        return v * v;
      });
    }
    const float scale = norm_scale(squares, n, x.eps);
    float* out = x.out + r * n;
    sweep<L>(n, [&](int64_t i, int count) __attribute__((always_inline)) {
      put<L>(out + i, some<L>(from + i, count) * scale * some<L>(x.weight + i, count), count);
    });
  }
}

template <int L>
FASTRL_INLINE void norm_backward_rows(const Norm& x, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r) {
    const float *t = x.residual + r * n, *grad = x.grad + r * n;
    const float* more = x.grad_total ? x.grad_total + r * n : nullptr;
    float* to = x.grad_in + r * n;
    const float scale = norm_scale(summed<L>(n, [&](int64_t i, int count) __attribute__((always_inline)) {
                                     const Floats<L> v = some<L>(t + i, count);
                                     return v * v;
                                   }),
                                   n, x.eps);
    const double along = summed<L>(n, [&](int64_t i, int count) __attribute__((always_inline)) {
      return some<L>(grad + i, count) * some<L>(x.weight + i, count) * (some<L>(t + i, count) * scale);
    });
    const float mean = static_cast<float>(along / static_cast<double>(n));
    sweep<L>(n, [&](int64_t i, int count) __attribute__((always_inline)) {
      const Floats<L> g = some<L>(grad + i, count), normed = some<L>(t + i, count) * scale;
      Floats<L> d = (g * some<L>(x.weight + i, count) - normed * mean) * scale;
      if (more) d += some<L>(more + i, count);
      put<L>(to + i, d, count);
      if (x.weight_sum) put<L>(x.weight_sum + i, some<L>(x.weight_sum + i, count) + g * normed, count);
    });
  }
}

template <int L, bool Back>
FASTRL_INLINE void turn_heads(const Heads& heads, const Turn& angles, int64_t half, int64_t dim) {
  const float *sin_1 = Back ? angles.sin_2 : angles.sin_1, *sin_2 = Back ? angles.sin_1 : angles.sin_2;
  for (int64_t h = 0; h < heads.count; ++h) {
    const float* from = heads.from + h * heads.from_head;
    float* to = heads.to + h * heads.to_head;
    sweep<L>(half, [&](int64_t i, int count) __attribute__((always_inline)) {
      const Floats<L> a = some<L>(from + i, count), b = some<L>(from + half + i, count);
      const Floats<L> first = b * some<L>(sin_1 + i, count), second = a * some<L>(sin_2 + i, count);
      const Floats<L> c = a * some<L>(angles.cos_1 + i, count), d = b * some<L>(angles.cos_2 + i, count);
      put<L>(to + i, Back ? c + first : c - first, count);
      put<L>(to + half + i, Back ? d - second : d + second, count);
    });
    if (dim > 2 * half) std::memcpy(to + 2 * half, from + 2 * half, static_cast<size_t>(dim - 2 * half) * sizeof(float));
  }
}

#define FASTRL_POINTWISE(NAME, TARGET, L)                                                             \
  namespace NAME {                                                                                    \
  TARGET void gated(const Gated& x, int64_t rows, int64_t n, int kind) {                              \
    fastrl::gated<L, false>(x, rows, n, kind);                                                        \
  }                                                                                                   \
  TARGET void gated_backward(const Gated& x, int64_t rows, int64_t n, int kind) {                     \
    fastrl::gated<L, true>(x, rows, n, kind);                                                         \
  }                                                                                                   \
  TARGET void norm(const Norm& x, int64_t rows, int64_t n) { norm_rows<L>(x, rows, n); }              \
  TARGET void norm_backward(const Norm& x, int64_t rows, int64_t n) { norm_backward_rows<L>(x, rows, n); } \
  TARGET void turn(const Heads& heads, const Turn& turn, int64_t half, int64_t dim, bool back) {      \
    if (back) {                                                                                       \
      turn_heads<L, true>(heads, turn, half, dim);                                                    \
    } else {                                                                                          \
      turn_heads<L, false>(heads, turn, half, dim);                                                   \
    }                                                                                                 \
  }                                                                                                   \
  constexpr Pointwise table = {gated, gated_backward, norm, norm_backward, turn};                     \
  }

FASTRL_POINTWISE(baseline, , 4)
#if defined(__x86_64__)
FASTRL_POINTWISE(avx2, __attribute__((target("avx2,fma"))), 8)
FASTRL_POINTWISE(avx512, __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), 16)
#endif

}  // namespace

const Pointwise& pointwise() {
#if defined(__x86_64__)
  if (best_level() == kAvx512) return avx512::table;
  if (best_level() == kAvx2) return avx2::table;
#endif
  return baseline::table;
}

}  // namespace fastrl
