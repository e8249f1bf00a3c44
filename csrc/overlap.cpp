// Overlaps of every box of one set with every box of another, without gradient: fastrl_pairwise_iou. The definitions and
// edge cases are those of fastrl_kernels/pairwise_iou.py, in float like there; boxes are read once, pairs in one pass.

#include <cmath>

#include "common.hpp"

namespace fastrl {
namespace {

enum Kind { kIou, kGiou, kDiou, kCiou };
constexpr float kFarthest = 1099511627776.0f;                         // 2^40
constexpr float kEmpty = 1.0f / 1208925819614629174706176.0f;         // 2^-80
constexpr float kEps = 1e-7f;
constexpr float kAspect = 4.0 / (3.14159265358979323846 * 3.14159265358979323846);

FASTRL_INLINE float positive(float x) { return x > 0.0f ? x : 0.0f; }
FASTRL_INLINE float lesser(float a, float b) { return a < b ? a : b; }
FASTRL_INLINE float greater(float a, float b) { return a > b ? a : b; }

struct Box {
  float x1, y1, x2, y2, area, angle;
  bool near;  // all coordinates are

  FASTRL_INLINE Box(const float* from, bool aspect) {
    float c[4];
    near = true;
    for (int k = 0; k < 4; ++k) {
      const bool fine = std::fabs(from[k]) < kFarthest;
      c[k] = fine ? from[k] : 0.0f;
      near = near && fine;
    }
    x1 = c[0], y1 = c[1], x2 = c[2], y2 = c[3];
    const float w = positive(x2 - x1), h = positive(y2 - y1);
    area = w * h;
    angle = aspect && w > 0.0f ? (h > 0.0f ? std::atan(w / h) : 1.57079632679489661923f) : 0.0f;
  }
};

struct Columns {  // the other set, coordinate by coordinate
  const float *x1, *y1, *x2, *y2, *area, *angle, *near;
};

template <int K>
FASTRL_INLINE void row_of(const Box& a, const Columns& b, int64_t m, float* __restrict out) {
  for (int64_t j = 0; j < m; ++j) {
    const float iw = positive(lesser(a.x2, b.x2[j]) - greater(a.x1, b.x1[j]));
    const float inter = iw * positive(lesser(a.y2, b.y2[j]) - greater(a.y1, b.y1[j]));
    const float whole = (a.area + b.area[j]) - inter;
    const float iou = whole > kEmpty ? inter / whole : 0.0f;
    float value = iou;
    if constexpr (K != kIou) {
      const float cw = positive(greater(a.x2, b.x2[j]) - lesser(a.x1, b.x1[j]));
      const float ch = positive(greater(a.y2, b.y2[j]) - lesser(a.y1, b.y1[j]));
      if constexpr (K == kGiou) {
        const float hull = cw * ch;
        value = hull > kEmpty ? iou - (hull - whole) / hull : iou;
      } else {
        const float dx = ((a.x1 + a.x2) - (b.x1[j] + b.x2[j])) * 0.5f, dy = ((a.y1 + a.y2) - (b.y1[j] + b.y2[j])) * 0.5f;
        value = iou - (dx * dx + dy * dy) / ((cw * cw + ch * ch) + kEps);
      }
      if constexpr (K == kCiou) {
        const float turn = a.angle - b.angle[j], v = kAspect * (turn * turn);
        value = value - v * v / (((1.0f - iou) + v) + kEps);
      }
    }
    out[j] = b.near[j] > 0.0f ? value : 0.0f;
  }
}

struct Sets {
  const float *a, *b;            // [B, n, 4], [B, m, 4]
  const int64_t *n_a, *n_b;      // [B] or null: all
  int64_t problems, n, m;
  int kind;
  bool reduce;
  float* out;  // [B, n, m], or [B, n]
};

struct Scratch {
  Buffer<float> columns, row;
};

FASTRL_INLINE int64_t count_of(const int64_t* counts, int64_t b, int64_t size) {
  return !counts ? size : counts[b] < 0 ? 0 : counts[b] > size ? size : counts[b];
}

template <int K>
FASTRL_INLINE void problem(const Sets& x, Scratch& scratch, int64_t number) {
  const int64_t rows = count_of(x.n_a, number, x.n), cols = count_of(x.n_b, number, x.m);
  float* room = scratch.columns.reserve(7 * x.m + 1);
  float* c[7];
  for (int k = 0; k < 7; ++k) c[k] = room + k * x.m;
  for (int64_t j = 0; j < cols; ++j) {
    const Box box(x.b + (number * x.m + j) * 4, K == kCiou);
    c[0][j] = box.x1, c[1][j] = box.y1, c[2][j] = box.x2, c[3][j] = box.y2;
    c[4][j] = box.area, c[5][j] = box.angle, c[6][j] = box.near ? 1.0f : 0.0f;
  }
  const Columns columns{c[0], c[1], c[2], c[3], c[4], c[5], c[6]};
  float* spare = x.reduce ? scratch.row.reserve(x.m + 1) : nullptr;
  for (int64_t i = 0; i < x.n; ++i) {
    const int64_t at = number * x.n + i;
    float* out = x.reduce ? spare : x.out + at * x.m;
    int64_t done = 0;
    if (i < rows) {
      const Box box(x.a + at * 4, K == kCiou);
      if (box.near) {
        row_of<K>(box, columns, cols, out);
        done = cols;
      }
    }
    if (x.reduce) {
      float top = done ? out[0] : 0.0f;
      for (int64_t j = 1; j < done; ++j) top = out[j] > top ? out[j] : top;
      x.out[at] = top;
    } else {
      for (int64_t j = done; j < x.m; ++j) out[j] = 0.0f;
    }
  }
}

FASTRL_INLINE void any_kind(const Sets& x, Scratch& scratch, int64_t number) {
  if (x.kind == kIou) problem<kIou>(x, scratch, number);
  if (x.kind == kGiou) problem<kGiou>(x, scratch, number);
  if (x.kind == kDiou) problem<kDiou>(x, scratch, number);
  if (x.kind == kCiou) problem<kCiou>(x, scratch, number);
}

void problem_baseline(const Sets& x, Scratch& scratch, int64_t number) { any_kind(x, scratch, number); }
#if FASTRL_HAS_AVX2_BUILD
FASTRL_AVX2 void problem_avx2(const Sets& x, Scratch& scratch, int64_t number) { any_kind(x, scratch, number); }
#endif

}  // namespace
}  // namespace fastrl

// a [problems, n, 4], b [problems, m, 4]; n_a, n_b [problems] or null; kind 0 iou, 1 giou, 2 diou, 3 ciou. Writes
// [problems, n, m], or with `reduce` each row's maximum [problems, n]. Returns 0, or 1 if out of memory.
extern "C" __attribute__((visibility("default"))) int fastrl_pairwise_iou(const float* a, const float* b,
                                                                          const int64_t* n_a, const int64_t* n_b,
                                                                          int64_t problems, int64_t n, int64_t m,
                                                                          int kind, int reduce, float* out,
                                                                          int threads) {
  using namespace fastrl;
  const Sets x{a, b, n_a, n_b, problems, n, m, kind, reduce != 0, out};
  auto run = problem_baseline;
#if FASTRL_HAS_AVX2_BUILD
  if (has_avx2()) run = problem_avx2;
#endif
  const double work = 64.0 + 2.0 * static_cast<double>(n) * static_cast<double>(m);
  return for_each_problem<Scratch>(problems, threads, work, [&](Scratch& s, int64_t number) { run(x, s, number); });
}
