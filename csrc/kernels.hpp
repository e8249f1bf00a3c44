// What a decode step computes on one thread, as one table of functions for each instruction set.
//
// Every number that comes out depends on its own inputs alone, summed in one order: how rows and columns are cut into
// pieces, and onto how many threads, changes no bit.
#pragma once

#include <cstdint>

namespace fastrl {

// y = x W^T + b. Weights [outputs, inputs], `line` floats from one row to the next; bias [outputs] or null.
struct Linear {
  const float* weight;
  const float* bias;
  int64_t line, inputs, outputs;
};

constexpr int64_t kBlock = 128;  // numbers behind one entry of what Kernels::weigh sums up
inline int64_t blocks(int64_t n) { return (n + kBlock - 1) / kBlock; }

struct Kernels {
  // out[r][c] = (add ? out[r][c] : 0) + bias[c] + x[r] . W[from + c], for rows r and columns c in [0, to - from).
  void (*product)(const float* x, int64_t x_line, int64_t rows, const Linear& w, int64_t from, int64_t to, bool add,
                  float* out, int64_t out_line);
  // out[r] = weight * x[r] / sqrt(mean x[r]^2 + eps), rows of n numbers; out may be x.
  void (*norm)(const float* x, int64_t x_line, int64_t rows, int64_t n, const float* weight, float eps, float* out,
               int64_t out_line);
  // out = factor * (head turned by the angles), 2 * half numbers each; out may be head.
  void (*rotate)(const float* head, const float* cos, const float* sin, int64_t half, float factor, float* out);
  // gate = gate / (1 + e^-gate) * up
  void (*silu_mul)(float* gate, const float* up, int64_t n);
  // The largest of n numbers (-inf of none); NaN among them may go unseen.
  float (*peak)(const float* x, int64_t n);
  // x = e^(x - peak); sums[b] = the sum of block b (see kBlock), NaN where its numbers have one.
  void (*weigh)(float* x, int64_t n, float peak, double* sums);
  // out[m][d] = (add ? out[m][d] : 0) + sum_k w[m][k] v[k][d], for m of `queries`, d of `dim`.
  void (*mix)(const float* w, int64_t w_line, int64_t queries, const float* v, int64_t keys, int64_t dim, bool add,
              float* out, int64_t out_line);
  // The sum of e^(scale * (x - peak)) over n numbers, block by block (see kBlock); NaN where one is.
  double (*exp_sum)(const float* x, int64_t n, float scale, float peak);
  // out = factor * e^(scale * x - shift); out may be x.
  void (*exp_scaled)(const float* x, int64_t n, float scale, float shift, float factor, float* out);
};

// Instruction sets, the first being any x86-64's (or what the compiler takes for another machine).
enum Level : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The table of this level, or null where the machine does not have it.
const Kernels* kernels_of(int level);
// The best level of the machine.
int best_level();

}  // namespace fastrl
