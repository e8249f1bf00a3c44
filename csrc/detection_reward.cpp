// Batched detection reward: fastrl_detection_reward.
//
// For each answer: qualities of all pairs (IoU of boxes, or 1 - distance / scale of points) in a small per-thread
// buffer, the matching of largest total quality, then location, label, precision, recall, F1 and missing.

#include <cmath>

#include "assignment.hpp"

namespace fastrl {
namespace {

enum Part { kLocation, kLabel, kPrecision, kRecall, kF1, kMissing, kParts };

template <class T>
struct Answers {
  const T* pred;              // [B, n, coords]
  const T* gt;                // [B, m, coords]
  const int64_t* n_pred;      // [B]
  const int64_t* n_gt;        // [B]
  const int64_t* pred_label;  // [B, n] or null
  const int64_t* gt_label;    // [B, m] or null
  int64_t problems, n, m;
  bool boxes, sequence;
  T threshold, scale;
  int64_t* match;             // [B, n]
  T* quality;                 // [B, n]
  T* parts;                   // [6, B]
};

template <class T>
struct Scratch : AssignmentScratch {
  Buffer<T> cost, x1, y1, x2, y2, area;
};

template <class T>
struct Lanes {  // one answer's predictions, coordinate by coordinate
  T *x1, *y1, *x2, *y2, *area;
};

// Bounds for valid boxes, as in pairwise_iou: coordinates must be below kFarthest, unions above kEmpty.
constexpr double kFarthest = 1099511627776.0;                 // 2^40
constexpr double kEmpty = 1.0 / 1208925819614629174706176.0;  // 2^-80

// A box that is inverted, flat or not finite is moved to where it overlaps nothing.
template <class T>
FASTRL_INLINE void read_box(const T* box, T& x1, T& y1, T& x2, T& y2, T& area) {
  const T inf = std::numeric_limits<T>::infinity(), far = T(kFarthest);
  bool real = box[2] > box[0] && box[3] > box[1];
  for (int k = 0; k < 4; ++k) real = real && box[k] > -far && box[k] < far;
  x1 = real ? box[0] : inf;
  y1 = real ? box[1] : inf;
  x2 = real ? box[2] : -inf;
  y2 = real ? box[3] : -inf;
  area = real ? (box[2] - box[0]) * (box[3] - box[1]) : T(1);
}

// Writes minus the quality of one truth with every prediction: the assignment minimises, and 0 is "not a pair".
template <class T>
FASTRL_INLINE void cost_row(const Answers<T>& a, const T* gt, const Lanes<T>& p, int64_t width, T* __restrict row) {
  if (a.boxes) {
    T x1, y1, x2, y2, area;
    read_box(gt, x1, y1, x2, y2, area);
    for (int64_t j = 0; j < width; ++j) {
      const T left = p.x1[j] > x1 ? p.x1[j] : x1, right = p.x2[j] < x2 ? p.x2[j] : x2;
      const T top = p.y1[j] > y1 ? p.y1[j] : y1, bottom = p.y2[j] < y2 ? p.y2[j] : y2;
      const T w = right - left, h = bottom - top;
      const T inter = (w > 0 ? w : T(0)) * (h > 0 ? h : T(0));
      const T whole = (p.area[j] + area) - inter;
      const T iou = whole > T(kEmpty) ? inter / whole : T(0);
      row[j] = -(iou < 1 ? iou : T(1));
    }
  } else {
    for (int64_t j = 0; j < width; ++j) {
      const T dx = p.x1[j] - gt[0], dy = p.y1[j] - gt[1];
      const T d = std::sqrt(dx * dx + dy * dy);
      row[j] = d < a.scale ? d / a.scale - T(1) : T(0);  // false for NaN
    }
  }
}

template <class T>
FASTRL_INLINE Lanes<T> read_predictions(const Answers<T>& a, Scratch<T>& s, const T* pred, int64_t count,
                                        int64_t width) {
  Lanes<T> p{s.x1.reserve(width), s.y1.reserve(width), s.x2.reserve(width), s.y2.reserve(width),
             s.area.reserve(width)};
  const T inf = std::numeric_limits<T>::infinity();
  for (int64_t j = 0; j < width; ++j) {
    if (j >= count) {
      p.x1[j] = p.y1[j] = inf;
      p.x2[j] = p.y2[j] = -inf;
      p.area[j] = T(1);
    } else if (a.boxes) {
      read_box(pred + 4 * j, p.x1[j], p.y1[j], p.x2[j], p.y2[j], p.area[j]);
    } else {
      p.x1[j] = pred[2 * j];
      p.y1[j] = pred[2 * j + 1];
    }
  }
  return p;
}

FASTRL_INLINE int64_t clamp_count(int64_t count, int64_t size) { return count < 0 ? 0 : (count > size ? size : count); }

template <class T>
FASTRL_INLINE void summarise(const Answers<T>& a, int64_t b, int64_t preds, int64_t truths) {
  const int64_t* match = a.match + b * a.n;
  const T* quality = a.quality + b * a.n;
  double sum = 0.0;
  int64_t matched = 0, same = 0, hits = 0;
  for (int64_t j = 0; j < preds; ++j) {
    if (match[j] < 0) continue;
    ++matched;
    sum += static_cast<double>(quality[j]);
    hits += quality[j] >= a.threshold;
    same += !a.pred_label || a.pred_label[b * a.n + j] == a.gt_label[b * a.m + match[j]];
  }
  const bool nothing = preds == 0 && truths == 0;
  auto rate = [&](double part, int64_t whole) { return whole > 0 ? part / static_cast<double>(whole) : double(nothing); };
  auto put = [&](Part part, double value) { a.parts[part * a.problems + b] = static_cast<T>(value); };
  put(kLocation, rate(sum, matched));
  put(kLabel, rate(double(same), matched));
  put(kPrecision, rate(double(hits), preds));
  put(kRecall, rate(double(hits), truths));
  put(kF1, rate(2.0 * double(hits), preds + truths));
  put(kMissing, truths > 0 ? double(hits - truths) / double(truths) : 0.0);
}

template <class T>
FASTRL_INLINE void score_one(const Answers<T>& a, Scratch<T>& s, int64_t b) {
  const int64_t coords = a.boxes ? 4 : 2;
  const int64_t preds = clamp_count(a.n_pred[b], a.n), truths = clamp_count(a.n_gt[b], a.m);
  const T* gt = a.gt + b * a.m * coords;
  int64_t* match = a.match + b * a.n;
  T* quality = a.quality + b * a.n;
  for (int64_t j = 0; j < a.n; ++j) {
    match[j] = -1;
    quality[j] = T(0);
  }
  Problem<T> p;
  p.rows = truths;
  p.cols = preds;
  p.stride = padded(preds);
  T* cost = s.cost.reserve(truths * p.stride + kLanes);
  const Lanes<T> lanes = read_predictions(a, s, a.pred + b * a.n * coords, preds, p.stride);
  for (int64_t i = 0; i < truths; ++i) cost_row(a, gt + i * coords, lanes, p.stride, cost + i * p.stride);
  auto accept = [&](int64_t j, int64_t i) {
    const T q = -cost[i * p.stride + j];
    if (!(q > 0)) return;
    match[j] = i;
    quality[j] = q;
  };
  if (a.sequence) {
    for (int64_t j = 0; j < preds && j < truths; ++j) accept(j, j);
  } else if (preds > 0) {
    p.cost = cost;
    p.bind(s);
    solve_optional(p);
    for (int64_t j = 0; j < preds; ++j) {
      if (p.owner[j] >= 0) accept(j, p.owner[j]);
    }
  }
  summarise(a, b, preds, truths);
}

template <class T>
void score_baseline(const Answers<T>& a, Scratch<T>& s, int64_t b) { score_one(a, s, b); }
#if FASTRL_HAS_AVX2_BUILD
template <class T>
FASTRL_AVX2 void score_avx2(const Answers<T>& a, Scratch<T>& s, int64_t b) { score_one(a, s, b); }
#endif

template <class T>
int run(const void* pred, const void* gt, void* quality, void* parts, double threshold, double scale, Answers<T> a,
        int threads) {
  a.pred = static_cast<const T*>(pred);
  a.gt = static_cast<const T*>(gt);
  a.quality = static_cast<T*>(quality);
  a.parts = static_cast<T*>(parts);
  a.threshold = static_cast<T>(threshold);
  a.scale = static_cast<T>(scale);
  auto score = score_baseline<T>;
#if FASTRL_HAS_AVX2_BUILD
  if (has_avx2()) score = score_avx2<T>;
#endif
  const double work = 64.0 + 4.0 * static_cast<double>(a.n) * static_cast<double>(a.m);
  return for_each_problem<Scratch<T>>(a.problems, threads, work,
                                      [&](Scratch<T>& s, int64_t b) { score(a, s, b); });
}

}  // namespace
}  // namespace fastrl

#define FASTRL_API extern "C" __attribute__((visibility("default")))

// pred [B, n, 4|2], gt [B, m, 4|2] contiguous, float (is_double 0) or double (1); counts int64 [B]; labels int64 or
// both null; quality [B, n] and parts [6, B] have pred's type. Returns 0, or 1 if out of memory.
FASTRL_API int fastrl_detection_reward(int is_double, const void* pred, const void* gt, const int64_t* n_pred,
                                       const int64_t* n_gt, const int64_t* pred_label, const int64_t* gt_label,
                                       int64_t problems, int64_t n, int64_t m, int boxes, int sequence,
                                       double threshold, double scale, int64_t* match, void* quality, void* parts,
                                       int threads) {
  auto call = [&](auto zero) {
    using T = decltype(zero);
    fastrl::Answers<T> a{};
    a.n_pred = n_pred;
    a.n_gt = n_gt;
    a.pred_label = pred_label;
    a.gt_label = gt_label;
    a.problems = problems;
    a.n = n;
    a.m = m;
    a.boxes = boxes != 0;
    a.sequence = sequence != 0;
    a.match = match;
    return fastrl::run<T>(pred, gt, quality, parts, threshold, scale, a, threads);
  };
  return is_double ? call(double{}) : call(float{});
}
