// The operations between a layer's products over whole tensors, float32: fastrl_gated, fastrl_norm, fastrl_rope,
// fastrl_rope_append. Pieces of rows go to torch's threads; where sums over rows are asked for, each piece has its own,
// and they are added in the pieces' order.

#include <cstring>
#include <new>

#include "common.hpp"
#include "pointwise.hpp"
#include "team.hpp"

namespace fastrl {
namespace {

constexpr int64_t kPiece = 16384;     // numbers of a piece, about
constexpr int64_t kWorth = 32768;     // numbers for which threads are woken, as in torch
constexpr int64_t kLeastRows = 32;    // of a piece with sums of its own
constexpr int64_t kMostPieces = 64;   // with sums of their own

struct Team {
  Parallel parallel;
  int threads;
};

template <class Piece>
void each_piece(const Team& team, int64_t pieces, int64_t numbers, const Piece& piece) {
  if (team.threads < 2 || !team.parallel || pieces < 2 || numbers < kWorth) {
    for (int64_t i = 0; i < pieces; ++i) piece(i);
    return;
  }
  std::atomic<int64_t> next{0};
  on_threads(team.parallel, team.threads, [&](int) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) piece(i);
  });
}

int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t rows_of_piece(int64_t rows, int64_t n, bool sums) {
  const int64_t per = most(1, kPiece / most(n, 1));
  return sums ? most(most(per, kLeastRows), over(rows, kMostPieces)) : per;
}

// out[i] = the sum of `parts` lines of n numbers.
void add_lines(const Team& team, const float* lines, int64_t parts, int64_t n, float* out) {
  constexpr int64_t kColumns = 256;
  each_piece(team, over(n, kColumns), parts * n, [&](int64_t piece) {
    const int64_t from = piece * kColumns, to = least(n, from + kColumns);
    double sums[kColumns] = {};
    for (int64_t p = 0; p < parts; ++p) {
      for (int64_t i = from; i < to; ++i) sums[i - from] += static_cast<double>(lines[p * n + i]);
    }
    for (int64_t i = from; i < to; ++i) out[i] = static_cast<float>(sums[i - from]);
  });
}

// work(first row, rows, the piece's line of `n_sums` zeros or null) for pieces of rows; their lines added into `sums`.
template <class Work>
int rows_with_sums(const Team& team, int64_t rows, int64_t n, int64_t n_sums, float* sums, const Work& work) {
  const int64_t per = rows_of_piece(rows, n, sums != nullptr), pieces = over(rows, per);
  if (!sums) {
    each_piece(team, pieces, rows * n, [&](int64_t p) { work(p * per, least(per, rows - p * per), nullptr); });
    return 0;
  }
  std::unique_ptr<float[]> lines(new (std::nothrow) float[static_cast<size_t>(pieces * n_sums + 1)]);
  if (!lines) return 1;
  each_piece(team, pieces, rows * n, [&](int64_t p) {
    float* line = lines.get() + p * n_sums;
    std::memset(line, 0, static_cast<size_t>(n_sums) * sizeof(float));
    work(p * per, least(per, rows - p * per), line);
  });
  add_lines(team, lines.get(), pieces, n_sums, sums);
  return 0;
}

Gated from_row(const Gated& x, int64_t at) {
  Gated y = x;
  y.gate += at;
  if (y.up) y.up += at;
  if (y.out) y.out += at;
  if (y.grad) y.grad += at;
  if (y.grad_gate) y.grad_gate += at;
  if (y.grad_up) y.grad_up += at;
  return y;
}

Norm from_row(const Norm& x, int64_t at) {
  Norm y = x;
  y.residual += at;
  if (y.x) y.x += at;
  if (y.total) y.total += at;
  if (y.out) y.out += at;
  if (y.grad) y.grad += at;
  if (y.grad_total) y.grad_total += at;
  if (y.grad_in) y.grad_in += at;
  return y;
}

// Where the angles lie: `axes` 1 or 3, `line` floats from one token to the next.
struct Angles {
  const float *cos, *sin;
  int64_t axis, batch, line, first, second;  // columns below first are of axis 0, below second of axis 1
};

