// Draws a token from one row of logits, as fastrl.rollout.sampler.sample does.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "decode_step.hpp"

namespace fastrl {

struct Drawn {
  int64_t token;
  float logp;  // over the whole vocabulary, at the temperature (greedy: at 1)
};

// Where the running sum of n weights passes a point, and how far into that weight the point lies, in [0, 1).
struct Place {
  int64_t index;
  double rest;
};

template <class T>
Place passed(const T* weights, int64_t n, double uniform) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += weights[i];
  const double point = std::min(uniform * sum, std::nextafter(sum, 0.0));
  double before = 0.0, after = 0.0;
  for (int64_t i = 0; i < n; ++i, before = after) {
    after = before + weights[i];
    if (after > point) {
      return {i, std::clamp((point - before) / weights[i], 0.0, 1.0 - 0x1p-53)};
    }
  }
  return {n - 1, 0.0};  // of weights that are NaN, which the caller finds in the log-prob
}

// log(e^a + e^b)
inline double log_add(double a, double b) {
  const double high = std::max(a, b);
  if (std::isinf(high) && high < 0) return high;
  return high + std::log(std::exp(a - high) + std::exp(b - high));
}

// Takes what is suppressed out of the scores; gives the log-sum-exp of it (-inf of nothing).
inline double hold_back(float* scores, const int64_t* suppressed, int64_t count) {
  double held = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < count; ++i) held = log_add(held, scores[suppressed[i]]);
  for (int64_t i = 0; i < count; ++i) scores[suppressed[i]] = -std::numeric_limits<float>::infinity();
  return held;
}

// `scores` [vocabulary] are the logits, and are overwritten; `sums`: room for blocks(vocabulary) numbers.
inline Drawn draw(const Kernels& kernels, const Sampler& sampler, float* scores, int64_t vocabulary, double uniform,
                  double* sums) {
  constexpr int64_t kPlain = 1024;  // a larger vocabulary is drawn from in two steps: a block, a token of it
  const float temperature = static_cast<float>(sampler.temperature);
  if (temperature != 0.0f && temperature != 1.0f) {
    for (int64_t i = 0; i < vocabulary; ++i) scores[i] /= temperature;
  }
  const double held = hold_back(scores, sampler.suppressed, sampler.suppressed_count);
  const float peak = kernels.peak(scores, vocabulary);
  int64_t token = 0;
  if (temperature == 0.0f) token = std::find(scores, scores + vocabulary, peak) - scores;
  kernels.weigh(scores, vocabulary, peak, sums);
  const int64_t count = blocks(vocabulary);
  double sum = 0.0;
  for (int64_t b = 0; b < count; ++b) sum += sums[b];
  if (temperature != 0.0f && vocabulary <= kPlain) {
    token = passed(scores, vocabulary, uniform).index;
  } else if (temperature != 0.0f) {
    const Place block = passed(sums, count, uniform);
    const int64_t from = block.index * kBlock;
    token = from + passed(scores + from, std::min(kBlock, vocabulary - from), block.rest).index;
  }
  token = std::min(token, vocabulary - 1);
  const double score = temperature == 0.0f ? peak : peak + std::log(static_cast<double>(scores[token]));
  return {token, static_cast<float>(score - log_add(peak + std::log(sum), held))};
}

}  // namespace fastrl
