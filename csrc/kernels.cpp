// The bodies of kernels.hpp, once for all instruction sets, and their tables.

#include "wide.hpp"

#include "kernels.hpp"

#include <cmath>

// A loop over a tile, whose sums stay in registers only if no index is left.
#if defined(__clang__)
#define FASTRL_UNROLL _Pragma("clang loop unroll(full)")
#else
#define FASTRL_UNROLL _Pragma("GCC unroll 8")
#endif

namespace fastrl {
namespace {

// Products are dot products: rows of x and of the weights, which both lie along the sum, stream through once and are
// multiplied tile by tile, with one vector of partial sums for each of the MR x NR numbers of a tile. Weights come from
// memory, where a core waits long for the first bytes of a line, so they are fetched two tiles ahead (beyond the last
// one, too: fetching ahead reads nothing).

// Partial sums of a tile over the whole vectors of the inputs. Gives the number of inputs summed.
template <int L, int MR, int NR, bool Fetch>
FASTRL_INLINE int64_t tile_sums(const float* x, int64_t x_line, const float* w, int64_t w_line, int64_t inputs,
                                Floats<L> (&sums)[MR][NR]) {
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NR; ++n) sums[m][n] = Floats<L>{};
  }
  int64_t i = 0;
  for (; i + L <= inputs; i += L) {
    Floats<L> a[MR];
    for (int m = 0; m < MR; ++m) a[m] = load<L>(x + m * x_line + i);
    for (int n = 0; n < NR; ++n) {
      if (Fetch) __builtin_prefetch(w + (n + 2 * NR) * w_line + i, 0, 2);
      const Floats<L> b = load<L>(w + n * w_line + i);
      for (int m = 0; m < MR; ++m) sums[m][n] += a[m] * b;
    }
  }
  return i;
}

// What is added to a tile's sums: inputs that fill no vector, the bias, and what was there.
FASTRL_INLINE float finished(float sum, const float* x, const float* w, int64_t from, int64_t inputs, const float* bias,
                             bool add, float before) {
  for (int64_t j = from; j < inputs; ++j) sum += x[j] * w[j];
  if (bias) sum += *bias;
  return add ? before + sum : sum;
}

// Many rows, few columns: the sums of four rows are totalled together.
template <int L, int MR, int NR, bool Fetch>
FASTRL_INLINE void tall_tile(const float* x, int64_t x_line, const float* w, int64_t w_line, int64_t inputs,
                             const float* bias, bool add, float* out, int64_t out_line) {
  static_assert(MR % 4 == 0, "rows are totalled in fours");
  Floats<L> sums[MR][NR];
  const int64_t done = tile_sums<L, MR, NR, Fetch>(x, x_line, w, w_line, inputs, sums);
  FASTRL_UNROLL
  for (int n = 0; n < NR; ++n) {
    FASTRL_UNROLL
    for (int m = 0; m < MR; m += 4) {
      const Floats<4> four = totals<L>(sums[m][n], sums[m + 1][n], sums[m + 2][n], sums[m + 3][n]);
      FASTRL_UNROLL
      for (int i = 0; i < 4; ++i) {
        float* to = out + (m + i) * out_line + n;
        *to = finished(four[i], x + (m + i) * x_line, w + n * w_line, done, inputs, bias ? bias + n : nullptr, add, *to);
      }
    }
  }
}

// Few rows, many columns: the sums of four columns are.
template <int L, int MR, int NR, bool Fetch>
FASTRL_INLINE void broad_tile(const float* x, int64_t x_line, const float* w, int64_t w_line, int64_t inputs,
                              const float* bias, bool add, float* out, int64_t out_line) {
  static_assert(NR % 4 == 0 || NR == 1, "columns are totalled in fours");
  Floats<L> sums[MR][NR];
  const int64_t done = tile_sums<L, MR, NR, Fetch>(x, x_line, w, w_line, inputs, sums);
  FASTRL_UNROLL
  for (int m = 0; m < MR; ++m) {
    float row[NR];
    if constexpr (NR == 1) {
      row[0] = total<L>(sums[m][0]);
    } else {
      FASTRL_UNROLL
      for (int n = 0; n < NR; n += 4) {
        store<4>(row + n, totals<L>(sums[m][n], sums[m][n + 1], sums[m][n + 2], sums[m][n + 3]));
      }
    }
    float* to = out + m * out_line;
    FASTRL_UNROLL
    for (int n = 0; n < NR; ++n) {
      to[n] = finished(row[n], x + m * x_line, w + n * w_line, done, inputs, bias ? bias + n : nullptr, add, to[n]);
    }
  }
}

