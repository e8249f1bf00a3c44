// Batched rectangular assignment: fastrl_linear_assignment.

#include <type_traits>

#include "assignment.hpp"

namespace fastrl {
namespace {

enum Status : int32_t { kInfeasible = 1, kInvalid = 2 };

template <class T>
struct Batch {
  const T* cost;            // [B, n, m]
  const int64_t* n_rows;    // [B] or null
  const int64_t* n_cols;    // [B] or null
  int64_t n, m;
  bool maximize;
  int64_t* match;           // [B, n]
  T* total;                 // [B]
  int32_t* status;          // [B]
};

template <class T>
struct Scratch : AssignmentScratch {
  Buffer<T> cost;
};

FASTRL_INLINE int64_t clamp_count(const int64_t* counts, int64_t b, int64_t size) {
  if (!counts) return size;
  return counts[b] < 0 ? 0 : (counts[b] > size ? size : counts[b]);
}

// Cleans entries while copying: sets the sign for minimising, and turns NaN and -inf into +inf (forbidden) and a flag.
template <class T>
struct Cleaner {
  using Flag = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // as wide as T: the loops vectorise
  using Vector = std::conditional_t<sizeof(T) == 4, f32x4, f64x4>;
  using Flags = std::conditional_t<sizeof(T) == 4, i32x4, i64x4>;
  static constexpr T inf = std::numeric_limits<T>::infinity();
  T sign;
  Flag bad = 0;
  Flags bad4 = {0, 0, 0, 0};

  FASTRL_INLINE T one(T x) {
    const bool good = sign * x > -inf;
    bad |= Flag(!good);
    return good ? sign * x : inf;
  }
  FASTRL_INLINE void four(Vector x, T* to) {
    const Vector y = Vector{sign, sign, sign, sign} * x, top = {inf, inf, inf, inf};
    const Flags good = y > -top;
    bad4 |= ~good;
    const Vector clean = good ? y : top;
    __builtin_memcpy(to, &clean, sizeof clean);
  }
  FASTRL_INLINE bool any() const { return (bad | bad4[0] | bad4[1] | bad4[2] | bad4[3]) != 0; }
};

// Transposes four vectors of four in place.
template <class Vector>
FASTRL_INLINE void transpose4(Vector* r) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FASTRL_SHUFFLE 1
#endif
#endif
#ifdef FASTRL_SHUFFLE
  const Vector a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
  const Vector c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  r[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  r[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  r[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  r[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
#else
  const Vector a = r[0], b = r[1], c = r[2], d = r[3];
  for (int k = 0; k < 4; ++k) r[k] = Vector{a[k], b[k], c[k], d[k]};
#endif
}

// to[j][i] = from[i][j], in 4x4 blocks.
template <class T>
FASTRL_INLINE void load_transposed(const T* from, int64_t m, int64_t rows, int64_t cols, int64_t stride,
                                   Cleaner<T>& clean, T* to) {
  using Vector = typename Cleaner<T>::Vector;
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    int64_t j = 0;
    for (; j + 4 <= cols; j += 4) {
      Vector line[4];
      for (int64_t k = 0; k < 4; ++k) __builtin_memcpy(&line[k], from + (i + k) * m + j, sizeof(Vector));
      transpose4(line);
      for (int64_t k = 0; k < 4; ++k) clean.four(line[k], to + (j + k) * stride + i);
    }
    for (; j < cols; ++j) {
      for (int64_t k = i; k < i + 4; ++k) to[j * stride + k] = clean.one(from[k * m + j]);
    }
  }
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) to[j * stride + i] = clean.one(from[i * m + j]);
  }
}

// Copies one problem with the shorter side as rows. Returns whether there were invalid entries (NaN or -inf).
template <class T>
FASTRL_INLINE bool load_problem(const T* from, int64_t m, int64_t rows, int64_t cols, bool maximize, T* to) {
  const bool swap = rows > cols;
  const int64_t height = swap ? cols : rows, width = swap ? rows : cols, stride = padded(width);
  Cleaner<T> clean{maximize ? T(-1) : T(1)};
  if (swap) {
    load_transposed(from, m, rows, cols, stride, clean, to);
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) to[i * stride + j] = clean.one(from[i * m + j]);
    }
  }
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t j = width; j < stride; ++j) to[i * stride + j] = Cleaner<T>::inf;
  }
  return clean.any();
}

template <class T>
FASTRL_INLINE void solve_one(const Batch<T>& batch, Scratch<T>& scratch, int64_t b) {
  const int64_t rows = clamp_count(batch.n_rows, b, batch.n), cols = clamp_count(batch.n_cols, b, batch.m);
  const bool swap = rows > cols;
  int64_t* match = batch.match + b * batch.n;
  for (int64_t i = 0; i < batch.n; ++i) match[i] = -1;
  Problem<T> p;
  p.rows = swap ? cols : rows;
  p.cols = swap ? rows : cols;
  p.stride = padded(p.cols);
  const T* source = batch.cost + b * batch.n * batch.m;
  T* cost = scratch.cost.reserve(p.rows * p.stride + kLanes);
  p.cost = cost;
  p.bind(scratch);
  int32_t status = load_problem(source, batch.m, rows, cols, batch.maximize, cost) ? kInvalid : 0;
  if (!solve_complete(p, scratch.queue.reserve(p.rows + 1))) status |= kInfeasible;
  double total = 0.0;
  for (int64_t j = 0; j < p.cols; ++j) {
    if (p.owner[j] < 0) continue;
    const int64_t row = swap ? j : p.owner[j], col = swap ? p.owner[j] : j;
    match[row] = col;
    total += static_cast<double>(source[row * batch.m + col]);
  }
  batch.total[b] = static_cast<T>(total);
  batch.status[b] = status;
}

template <class T>
void solve_baseline(const Batch<T>& batch, Scratch<T>& scratch, int64_t b) { solve_one(batch, scratch, b); }
#if FASTRL_HAS_AVX2_BUILD
template <class T>
FASTRL_AVX2 void solve_avx2(const Batch<T>& batch, Scratch<T>& scratch, int64_t b) { solve_one(batch, scratch, b); }
#endif

template <class T>
int run(const Batch<T>& batch, int64_t problems, int threads) {
  auto solve = solve_baseline<T>;
#if FASTRL_HAS_AVX2_BUILD
  if (has_avx2()) solve = solve_avx2<T>;
#endif
  const double work = 4.0 * static_cast<double>(batch.n) * static_cast<double>(batch.m);
  return for_each_problem<Scratch<T>>(problems, threads, work,
                                      [&](Scratch<T>& scratch, int64_t b) { solve(batch, scratch, b); });
}

}  // namespace
}  // namespace fastrl

#define FASTRL_API extern "C" __attribute__((visibility("default")))

// cost [B, n, m] contiguous, float (is_double 0) or double (1); counts int64 [B] or null; total has cost's type.
// Returns 0, or 1 if out of memory.
FASTRL_API int fastrl_linear_assignment(int is_double, const void* cost, const int64_t* n_rows, const int64_t* n_cols,
                                        int64_t problems, int64_t n, int64_t m, int maximize, int64_t* match,
                                        void* total, int32_t* status, int threads) {
  using fastrl::Batch;
  if (is_double) {
    return fastrl::run(Batch<double>{static_cast<const double*>(cost), n_rows, n_cols, n, m, maximize != 0, match,
                                     static_cast<double*>(total), status},
                       problems, threads);
  }
  return fastrl::run(Batch<float>{static_cast<const float*>(cost), n_rows, n_cols, n, m, maximize != 0, match,
                                  static_cast<float*>(total), status},
                     problems, threads);
}
