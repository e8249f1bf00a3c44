// The rows of a policy loss and their sums: fastrl_policy_rows. The formula and its gradient are those of
// fastrl_kernels/policy_loss.py, option by option those of _policy_rows.py's rows_eager. Double inside, four rows at a
// time, one order of additions.

#include "exact.hpp"

namespace fastrl {
namespace {

enum Loss { kClip, kCispo, kSapo };
enum Importance { kNone, kTruncate, kMask };
constexpr double kLimit = 20.0;  // of a log-ratio

struct Rules {
  double low, high, dual_clip, beta, cap, tau_positive, tau_negative;
  int loss, kl, importance;  // kl 1 to 3
  bool dual, k2_gradient, penalised, sequence, importance_sequence;
};

struct Vectors {
  const float *logp, *advantage;
  const int64_t* completion;
  const float *weight, *old, *ref, *sampler;
  int64_t n, completions;
};

// What the rows of a completion have in common.
struct Shared {
  double count = 0.0, log_ratio = 0.0, own = 0.0, log_weight = 0.0;
};

struct Lanes {
  f64x4 w = {}, a = {}, p = {}, old = {}, ref = {}, log_weight = {};
  i64x4 live = {};  // all bits set, or none
  int64_t completion[4] = {};

  FASTRL_INLINE Lanes(const Vectors& v, int64_t from) {
    if (from + 4 <= v.n && all_live(v, from)) {
      load(v, from);
    } else {
      load_live(v, from);
    }
  }

  FASTRL_INLINE static bool all_live(const Vectors& v, int64_t from) {
    bool live = true;
    for (int64_t i = from; i < from + 4; ++i) {
      live = live & (v.weight[i] != 0.0f) & (v.completion[i] >= 0) & (v.completion[i] < v.completions);
    }
    return live;
  }

  FASTRL_INLINE void load(const Vectors& v, int64_t from) {
    live = i64x4{-1, -1, -1, -1};
    __builtin_memcpy(completion, v.completion + from, sizeof completion);
    a = f64x4{v.advantage[completion[0]], v.advantage[completion[1]], v.advantage[completion[2]],
              v.advantage[completion[3]]};
    w = widened(v.weight + from);
    p = widened(v.logp + from);
    old = v.old ? widened(v.old + from) : p;
    if (v.ref) ref = widened(v.ref + from);
    if (v.sampler) {
      const f64x4 sampler = widened(v.sampler + from);
      log_weight = sampler == sampler ? old - sampler : f64x4{};
    }
  }

