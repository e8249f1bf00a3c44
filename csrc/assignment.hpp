// Shortest-augmenting-path assignment of one problem, rows <= columns, all arithmetic in double.
//
// Costs are in a padded row-major buffer [rows, stride] of float or double; forbidden and padding entries are +inf.
// The rows' dual variables are not stored: a matched row r at column j has u = c[r][j] - v[j].
#pragma once

#include "common.hpp"

namespace fastrl {

struct AssignmentScratch {
  Buffer<double> v, dist, taken, saved, popped_at;
  Buffer<int64_t> owner, from, popped, queue;
};

template <class Cost>
struct Problem {
  const Cost* cost;
  int64_t rows, cols, stride;

  // State, one entry per column.
  double* v;       // dual
  double* dist;    // shortest reduced path from the search's root; +inf once the column is in the tree
  double* taken;   // 0 for a free column, +inf for a matched one: dist + taken ranks the free columns
  int64_t* owner;  // row matched to the column, -1 if free
  int64_t* from;   // column whose row last lowered dist, -1 for the root
  // The tree's columns in the order they were added, their distances and their duals before the search.
  int64_t* popped;
  double* popped_at;
  double* saved;

  void bind(AssignmentScratch& s) {
    v = s.v.reserve(stride);
    dist = s.dist.reserve(stride);
    taken = s.taken.reserve(stride);
    owner = s.owner.reserve(stride);
    from = s.from.reserve(stride);
    popped = s.popped.reserve(stride);
    popped_at = s.popped_at.reserve(stride);
    saved = s.saved.reserve(stride);
  }

