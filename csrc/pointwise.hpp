// What lies between a layer's products, on one thread, as one table of functions for each instruction set.
//
// Rows are cut into pieces by their number and length alone, and sums over rows are added piece by piece in one order:
// how many threads take part changes no bit.
#pragma once

#include <cstdint>

namespace fastrl {

enum Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kQuickGelu = 3 };  // as _activations.KINDS

// Vectors of one row of n numbers, or what lies n further with every row. Null where a call says so.
struct Gated {
  const float *gate, *up;            // up: null for an activation alone
  const float *gate_bias, *up_bias;  // [n], or null
  float* out;
  const float* grad;                               // backward only, as all below
  float *grad_gate, *grad_up;                      // grad_up: null for an activation alone
  float *gate_bias_sum, *up_bias_sum;              // [n], or null: the biases take no gradient. Added to
};

struct Norm {
  const float *residual, *x, *weight;  // x: null, nothing is added. In the backward `residual` is the sum
  double eps;
  float *total, *out;              // total: written if x is given; may be the residual
  const float *grad, *grad_total;  // backward only, as all below; grad_total may be null
  float *grad_in, *weight_sum;     // weight_sum [n] or null: the weight takes no gradient. Added to
};

// Heads of one token: `count` of them, `dim` numbers each, the first 2 * half of which are turned.
struct Heads {
  const float* from;
  float* to;
  int64_t count, from_head, to_head;
};

// cos and sin of both halves, half numbers each.
struct Turn {
  const float *cos_1, *cos_2, *sin_1, *sin_2;
};

struct Pointwise {
  void (*gated)(const Gated& x, int64_t rows, int64_t n, int kind);
  void (*gated_backward)(const Gated& x, int64_t rows, int64_t n, int kind);
  void (*norm)(const Norm& x, int64_t rows, int64_t n);
  void (*norm_backward)(const Norm& x, int64_t rows, int64_t n);
  // to = the heads turned, or turned back; numbers behind 2 * half are copied.
  void (*turn)(const Heads& heads, const Turn& turn, int64_t half, int64_t dim, bool back);
};

// The table of this machine.
const Pointwise& pointwise();

}  // namespace fastrl