  FASTRL_INLINE void load_live(const Vectors& v, int64_t from) {
    for (int64_t l = 0; l < 4 && from + l < v.n; ++l) {
      const int64_t i = from + l, c = v.completion[i];
      if (!(v.weight[i] != 0.0f) || c < 0 || c >= v.completions) continue;
      live[l] = -1;
      completion[l] = c;
      w[l] = v.weight[i];
      a[l] = v.advantage[c];
      p[l] = v.logp[i];
      old[l] = v.old ? v.old[i] : v.logp[i];
      if (v.ref) ref[l] = v.ref[i];
      if (v.sampler && v.sampler[i] == v.sampler[i]) log_weight[l] = old[l] - v.sampler[i];
    }
  }
  FASTRL_INLINE f64x4 log_ratio(const Vectors& v) const { return v.old ? p - old : f64x4{}; }
};

// The weight of the rows' objective; that of their KL stays w.
FASTRL_INLINE f64x4 own_weight(const Lanes& x, const Rules& rules, const Shared* shared) {
  if (rules.importance == kNone) return x.w;
  f64x4 log_weight = x.log_weight;
  if (rules.importance_sequence) {
    for (int l = 0; l < 4; ++l) log_weight[l] = x.live[l] ? shared[x.completion[l]].log_weight : 0.0;
  }
  const f64x4 factor = exponential(clamped(log_weight, -kLimit, kLimit));
  return x.w * (factor > rules.cap ? all4(rules.importance == kTruncate ? rules.cap : 0.0) : factor);
}

FASTRL_INLINE f64x4 sigmoid(f64x4 x) {
  const f64x4 e = exponential(-magnitude(x));
  return (x >= 0.0 ? all4(1.0) : e) / (1.0 + e);
}

struct Surrogate {
  f64x4 value, slope, ratio;
  i64x4 low, high;
};

FASTRL_INLINE Surrogate surrogate(f64x4 log_ratio, const Lanes& x, const Rules& rules) {
  const f64x4 limited = clamped(log_ratio, -kLimit, kLimit), r = exponential(limited), a = x.a;
  Surrogate s{f64x4{}, f64x4{}, r, (a < 0.0) & (r < rules.low), (a > 0.0) & (r > rules.high)};
  i64x4 stopped = limited != log_ratio;
  if (rules.loss == kCispo) {
    s.slope = -a * (r < rules.low ? all4(rules.low) : (r > rules.high ? all4(rules.high) : r));
    s.value = s.slope * x.p;
  } else if (rules.loss == kSapo) {
    const f64x4 tau = a > 0.0 ? all4(rules.tau_positive) : all4(rules.tau_negative);
    const f64x4 gate = sigmoid(tau * (r - 1.0));
    s.value = -a * gate * 4.0 / tau;
    s.slope = stopped ? f64x4{} : -a * 4.0 * gate * sigmoid(tau * (1.0 - r)) * r;
    s.low = s.high = i64x4{};
  } else {
    f64x4 used = s.low ? all4(rules.low) : (s.high ? all4(rules.high) : r);
    stopped |= s.low | s.high;
    if (rules.dual) {
      const i64x4 beyond = (a < 0.0) & (used > rules.dual_clip);
      used = beyond ? all4(rules.dual_clip) : used;
      stopped |= beyond;
    }
    s.value = -a * used;
    s.slope = stopped ? f64x4{} : -a * r;
  }
  return s;
}

struct Kl {
  f64x4 value, slope;
};

FASTRL_INLINE Kl divergence(f64x4 x, const Rules& rules) {
  Kl kl{-x, all4(1.0)};
  if (rules.kl == 2) {
    kl = {0.5 * x * x, -x};
  } else if (rules.kl == 3) {
    const f64x4 capped = x > kLimit ? all4(kLimit) : x, growth = exp_less_one(capped);
    kl = {growth - capped + growth * (x - capped), -growth};
  }
  if (rules.k2_gradient) kl.slope = -x;
  return kl;
}

FASTRL_INLINE void share(const Vectors& v, const Rules& rules, Shared* shared) {
  for (int64_t i = 0; i < v.n; i += 4) {
    const Lanes x(v, i);
    const f64x4 log_ratio = x.log_ratio(v);
    for (int l = 0; l < 4; ++l) {
      if (!x.live[l]) continue;
      Shared& own = shared[x.completion[l]];
      own.count += 1.0;
      own.log_ratio += log_ratio[l];
      own.log_weight += x.log_weight[l];
    }
  }
  for (int64_t i = 0; i < v.n; i += 4) {
    const Lanes x(v, i);
    const f64x4 weight = own_weight(x, rules, shared);
    for (int l = 0; l < 4; ++l) {
      if (x.live[l]) shared[x.completion[l]].own += weight[l];
    }
  }
}

struct Sums {
  f64x4 loss = {}, kl = {}, ratio = {}, largest = {};
  i64x4 low = {}, high = {}, count = {};
};

FASTRL_INLINE void rows(const Vectors& v, const Rules& rules, const Shared* shared, float* loss, float* dlogp,
                        float* partials) {
  Sums sums;
  for (int64_t i = 0; i < v.n; i += 4) {
    const Lanes x(v, i);
    const f64x4 own = own_weight(x, rules, shared);
    f64x4 log_ratio = x.log_ratio(v), slope_weight = own;
    if (rules.sequence) {
      for (int l = 0; l < 4; ++l) {
        const Shared& of = shared[x.completion[l]];
        log_ratio[l] = x.live[l] ? of.log_ratio / of.count : 0.0;
        if (rules.loss != kCispo) slope_weight[l] = x.live[l] ? of.own / of.count : 0.0;
      }
    }
    const Surrogate s = surrogate(log_ratio, x, rules);
    f64x4 row = own * s.value, slope = slope_weight * s.slope;
    if (v.ref) {
      const Kl kl = divergence(x.ref - x.p, rules);
      if (rules.penalised) {  // an infinite KL must not turn an unpenalised loss into NaN
        row += x.w * rules.beta * kl.value;
        slope += x.w * rules.beta * kl.slope;
      }
      sums.kl += kl.value;
    }
    const f64x4 ratio = x.live ? s.ratio : f64x4{};
    sums.loss += row;
    sums.ratio += ratio;
    sums.largest = (ratio > sums.largest) | (ratio != ratio) ? ratio : sums.largest;  // NaN stays
    sums.low -= x.live & s.low;
    sums.high -= x.live & s.high;
    sums.count -= x.live;
    float last[2][4];
    const bool whole = i + 4 <= v.n;
    narrowed(row, whole ? loss + i : last[0]);
    narrowed(slope, whole ? dlogp + i : last[1]);
    for (int64_t l = 0; !whole && i + l < v.n; ++l) {
      loss[i + l] = last[0][l];
      dlogp[i + l] = last[1][l];
    }
  }
  const auto count = [](i64x4 x) { return static_cast<float>(x[0] + x[1] + x[2] + x[3]); };
  double largest = 0.0;
  for (int l = 0; l < 4; ++l) {
    const double one = sums.largest[l];
    largest = one > largest || one != one ? one : largest;
  }
  const float found[8] = {static_cast<float>(total(sums.loss)), static_cast<float>(total(sums.kl)), count(sums.low),
                          count(sums.high), static_cast<float>(total(sums.ratio)), static_cast<float>(largest),
                          count(sums.count), 0.0f};
  __builtin_memcpy(partials, found, sizeof found);
}

FASTRL_INLINE void both(const Vectors& v, const Rules& rules, Shared* shared, float* loss, float* dlogp,
                        float* partials) {
  if (shared) share(v, rules, shared);
  rows(v, rules, shared, loss, dlogp, partials);
}

void both_baseline(const Vectors& v, const Rules& rules, Shared* shared, float* loss, float* dlogp, float* partials) {
  both(v, rules, shared, loss, dlogp, partials);
}
#if FASTRL_HAS_AVX2_BUILD
FASTRL_AVX2 void both_avx2(const Vectors& v, const Rules& rules, Shared* shared, float* loss, float* dlogp,
                           float* partials) {
  both(v, rules, shared, loss, dlogp, partials);
}
#endif

}  // namespace
}  // namespace fastrl

