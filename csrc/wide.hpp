// Vectors of L floats (4, 8 or 16) by GCC's and Clang's vector extensions, and what the decode step computes with them.
//
// A product and the sum behind it round once here, unlike in the sources that include common.hpp alone: matrix products
// are long sums, and every core that has AVX2 fuses them. Include this file first: the setting holds from here on.
#pragma once

#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")
#endif

#include <cstdint>
#include <limits>

#include "common.hpp"

namespace fastrl {

template <int L>
struct Wide;
template <>
struct Wide<4> {
  using Floats = float __attribute__((vector_size(16)));
  using Ints = uint32_t __attribute__((vector_size(16)));
};
template <>
struct Wide<8> {
  using Floats = float __attribute__((vector_size(32)));
  using Ints = uint32_t __attribute__((vector_size(32)));
};
template <>
struct Wide<16> {
  using Floats = float __attribute__((vector_size(64)));
  using Ints = uint32_t __attribute__((vector_size(64)));
};
template <int L>
using Floats = typename Wide<L>::Floats;
template <int L>
using Ints = typename Wide<L>::Ints;

template <int L>
FASTRL_INLINE Floats<L> load(const float* from) {
  Floats<L> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <int L>
FASTRL_INLINE void store(float* to, Floats<L> v) {
  __builtin_memcpy(to, &v, sizeof v);
}

template <int L>
FASTRL_INLINE Floats<L> all(float x) {
  return Floats<L>{} + x;
}

// The sum of the lanes, halves first.
template <int L>
FASTRL_INLINE float total(Floats<L> v) {
  if constexpr (L == 4) {
    return (v[0] + v[2]) + (v[1] + v[3]);
  } else {
    Floats<L / 2> halves[2];
    __builtin_memcpy(halves, &v, sizeof v);
    return total<L / 2>(halves[0] + halves[1]);
  }
}

// Lanes of two vectors, numbered through.
#if defined(__clang__)
#define FASTRL_PICK(L, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTRL_PICK(L, a, b, ...) __builtin_shuffle(a, b, Ints<L>{__VA_ARGS__})
#endif

// total() of four vectors, in the same order of additions and fewer steps.
template <int L>
FASTRL_INLINE Floats<4> totals(Floats<L> a, Floats<L> b, Floats<L> c, Floats<L> d) {
  if constexpr (L == 16) {
    const Floats<L> ab = FASTRL_PICK(L, a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                         FASTRL_PICK(L, a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    const Floats<L> cd = FASTRL_PICK(L, c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                         FASTRL_PICK(L, c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    Floats<L> all = FASTRL_PICK(L, ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                    FASTRL_PICK(L, ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    all += FASTRL_PICK(L, all, all, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    all += FASTRL_PICK(L, all, all, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    all = FASTRL_PICK(L, all, all, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    Floats<4> first;
    __builtin_memcpy(&first, &all, sizeof first);
    return first;
  } else if constexpr (L == 8) {
    const Floats<L> ab = FASTRL_PICK(L, a, b, 0, 1, 2, 3, 8, 9, 10, 11) + FASTRL_PICK(L, a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    const Floats<L> cd = FASTRL_PICK(L, c, d, 0, 1, 2, 3, 8, 9, 10, 11) + FASTRL_PICK(L, c, d, 4, 5, 6, 7, 12, 13, 14, 15);
    Floats<4> quarters[4];
    __builtin_memcpy(quarters, &ab, sizeof ab);
    __builtin_memcpy(quarters + 2, &cd, sizeof cd);
    return totals<4>(quarters[0], quarters[1], quarters[2], quarters[3]);
  } else {
    const Floats<L> ab = FASTRL_PICK(L, a, b, 0, 4, 1, 5) + FASTRL_PICK(L, a, b, 2, 6, 3, 7);
    const Floats<L> cd = FASTRL_PICK(L, c, d, 0, 4, 1, 5) + FASTRL_PICK(L, c, d, 2, 6, 3, 7);
    return FASTRL_PICK(L, ab, cd, 0, 1, 4, 5) + FASTRL_PICK(L, ab, cd, 2, 3, 6, 7);
  }
}

template <int L>
FASTRL_INLINE float largest(Floats<L> v) {
  float best = v[0];
  for (int i = 1; i < L; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// e^x to 2 ulp for -86 <= x <= 88. x = n ln 2 + r with |r| <= ln(2) / 2, a polynomial in r (coefficients: Cephes,
// expf) and 2^n by its bits.
template <int L>
FASTRL_INLINE Floats<L> exponential_within(Floats<L> x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Floats<L> shifted = x * 1.44269504088896341f + kRound;
  const Floats<L> n = shifted - kRound;
  const Floats<L> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats<L> p = all<L>(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  Ints<L> bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  const Ints<L> scale_bits = (bits + 127) << 23;  // of kRound only bits above the exponent's remain, which are cut off
  Floats<L> scale;
  __builtin_memcpy(&scale, &scale_bits, sizeof scale);
  return p * scale;
}

constexpr float kLeastExponent = -86.0f;

// The same for every x <= 0: 0 below -86; NaN for NaN.
template <int L>
FASTRL_INLINE Floats<L> exponential_below(Floats<L> x) {
  const Floats<L> low = all<L>(kLeastExponent);
  return x < low ? Floats<L>{} : exponential_within<L>(x < low ? low : x);
}

// The same for every x: from 88 on e^88.
template <int L>
FASTRL_INLINE Floats<L> exponential(Floats<L> x) {
  const Floats<L> high = all<L>(88.0f);
  return exponential_below<L>(x > high ? high : x);
}

}  // namespace fastrl