// All columns of MR rows.
template <int L, int MR, int NR>
FASTRL_INLINE void broad_rows(const float* x, int64_t x_line, const Linear& w, int64_t from, int64_t to, bool add,
                              float* out, int64_t out_line) {
  int64_t c = from;
  for (; c + NR <= to; c += NR) {
    broad_tile<L, MR, NR, true>(x, x_line, w.weight + c * w.line, w.line, w.inputs, w.bias ? w.bias + c : nullptr, add,
                                out + (c - from), out_line);
  }
  for (; c < to; ++c) {
    broad_tile<L, MR, 1, false>(x, x_line, w.weight + c * w.line, w.line, w.inputs, w.bias ? w.bias + c : nullptr, add,
                                out + (c - from), out_line);
  }
}

// NR columns of the first `rows` rows, a multiple of MR.
template <int L, int MR, int NR>
FASTRL_INLINE void tall_columns(const float* x, int64_t x_line, int64_t rows, const Linear& w, int64_t c, bool add,
                                float* out, int64_t out_line) {
  const float *weight = w.weight + c * w.line, *bias = w.bias ? w.bias + c : nullptr;
  tall_tile<L, MR, NR, true>(x, x_line, weight, w.line, w.inputs, bias, add, out, out_line);
  for (int64_t r = MR; r < rows; r += MR) {
    tall_tile<L, MR, NR, false>(x + r * x_line, x_line, weight, w.line, w.inputs, bias, add, out + r * out_line,
                                out_line);
  }
}

template <int L, int MR, int NR>
FASTRL_INLINE void product(const float* x, int64_t x_line, int64_t rows, const Linear& w, int64_t from, int64_t to,
                           bool add, float* out, int64_t out_line) {
  int64_t r = rows / MR * MR;
  if (r > 0) {
    int64_t c = from;
    for (; c + NR <= to; c += NR) tall_columns<L, MR, NR>(x, x_line, r, w, c, add, out + (c - from), out_line);
    for (; c < to; ++c) tall_columns<L, MR, 1>(x, x_line, r, w, c, add, out + (c - from), out_line);
  }
  for (; r + 2 <= rows; r += 2) broad_rows<L, 2, 4>(x + r * x_line, x_line, w, from, to, add, out + r * out_line, out_line);
  if (r < rows) broad_rows<L, 1, 8>(x + r * x_line, x_line, w, from, to, add, out + r * out_line, out_line);
}

template <int L>
FASTRL_INLINE void norm(const float* x, int64_t x_line, int64_t rows, int64_t n, const float* weight, float eps,
                        float* out, int64_t out_line) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = x + r * x_line;
    float* to = out + r * out_line;
    Floats<L> squares = {};
    int64_t i = 0;
    for (; i + L <= n; i += L) {
      const Floats<L> v = load<L>(from + i);
      squares += v * v;
    }
    float sum = total<L>(squares);
    for (; i < n; ++i) sum += from[i] * from[i];
    const float scale = 1.0f / std::sqrt(sum / static_cast<float>(n) + eps);
    for (i = 0; i + L <= n; i += L) store<L>(to + i, load<L>(from + i) * scale * load<L>(weight + i));
    for (; i < n; ++i) to[i] = from[i] * scale * weight[i];
  }
}

template <int L>
FASTRL_INLINE void rotate(const float* head, const float* cos, const float* sin, int64_t half, float factor,
                          float* out) {
  int64_t i = 0;
  for (; i + L <= half; i += L) {
    const Floats<L> a = load<L>(head + i), b = load<L>(head + half + i), c = load<L>(cos + i), s = load<L>(sin + i);
    store<L>(out + i, (a * c - b * s) * factor);
    store<L>(out + half + i, (b * c + a * s) * factor);
  }
  for (; i < half; ++i) {
    const float a = head[i], b = head[half + i];
    out[i] = (a * cos[i] - b * sin[i]) * factor;
    out[half + i] = (b * cos[i] + a * sin[i]) * factor;
  }
}

template <int L>
FASTRL_INLINE Floats<L> opened(Floats<L> gate, Floats<L> up) {
  return gate / (1.0f + exponential<L>(-gate)) * up;
}

template <int L>
FASTRL_INLINE void silu_mul(float* gate, const float* up, int64_t n) {
  int64_t i = 0;
  for (; i + L <= n; i += L) store<L>(gate + i, opened<L>(load<L>(gate + i), load<L>(up + i)));
  for (; i < n; ++i) gate[i] = opened<4>(all<4>(gate[i]), all<4>(up[i]))[0];
}