  FASTRL_INLINE void reset() {
    for (int64_t j = 0; j < stride; ++j) {
      v[j] = 0.0;
      taken[j] = 0.0;
      owner[j] = -1;
    }
  }
};

FASTRL_INLINE f64x4 load4(const double* p) { return *reinterpret_cast<const f64x4*>(p); }
FASTRL_INLINE void store4(double* p, f64x4 x) { *reinterpret_cast<f64x4*>(p) = x; }
FASTRL_INLINE f64x4 load4(const float* p) {
  return __builtin_convertvector(*reinterpret_cast<const f32x4*>(p), f64x4);
}
FASTRL_INLINE f64x4 splat(double x) { return f64x4{x, x, x, x}; }

FASTRL_INLINE f64x4 lower(f64x4 a, f64x4 b) { return a < b ? a : b; }
FASTRL_INLINE double lowest(f64x4 x) {
  const double a = x[0] < x[1] ? x[0] : x[1], b = x[2] < x[3] ? x[2] : x[3];
  return a < b ? a : b;
}

// Running minimum with its index, per lane; ties keep the earlier index. Indices are doubles (exact below 2^53), so
// that value and index use the same registers and the same minimum instruction.
struct Best {
  f64x4 value = splat(kInf);
  f64x4 index = splat(kInf);
  FASTRL_INLINE void take(f64x4 x, f64x4 j) {
    const i64x4 less = x < value;
    value = less ? x : value;
    index = less ? j : index;
  }
};

// The lowest value of both and its lowest index; index -1 if every value is +inf.
FASTRL_INLINE void reduce(const Best& a, const Best& b, double& value, int64_t& index) {
  value = lowest(lower(a.value, b.value));
  const f64x4 want = splat(value), inf = splat(kInf);
  const double j = lowest(lower(a.value == want ? a.index : inf, b.value == want ? b.index : inf));
  index = j < kInf ? static_cast<int64_t>(j) : -1;
}

struct Pick {
  double free_value, any_value;
  int64_t free_index, any_index;
};

// Lowers dist through one row reached at offset h, and finds the nearest free column and the nearest column.
template <class Cost>
FASTRL_INLINE Pick relax(const Problem<Cost>& p, const Cost* row, double h, int64_t at) {
  Best free0, free1, any0, any1;
  const f64x4 offset = splat(h);
  const i64x4 here = {at, at, at, at};
  f64x4 j0 = {0, 1, 2, 3}, j1 = {4, 5, 6, 7};
  auto step = [&](int64_t j, f64x4 lanes, Best& free_best, Best& any_best) {
    const f64x4 candidate = (load4(row + j) - load4(p.v + j)) + offset;
    const f64x4 known = load4(p.dist + j);
    i64x4* from = reinterpret_cast<i64x4*>(p.from + j);
    const i64x4 less = candidate < known;
    const f64x4 now = less ? candidate : known;
    store4(p.dist + j, now);
    *from = less ? here : *from;
    free_best.take(now + load4(p.taken + j), lanes);
    any_best.take(now, lanes);
  };
  for (int64_t j = 0; j < p.stride; j += 8) {
    step(j, j0, free0, any0);
    step(j + 4, j1, free1, any1);
    j0 += 8;
    j1 += 8;
  }
  Pick pick;
  reduce(free0, free1, pick.free_value, pick.free_index);
  reduce(any0, any1, pick.any_value, pick.any_index);
  return pick;
}

struct FirstChoice {
  double free_value, any_value;
  int64_t free_index;
};

// The result of relax() from the root without writing distances; sufficient if the row gets its first choice.
template <class Cost>
FASTRL_INLINE FirstChoice first_choice(const Problem<Cost>& p, const Cost* row) {
  Best free0, free1;
  f64x4 any0 = splat(kInf), any1 = splat(kInf);
  f64x4 j0 = {0, 1, 2, 3}, j1 = {4, 5, 6, 7};
  auto step = [&](int64_t j, f64x4 lanes, Best& free_best, f64x4& any) {
    const f64x4 x = load4(row + j) - load4(p.v + j);
    free_best.take(x + load4(p.taken + j), lanes);
    any = lower(x, any);
  };
  for (int64_t j = 0; j < p.stride; j += 8) {
    step(j, j0, free0, any0);
    step(j + 4, j1, free1, any1);
    j0 += 8;
    j1 += 8;
  }
  FirstChoice choice;
  reduce(free0, free1, choice.free_value, choice.free_index);
  choice.any_value = lowest(lower(any0, any1));
  return choice;
}

// Moves every match on the path root -> ... -> end one step along, so that the root is matched.
template <class Cost>
FASTRL_INLINE void augment(const Problem<Cost>& p, int64_t root, int64_t end) {
  for (int64_t j = end; j >= 0;) {
    const int64_t before = p.from[j];
    p.owner[j] = before < 0 ? root : p.owner[before];
    j = before;
  }
}

// One search from an unmatched row. Optional: a row may stay unmatched at cost 0, so a path may also end by leaving one
// row of the tree unmatched. Returns false if no column can be reached (the state is then unchanged).
template <class Cost, bool Optional>
FASTRL_INLINE bool search(const Problem<Cost>& p, int64_t root) {
  const FirstChoice choice = first_choice(p, p.cost + root * p.stride);
  if (Optional && !(choice.any_value < 0.0)) return true;  // cheapest to leave unmatched
  if (!(choice.any_value < kInf)) return false;
  if (choice.free_value <= choice.any_value) {
    p.owner[choice.free_index] = root;
    p.taken[choice.free_index] = kInf;
    return true;
  }
  const f64x4 inf = splat(kInf);
  for (int64_t j = 0; j < p.stride; j += 4) store4(p.dist + j, inf);
  int64_t popped = 0, at = -1, row = root, end = -1, leave_at = -1;
  double h = 0.0, low = kInf, leave = kInf;
  bool found = false;
  for (;;) {
    if (Optional && h < leave) {
      leave = h;
      leave_at = at;
    }
    const Pick pick = relax(p, p.cost + row * p.stride, h, at);
    low = pick.any_value;
    if (Optional && !(low < leave)) {
      end = leave_at;
      low = leave;
      found = true;
      break;
    }
    if (!(low < kInf)) break;
    if (pick.free_value <= low) {
      end = pick.free_index;
      p.taken[end] = kInf;
      found = true;
      break;
    }
    at = pick.any_index;
    row = p.owner[at];
    h = low - (static_cast<double>(p.cost[row * p.stride + at]) - p.v[at]);
    p.popped[popped] = at;
    p.popped_at[popped] = low;
    p.saved[popped++] = p.v[at];
    p.v[at] = -kInf;  // keeps the column out of every later relaxation of this search
    p.dist[at] = kInf;
  }
  for (int64_t k = 0; k < popped; ++k) {
    p.v[p.popped[k]] = p.saved[k] + (found ? p.popped_at[k] - low : 0.0);
  }
  if (found) augment(p, root, end);
  return found;
}

struct TwoLowest {
  double low, second;
  int64_t index;
};

template <class Cost>
FASTRL_INLINE TwoLowest two_lowest(const Problem<Cost>& p, const Cost* row) {
  Best best0, best1;
  f64x4 second0 = splat(kInf), second1 = splat(kInf);
  f64x4 j0 = {0, 1, 2, 3}, j1 = {4, 5, 6, 7};
  auto step = [&](int64_t j, f64x4 lanes, Best& best, f64x4& second) {
    const f64x4 x = load4(row + j) - load4(p.v + j);
    const i64x4 less = x < best.value;
    const f64x4 loser = less ? best.value : x;
    second = lower(loser, second);
    best.value = less ? x : best.value;
    best.index = less ? lanes : best.index;
  };
  for (int64_t j = 0; j < p.stride; j += 8) {
    step(j, j0, best0, second0);
    step(j + 4, j1, best1, second1);
    j0 += 8;
    j1 += 8;
  }
  TwoLowest out;
  reduce(best0, best1, out.low, out.index);
  // The second lowest is a lane's second, or the lowest of another lane than the winner's.
  const f64x4 winner = splat(static_cast<double>(out.index)), inf = splat(kInf);
  const f64x4 others = lower(best0.index == winner ? inf : best0.value, best1.index == winner ? inf : best1.value);
  out.second = lowest(lower(others, lower(second0, second1)));
  return out;
}

// Augmenting row reduction (Jonker and Volgenant): each row takes its cheapest column and lowers that column's dual to
// make it indifferent to its second choice; the row that had the column tries again. Duals only decrease, and only for
// columns that end up matched, so it is valid for rows < columns too. Remaining rows go to queue; returns their number.
template <class Cost>
FASTRL_INLINE int64_t row_reduction(const Problem<Cost>& p, int64_t* queue) {
  int64_t left = 0;
  int64_t budget = 3 * p.rows + 8;  // in floating point, bids can shrink for ever; remaining rows are then searched
  for (int64_t start = 0; start < p.rows; ++start) {
    int64_t row = start;
    while (row >= 0) {
      const Cost* cost = p.cost + row * p.stride;
      const TwoLowest t = two_lowest(p, cost);
      if (!(t.second < kInf) || --budget < 0) {
        queue[left++] = row;
        break;
      }
      int64_t j = t.index;
      if (p.owner[j] >= 0 && !(t.low < t.second)) {  // a tie may contain a free column
        for (int64_t k = 0; k < p.cols; ++k) {
          if (p.owner[k] < 0 && static_cast<double>(cost[k]) - p.v[k] == t.low) {
            j = k;
            break;
          }
        }
        if (p.owner[j] >= 0) {
          queue[left++] = row;
          break;
        }
      }
      p.v[j] -= t.second - t.low;
      const int64_t loser = p.owner[j];
      p.owner[j] = row;
      p.taken[j] = kInf;
      row = loser;
    }
  }
  return left;
}

// Minimum-cost matching of every row. With many columns per row there are few conflicts and searches are short: then
// only searches are run, in row order, so that ties are broken as in the other implementations (free first, then the
// lowest index). Returns false if some row cannot be matched; the matching then has the largest possible number of
// rows, earlier rows first, at the lowest cost for those rows.
template <class Cost>
FASTRL_INLINE bool solve_complete(Problem<Cost>& p, int64_t* queue) {
  p.reset();
  int64_t left = 0;
  if (p.cols < 2 * p.rows) {
    left = row_reduction(p, queue);
  } else {
    while (left < p.rows) {
      queue[left] = left;
      ++left;
    }
  }
  bool complete = true;
  for (int64_t k = 0; k < left && complete; ++k) complete = search<Cost, false>(p, queue[k]);
  if (complete) return true;
  p.reset();
  for (int64_t row = 0; row < p.rows; ++row) search<Cost, false>(p, row);
  return false;
}

// Minimum-cost matching in which any row may stay unmatched at cost 0 (costs <= 0: the best partial matching).
template <class Cost>
FASTRL_INLINE void solve_optional(Problem<Cost>& p) {
  p.reset();
  for (int64_t row = 0; row < p.rows; ++row) search<Cost, true>(p, row);
}

}  // namespace fastrl
