// Group-relative advantages: fastrl_group_advantage. Double inside, rows added in their order.

#include <cmath>

#include "common.hpp"

namespace fastrl {
namespace {

struct Group {
  double n = 0.0, sum = 0.0, low = 0.0, high = 0.0, squares = 0.0, mean = 0.0, factor = 0.0;
  bool constant = true;

  void add(double value) {
    low = n == 0.0 || value < low ? value : low;
    high = n == 0.0 || value > high ? value : high;
    sum += value;
    n += 1.0;
  }
};

}  // namespace
}  // namespace fastrl

// rewards [r, k], weights [k] or null (ones); group [r] ids, or null for `size` consecutive rows each (ids outside
// [0, groups) belong to none). Writes advantage and reward [r], mean, std and constant [groups]. Returns 0, or 1 if out
// of memory.
extern "C" __attribute__((visibility("default"))) int fastrl_group_advantage(
    const float* rewards, const float* weights, const int64_t* group, int64_t r, int64_t k, int64_t size, int64_t groups,
    int leave_one_out, int scale, int unbiased, double eps, float* advantage, float* reward, float* mean, float* std_out,
    uint8_t* constant) {
  using namespace fastrl;
  std::unique_ptr<Group[]> all(new (std::nothrow) Group[static_cast<size_t>(groups)]);
  std::unique_ptr<double[]> value(new (std::nothrow) double[static_cast<size_t>(r)]);
  if (!all || !value) return 1;
  const auto of_row = [&](int64_t i) -> Group* {
    const int64_t id = group ? group[i] : i / size;
    return id >= 0 && id < groups ? &all[id] : nullptr;
  };
  for (int64_t i = 0; i < r; ++i) {
    double sum = 0.0;
    for (int64_t j = 0; j < k; ++j) sum += static_cast<double>(rewards[i * k + j]) * (weights ? weights[j] : 1.0);
    value[i] = sum;
    Group* own = of_row(i);
    reward[i] = own ? static_cast<float>(sum) : 0.0f;
    if (own) own->add(sum);
  }
  for (int64_t g = 0; g < groups; ++g) {
    Group& one = all[g];
    const double plain = one.n > 0.0 ? one.sum / one.n : 0.0;
    one.constant = one.low >= one.high && plain == plain;  // with NaN among the rewards the group becomes NaN
    one.mean = one.constant ? one.low : plain;
  }
  for (int64_t i = 0; i < r; ++i) {
    if (Group* own = of_row(i)) own->squares += (value[i] - own->mean) * (value[i] - own->mean);
  }
  for (int64_t g = 0; g < groups; ++g) {
    Group& one = all[g];
    const double others = one.n > 1.0 ? one.n - 1.0 : 1.0;
    const double freedom = unbiased ? others : (one.n > 1.0 ? one.n : 1.0);
    const double std = one.constant ? 0.0 : std::sqrt(one.squares / freedom);
    one.factor = (leave_one_out ? one.n / others : 1.0) / (scale ? std + eps : 1.0);
    mean[g] = static_cast<float>(one.mean);
    std_out[g] = static_cast<float>(std);
    constant[g] = one.constant;
  }
  for (int64_t i = 0; i < r; ++i) {
    const Group* own = of_row(i);
    advantage[i] = own && !own->constant ? static_cast<float>((value[i] - own->mean) * own->factor) : 0.0f;
  }
  return 0;
}