template <int L>
FASTRL_INLINE float peak(const float* x, int64_t n) {
  float best = -std::numeric_limits<float>::infinity();
  int64_t i = 0;
  if (n >= L) {
    Floats<L> high = load<L>(x);
    for (i = L; i + L <= n; i += L) {
      const Floats<L> v = load<L>(x + i);
      high = v > high ? v : high;
    }
    best = largest<L>(high);
  }
  for (; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

template <int L>
FASTRL_INLINE void weigh(float* x, int64_t n, float peak, double* sums) {
  for (int64_t from = 0; from < n; from += kBlock) {
    const int64_t to = from + kBlock < n ? from + kBlock : n;
    Floats<L> sum = {};
    int64_t i = from;
    for (; i + L <= to; i += L) {
      const Floats<L> e = exponential<L>(load<L>(x + i) - peak);
      store<L>(x + i, e);
      sum += e;
    }
    double block = total<L>(sum);
    for (; i < to; ++i) {
      x[i] = exponential<4>(all<4>(x[i] - peak))[0];
      block += x[i];
    }
    sums[from / kBlock] = block;
  }
}

template <int L>
FASTRL_INLINE double exp_sum(const float* x, int64_t n, float scale, float peak) {
  double whole = 0.0;
  for (int64_t from = 0; from < n; from += kBlock) {
    const int64_t to = from + kBlock < n ? from + kBlock : n;
    Floats<L> sum = {};
    int64_t i = from;
    for (; i + L <= to; i += L) sum += exponential<L>((load<L>(x + i) - peak) * scale);
    whole += total<L>(sum);
    for (; i < to; ++i) whole += exponential<4>(all<4>((x[i] - peak) * scale))[0];
  }
  return whole;
}

template <int L>
FASTRL_INLINE void exp_scaled(const float* x, int64_t n, float scale, float shift, float factor, float* out) {
  int64_t i = 0;
  for (; i + L <= n; i += L) store<L>(out + i, exponential<L>(load<L>(x + i) * scale - shift) * factor);
  for (; i < n; ++i) out[i] = exponential<4>(all<4>(x[i] * scale - shift))[0] * factor;
}

// MR queries times NV vectors of the output, over all keys: even ones and odd ones apart, as a sum has to wait for the
// one before it.
template <int L, int MR, int NV>
FASTRL_INLINE void mix_tile(const float* w, int64_t w_line, const float* v, int64_t keys, int64_t dim, bool add,
                            float* out, int64_t out_line) {
  Floats<L> sums[2][MR][NV];
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NV; ++n) {
      sums[0][m][n] = add ? load<L>(out + m * out_line + n * L) : Floats<L>{};
      sums[1][m][n] = Floats<L>{};
    }
  }
  int64_t k = 0;
  for (; k + 2 <= keys; k += 2) {
    FASTRL_UNROLL
    for (int odd = 0; odd < 2; ++odd) {
      Floats<L> line[NV];
      for (int n = 0; n < NV; ++n) {
        __builtin_prefetch(v + (k + odd + 16) * dim + n * L, 0, 2);
        line[n] = load<L>(v + (k + odd) * dim + n * L);
      }
      for (int m = 0; m < MR; ++m) {
        const Floats<L> weight = all<L>(w[m * w_line + k + odd]);
        for (int n = 0; n < NV; ++n) sums[odd][m][n] += weight * line[n];
      }
    }
  }
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NV; ++n) {
      if (k < keys) sums[0][m][n] += all<L>(w[m * w_line + k]) * load<L>(v + k * dim + n * L);
      store<L>(out + m * out_line + n * L, sums[0][m][n] + sums[1][m][n]);
    }
  }
}

// NV vectors of the output, all queries.
template <int L, int NV>
FASTRL_INLINE void mix_columns(const float* w, int64_t w_line, int64_t queries, const float* v, int64_t keys,
                               int64_t dim, bool add, float* out, int64_t out_line) {
  int64_t m = 0;
  for (; m + 4 <= queries; m += 4) {
    mix_tile<L, 4, NV>(w + m * w_line, w_line, v, keys, dim, add, out + m * out_line, out_line);
  }
  for (; m + 2 <= queries; m += 2) {
    mix_tile<L, 2, NV>(w + m * w_line, w_line, v, keys, dim, add, out + m * out_line, out_line);
  }
  if (m < queries) mix_tile<L, 1, NV>(w + m * w_line, w_line, v, keys, dim, add, out + m * out_line, out_line);
}

