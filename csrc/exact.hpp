// e^x - 1 and log(1 + z) of four doubles at once, to a few units in the last place, for sums that are rounded to float.
#pragma once

#include "common.hpp"

namespace fastrl {

FASTRL_INLINE f64x4 all4(double x) { return f64x4{x, x, x, x}; }

FASTRL_INLINE f64x4 widened(const float* from) {
  f32x4 v;
  __builtin_memcpy(&v, from, sizeof v);
  return __builtin_convertvector(v, f64x4);
}

FASTRL_INLINE void narrowed(f64x4 v, float* to) {
  const f32x4 rounded = __builtin_convertvector(v, f32x4);
  __builtin_memcpy(to, &rounded, sizeof rounded);
}

FASTRL_INLINE double total(f64x4 v) { return (v[0] + v[2]) + (v[1] + v[3]); }

FASTRL_INLINE f64x4 magnitude(f64x4 x) { return x < 0.0 ? -x : x; }

// NaN stays NaN, as with torch's clamp.
FASTRL_INLINE f64x4 clamped(f64x4 x, double low, double high) {
  const f64x4 raised = x < low ? all4(low) : x;
  return raised > high ? all4(high) : raised;
}

// e^x - 1, relative to itself near 0, for x <= 700; NaN for NaN. x = n ln 2 + r with |r| <= ln(2) / 2, the series of
// e^r - 1, and 2^n by its bits.
FASTRL_INLINE f64x4 exp_less_one(f64x4 x) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves the nearest integer in the low bits
  x = x < -700.0 ? all4(-700.0) : x;
  const f64x4 shifted = x * 1.4426950408889634 + kRound;
  const f64x4 n = shifted - kRound;
  const f64x4 r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  const f64x4 q = r * r;  // even and odd powers apart, so that fewer steps wait for one another
  f64x4 even = all4(1.0 / 479001600.0), odd = all4(1.0 / 6227020800.0);
  even = even * q + 1.0 / 3628800.0;
  odd = odd * q + 1.0 / 39916800.0;
  even = even * q + 1.0 / 40320.0;
  odd = odd * q + 1.0 / 362880.0;
  even = even * q + 1.0 / 720.0;
  odd = odd * q + 1.0 / 5040.0;
  even = even * q + 1.0 / 24.0;
  odd = odd * q + 1.0 / 120.0;
  even = even * q + 0.5;
  odd = odd * q + 1.0 / 6.0;
  const f64x4 p = r + q * (even + r * odd);
  i64x4 bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 1023) << 52;  // of kRound nothing remains in the bits that are kept
  f64x4 power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return power * p + (power - 1.0);
}

FASTRL_INLINE f64x4 exponential(f64x4 x) { return exp_less_one(x) + 1.0; }

// log(1 + z) for 0 <= z <= 1: 2 atanh(s), where s = z / (2 + z), or the same of (1 + z) / 2 where that is nearer to 1.
FASTRL_INLINE f64x4 log_one_more(f64x4 z) {
  const i64x4 high = z > 0.41421356237309503;
  const f64x4 s = (high ? z - 1.0 : z) / (high ? z + 3.0 : z + 2.0);
  const f64x4 q = s * s;
  f64x4 series = all4(1.0 / 21.0);
  series = series * q + 1.0 / 19.0;
  series = series * q + 1.0 / 17.0;
  series = series * q + 1.0 / 15.0;
  series = series * q + 1.0 / 13.0;
  series = series * q + 1.0 / 11.0;
  series = series * q + 1.0 / 9.0;
  series = series * q + 1.0 / 7.0;
  series = series * q + 1.0 / 5.0;
  series = series * q + 1.0 / 3.0;
  const f64x4 value = 2.0 * s * (1.0 + q * series);
  return high ? value + 0.6931471805599453 : value;
}

}  // namespace fastrl
