// Per-token loss weights: fastrl_token_weights. Counts are whole numbers and every weight is two float divisions, as in
// fastrl_kernels/token_weights.py.

#include <cstdint>
#include <memory>
#include <new>

// completion [n]; mask [n] bytes or null. per_row: a row's own completion's rows divide it (sequence), else nothing.
// denominator: what divides all of them, or 0: the completions that have a row (sequence), or the rows (token). Writes
// weight [n]. Returns 0, or 1 if out of memory.
extern "C" __attribute__((visibility("default"))) int fastrl_token_weights(const int64_t* completion,
                                                                           const uint8_t* mask, int64_t n,
                                                                           int64_t completions, int per_row,
                                                                           double denominator, float* weight) {
  std::unique_ptr<int64_t[]> count(new (std::nothrow) int64_t[static_cast<size_t>(completions > 0 ? completions : 1)]());
  if (!count) return 1;
  const auto kept = [&](int64_t i) {
    return completion[i] >= 0 && completion[i] < completions && (!mask || mask[i] != 0);
  };
  int64_t rows = 0, sequences = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!kept(i)) continue;
    ++rows;
    sequences += count[completion[i]]++ == 0;
  }
  const double found = static_cast<double>(per_row ? sequences : rows);
  const float all = static_cast<float>(denominator > 0.0 ? denominator : found);
  std::unique_ptr<float[]> share(new (std::nothrow) float[static_cast<size_t>(completions > 0 ? completions : 1)]);
  if (!share) return 1;
  for (int64_t c = 0; c < completions; ++c) {
    share[c] = (per_row ? 1.0f / static_cast<float>(count[c] > 0 ? count[c] : 1) : 1.0f) / (all > 0.0f ? all : 1.0f);
  }
  for (int64_t i = 0; i < n; ++i) weight[i] = kept(i) ? share[completion[i]] : 0.0f;
  return 0;
}