template <int L, int NV>
FASTRL_INLINE void mix(const float* w, int64_t w_line, int64_t queries, const float* v, int64_t keys, int64_t dim,
                       bool add, float* out, int64_t out_line) {
  int64_t d = 0;
  for (; d + NV * L <= dim; d += NV * L) {
    mix_columns<L, NV>(w, w_line, queries, v + d, keys, dim, add, out + d, out_line);
  }
  for (; d + L <= dim; d += L) mix_columns<L, 1>(w, w_line, queries, v + d, keys, dim, add, out + d, out_line);
  if constexpr (L > 4) {
    for (; d + 4 <= dim; d += 4) mix_columns<4, 1>(w, w_line, queries, v + d, keys, dim, add, out + d, out_line);
  }
  for (; d < dim; ++d) {
    for (int64_t m = 0; m < queries; ++m) {
      float sum = add ? out[m * out_line + d] : 0.0f;
      for (int64_t k = 0; k < keys; ++k) sum += w[m * w_line + k] * v[k * dim + d];
      out[m * out_line + d] = sum;
    }
  }
}

// One table: vectors of L floats; tiles of MR x NR, and of 4 x NV twice, that fill the registers.
#define FASTRL_TABLE(NAME, TARGET, L, MR, NR, NV)                                                                          \
  namespace NAME {                                                                                                     \
  TARGET void product(const float* x, int64_t x_line, int64_t rows, const Linear& w, int64_t from, int64_t to,         \
                      bool add, float* out, int64_t out_line) {                                                        \
    fastrl::product<L, MR, NR>(x, x_line, rows, w, from, to, add, out, out_line);                                      \
  }                                                                                                                    \
  TARGET void norm(const float* x, int64_t x_line, int64_t rows, int64_t n, const float* weight, float eps,            \
                   float* out, int64_t out_line) {                                                                     \
    fastrl::norm<L>(x, x_line, rows, n, weight, eps, out, out_line);                                                   \
  }                                                                                                                    \
  TARGET void rotate(const float* head, const float* cos, const float* sin, int64_t half, float factor, float* out) {  \
    fastrl::rotate<L>(head, cos, sin, half, factor, out);                                                              \
  }                                                                                                                    \
  TARGET void silu_mul(float* gate, const float* up, int64_t n) { fastrl::silu_mul<L>(gate, up, n); }                  \
  TARGET float peak(const float* x, int64_t n) { return fastrl::peak<L>(x, n); }                                       \
  TARGET void weigh(float* x, int64_t n, float peak, double* sums) { fastrl::weigh<L>(x, n, peak, sums); }             \
  TARGET void mix(const float* w, int64_t w_line, int64_t queries, const float* v, int64_t keys, int64_t dim,          \
                  bool add, float* out, int64_t out_line) {                                                            \
    fastrl::mix<L, NV>(w, w_line, queries, v, keys, dim, add, out, out_line);                                              \
  }                                                                                                                    \
  TARGET double exp_sum(const float* x, int64_t n, float scale, float peak) {                                          \
    return fastrl::exp_sum<L>(x, n, scale, peak);                                                                      \
  }                                                                                                                    \
  TARGET void exp_scaled(const float* x, int64_t n, float scale, float shift, float factor, float* out) {              \
    fastrl::exp_scaled<L>(x, n, scale, shift, factor, out);                                                            \
  }                                                                                                                    \
  constexpr Kernels table = {product, norm, rotate, silu_mul, peak, weigh, mix, exp_sum, exp_scaled};                  \
  }

FASTRL_TABLE(baseline, , 4, 4, 2, 1)
#if defined(__x86_64__)
FASTRL_TABLE(avx2, __attribute__((target("avx2,fma"))), 8, 4, 3, 1)
FASTRL_TABLE(avx512, __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), 16, 4, 6, 2)
#endif

}  // namespace

const Kernels* kernels_of(int level) {
  if (level < 0 || level > best_level()) return nullptr;
#if defined(__x86_64__)
  if (level == kAvx512) return &avx512::table;
  if (level == kAvx2) return &avx2::table;
#endif
  return &baseline::table;
}

int best_level() {
#if defined(__x86_64__)
  static const int best = [] {
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    const bool half = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return half ? (wide ? kAvx512 : kAvx2) : kBaseline;
  }();
  return best;
#else
  return kBaseline;
#endif
}

}  // namespace fastrl