// The angles of one token with three axes, column by column, in 4 * half floats of room.
Turn merged(const Angles& a, int64_t at, int64_t half, float* room) {
  for (int64_t i = 0; i < half; ++i) {
    const int64_t from = at + (i < a.first ? 0 : i < a.second ? a.axis : 2 * a.axis) + i;
    room[i] = a.cos[from];
    room[half + i] = a.cos[from + half];
    room[2 * half + i] = a.sin[from];
    room[3 * half + i] = a.sin[from + half];
  }
  return {room, room + half, room + 2 * half, room + 3 * half};
}

}  // namespace
}  // namespace fastrl

#define FASTRL_API extern "C" __attribute__((visibility("default")))

// out = act(gate + gate_bias) * (up + up_bias), [rows, n]; up null: the activation alone. Biases [n] or null. kind: as
// Activation. Returns 0.
FASTRL_API int fastrl_gated(const float* gate, const float* up, const float* gate_bias, const float* up_bias,
                            int64_t rows, int64_t n, int kind, float* out, int threads, void* parallel) {
  using namespace fastrl;
  const Pointwise& kernels = pointwise();
  const Gated x{gate, up, gate_bias, up_bias, out, nullptr, nullptr, nullptr, nullptr, nullptr};
  const Team team{reinterpret_cast<Parallel>(parallel), threads};
  if (!gate_bias && !up_bias) {  // one row, cut anywhere
    const int64_t size = rows * n;
    each_piece(team, over(size, kPiece), size, [&](int64_t p) {
      kernels.gated(from_row(x, p * kPiece), 1, least(kPiece, size - p * kPiece), kind);
    });
    return 0;
  }
  return rows_with_sums(team, rows, n, 0, nullptr, [&](int64_t first, int64_t count, float*) {
    kernels.gated(from_row(x, first * n), count, n, kind);
  });
}

// Gradients of the above from grad [rows, n]; grad_biases [2, n] (up null: [n]) or null. Returns 0, or 1 if out of
// memory.
FASTRL_API int fastrl_gated_backward(const float* grad, const float* gate, const float* up, const float* gate_bias,
                                     const float* up_bias, int64_t rows, int64_t n, int kind, float* grad_gate,
                                     float* grad_up, float* grad_biases, int threads, void* parallel) {
  using namespace fastrl;
  const Pointwise& kernels = pointwise();
  const Gated x{gate, up, gate_bias, up_bias, nullptr, grad, grad_gate, grad_up, nullptr, nullptr};
  const Team team{reinterpret_cast<Parallel>(parallel), threads};
  if (!gate_bias && !up_bias && !grad_biases) {
    const int64_t size = rows * n;
    each_piece(team, over(size, kPiece), size, [&](int64_t p) {
      kernels.gated_backward(from_row(x, p * kPiece), 1, least(kPiece, size - p * kPiece), kind);
    });
    return 0;
  }
  return rows_with_sums(team, rows, n, up ? 2 * n : n, grad_biases, [&](int64_t first, int64_t count, float* line) {
    Gated part = from_row(x, first * n);
    part.gate_bias_sum = line;
    part.up_bias_sum = line && up ? line + n : nullptr;
    kernels.gated_backward(part, count, n, kind);
  });
}

// total = residual + x and out = weight * total / sqrt(mean total^2 + eps), [rows, n]; x null: the norm of the residual
// alone. total may be the residual. Returns 0.
FASTRL_API int fastrl_norm(const float* residual, const float* x, const float* weight, double eps, int64_t rows,
                           int64_t n, float* total, float* out, int threads, void* parallel) {
  using namespace fastrl;
  const Pointwise& kernels = pointwise();
  const Norm norm{residual, x, weight, eps, total, out, nullptr, nullptr, nullptr, nullptr};
  const Team team{reinterpret_cast<Parallel>(parallel), threads};
  return rows_with_sums(team, rows, n, 0, nullptr, [&](int64_t first, int64_t count, float*) {
    kernels.norm(from_row(norm, first * n), count, n);
  });
}

// Gradient of the sum from those of the norm and of the sum (grad_total, or null), and the weight's (or null). Returns
// 0, or 1 if out of memory.
FASTRL_API int fastrl_norm_backward(const float* grad, const float* grad_total, const float* total, const float* weight,
                                    double eps, int64_t rows, int64_t n, float* grad_in, float* grad_weight,
                                    int threads, void* parallel) {
  using namespace fastrl;
  const Pointwise& kernels = pointwise();
  const Norm norm{total, nullptr, weight, eps, nullptr, nullptr, grad, grad_total, grad_in, nullptr};
  const Team team{reinterpret_cast<Parallel>(parallel), threads};
  return rows_with_sums(team, rows, n, n, grad_weight, [&](int64_t first, int64_t count, float* line) {
    Norm part = from_row(norm, first * n);
    part.weight_sum = line;
    kernels.norm_backward(part, count, n);
  });
}