// Vectors of [n] but advantage [completions]; old, ref and sampler may be null. bounds: lowest and highest ratio, dual
// clip, beta, importance cap, tau of positive and of negative advantages. loss 0 clip, 1 cispo, 2 sapo; importance 0
// none, 1 truncate, 2 mask. Writes loss and dlogp [n] and partials [8]: sums of loss, kl, clipped low, clipped high and
// ratio, the largest ratio, the live rows, 0. Returns 0, or 1 if out of memory.
extern "C" __attribute__((visibility("default"))) int fastrl_policy_rows(
    const float* logp, const float* advantage, const int64_t* completion, const float* weight, const float* old,
    const float* ref, const float* sampler, const double* bounds, int64_t n, int64_t completions, int loss_kind, int kl,
    int k2_gradient, int penalised, int dual, int sequence, int importance, int importance_sequence, float* loss,
    float* dlogp, float* partials) {
  using namespace fastrl;
  const Vectors v{logp, advantage, completion, weight, old, ref, sampler, n, completions};
  const Rules rules{bounds[0], bounds[1], bounds[2], bounds[3], bounds[4], bounds[5], bounds[6],
                    loss_kind, kl, importance, dual != 0, k2_gradient != 0, penalised != 0, sequence != 0,
                    importance_sequence != 0};
  std::unique_ptr<Shared[]> shared;
  if (rules.sequence || rules.importance_sequence) {
    shared.reset(new (std::nothrow) Shared[static_cast<size_t>(completions > 0 ? completions : 1)]);
    if (!shared) return 1;
  }
  auto run = both_baseline;
#if FASTRL_HAS_AVX2_BUILD
  if (has_avx2()) run = both_avx2;
#endif
  run(v, rules, shared.get(), loss, dlogp, partials);
  return 0;
}