// Queries and keys of batch * length tokens turned by their angles, and values copied. Numbers of a head lie next to
// each other. tensors: q, k, v (v may be null), then where they go. numbers: batch, length, heads of q, heads of k, dim,
// half; then in floats from one batch, token and head to the next, of q, k, v and of the three results, and from one
// axis, batch and token to the next, of the angles; last the columns of the first and second of three axes (of one axis
// these two and its step are 0). Returns 0, or 1 if out of memory.
FASTRL_API int fastrl_rope(float* const* tensors, const float* cos, const float* sin, const int64_t* numbers, int back,
                           int threads, void* parallel) {
  using namespace fastrl;
  const Pointwise& kernels = pointwise();
  const int64_t length = numbers[1], dim = numbers[4], half = numbers[5], tokens = numbers[0] * length;
  const int64_t heads[3] = {numbers[2], numbers[3], numbers[3]};
  const int64_t *strides = numbers + 6, *of = strides + 18;
  const Angles angles{cos, sin, of[0], of[1], of[2], of[3], of[3] + of[4]};
  const int64_t width = (heads[0] + 2 * heads[1]) * dim, per = most(1, kPiece / most(width, 1));
  std::atomic<int> failed{0};
  const Team team{reinterpret_cast<Parallel>(parallel), threads};
  each_piece(team, over(tokens, per), tokens * width, [&](int64_t piece) {
    std::unique_ptr<float[]> room;
    if (angles.axis) {
      room.reset(new (std::nothrow) float[static_cast<size_t>(4 * half + 1)]);
      if (!room) {
        failed = 1;
        return;
      }
    }
    for (int64_t token = piece * per; token < least(tokens, (piece + 1) * per); ++token) {
      const int64_t b = token / length, t = token % length, at = b * angles.batch + t * angles.line;
      const Turn turn = angles.axis ? merged(angles, at, half, room.get())
                                    : Turn{cos + at, cos + at + half, sin + at, sin + at + half};
      for (int i = 0; i < 3; ++i) {
        if (!tensors[i]) continue;
        const int64_t *from = strides + 3 * i, *to = strides + 9 + 3 * i;
        const Heads these{tensors[i] + b * from[0] + t * from[1], tensors[3 + i] + b * to[0] + t * to[1], heads[i],
                          from[2], to[2]};
        kernels.turn(these, turn, i < 2 ? half : 0, dim, back != 0);
      }
    }
  });
  return failed;
}

// One token a row: q and k turned, keys and values put into a slot of the cache, which exists. numbers: rows, heads of
// q, heads of k, half, slot; then of the caches the floats from one row, head and slot to the next. All else is
// contiguous. Returns 0.
FASTRL_API int fastrl_rope_append(const float* q, const float* k, const float* v, const float* cos, const float* sin,
                                  const int64_t* numbers, float* q_out, float* keys, float* values, int threads,
                                  void* parallel) {
  using namespace fastrl;
  const Pointwise& kernels = pointwise();
  const int64_t rows = numbers[0], q_heads = numbers[1], k_heads = numbers[2], half = numbers[3], dim = 2 * half;
  const int64_t slot = numbers[4], *strides = numbers + 5;
  const int64_t width = (q_heads + 2 * k_heads) * dim, per = most(1, kPiece / most(width, 1));
  const Team team{reinterpret_cast<Parallel>(parallel), threads};
  each_piece(team, over(rows, per), rows * width, [&](int64_t piece) {
    for (int64_t r = piece * per; r < least(rows, (piece + 1) * per); ++r) {
      const Turn turn{cos + r * half, cos + r * half, sin + r * half, sin + r * half};
      const int64_t to = r * strides[0] + slot * strides[2];
      kernels.turn({q + r * q_heads * dim, q_out + r * q_heads * dim, q_heads, dim, dim}, turn, half, dim, false);
      kernels.turn({k + r * k_heads * dim, keys + to, k_heads, dim, strides[1]}, turn, half, dim, false);
      kernels.turn({v + r * k_heads * dim, values + to, k_heads, dim, strides[1]}, turn, 0, dim, false);
    }
  });
  return 0;
}
