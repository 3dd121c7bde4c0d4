// Vectors of L2L_WIDTH floats by GCC/Clang vector extensions, and the few operations they lack.
// Included once per instruction set; everything has internal linkage.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "core.h"

#if defined(__AVX512F__)
#define L2L_WIDTH 16
#elif defined(__AVX2__)
#define L2L_WIDTH 8
#else
#define L2L_WIDTH 4
#endif

#define L2L_INLINE inline __attribute__((always_inline))
#define L2L_UNROLL _Pragma("GCC unroll 16")
// A loop that is unrolled, so that arrays of vectors indexed by it live in registers.
#define L2L_FOR(i, count) L2L_UNROLL for (int i = 0; i < (count); i++)

namespace l2l {
namespace {

constexpr int kWidth = L2L_WIDTH;

typedef float Vec __attribute__((vector_size(4 * L2L_WIDTH)));
typedef int32_t IVec __attribute__((vector_size(4 * L2L_WIDTH)));
typedef float UnalignedVec __attribute__((vector_size(4 * L2L_WIDTH), aligned(4), may_alias));

L2L_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
L2L_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
L2L_INLINE Vec broadcast(float x) { return x - Vec{}; }
// One rounding where the instruction set has it (-ffp-contract=fast).
L2L_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

// A constant that the compiler must keep in a register instead of reloading it at every use.
L2L_INLINE Vec pinned(float x) {
  Vec v = broadcast(x);
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// If either operand is NaN the result is `b`: clamping with constants in `a` lets NaN through.
L2L_INLINE Vec minimum(Vec a, Vec b) {
#if L2L_WIDTH == 16
  return _mm512_min_ps(a, b);
#elif L2L_WIDTH == 8
  return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}
L2L_INLINE Vec maximum(Vec a, Vec b) {
#if L2L_WIDTH == 16
  return _mm512_max_ps(a, b);
#elif L2L_WIDTH == 8
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

L2L_INLINE Vec select(IVec mask, Vec a, Vec b) { return (Vec)(((IVec)a & mask) | ((IVec)b & ~mask)); }

// Coefficients of (2^f - 1) / f on [-1/2, 1/2], minimax in the error relative to 2^f:
// 2^f is good to 1.0e-7 and 2^f - 1 to 2.5e-7 relative, both limited by float32 rounding.
constexpr int kExpDegree = 6;
constexpr float kExp[kExpDegree] = {0.693147182f,   0.240226477f,   0.0555033237f,
                                    0.00961843692f, 0.00133988739f, 0.00015353362f};
// Adding it leaves round(z) + 127 in the low bits of the sum: the exponent field of 2^round(z).
constexpr float kExpMagic = 12582912.0f + 127.0f;
// Bounds on exponents. Beyond 2^40 a sigmoid is 0 or 1 to float32, and products of three such terms
// stay finite, which the forward's shared divisions need. The backward multiplies derivatives of
// saturated gates by inputs of any size, so it goes on to the smallest normal number, which it takes for 0.
constexpr int kForwardClamp = 40;
constexpr int kBackwardClamp = 126;

// For M vectors in lock step: 2^z = scale * (1 + rest * poly), with z replaced by its rest. Constants are
// loaded once for all M, and the M chains are independent work for the out-of-order window.
template <int CLAMP, int M>
L2L_INLINE void exp2_split(Vec (&z)[M], Vec (&scale)[M], Vec (&poly)[M]) {
  {
    const Vec low = pinned(-1.0f * CLAMP), high = pinned(1.0f * CLAMP);
    L2L_FOR (m, M) z[m] = maximum(low, z[m]);
    L2L_FOR (m, M) z[m] = minimum(high, z[m]);
  }
  {
    const Vec magic = pinned(kExpMagic);
    L2L_FOR (m, M) scale[m] = z[m] + magic;
    L2L_FOR (m, M) z[m] -= scale[m] - magic;
    L2L_FOR (m, M) scale[m] = (Vec)((IVec)scale[m] << 23);
  }
  {
    const Vec a = pinned(kExp[kExpDegree - 1]), b = pinned(kExp[kExpDegree - 2]);
    L2L_FOR (m, M) poly[m] = fma(a, z[m], b);
  }
  L2L_UNROLL for (int i = kExpDegree - 3; i >= 0; i--) {
    const Vec c = pinned(kExp[i]);
    L2L_FOR (m, M) poly[m] = fma(poly[m], z[m], c);
  }
}

// 1 + 2^z and 2^z - 1 from what exp2_split made; the latter keeps its relative accuracy near 0.
L2L_INLINE Vec one_plus_exp2(Vec rest, Vec scale, Vec poly, Vec one) { return fma(scale, fma(rest, poly, one), one); }
L2L_INLINE Vec exp2_minus_one(Vec rest, Vec scale, Vec poly, Vec one) { return fma(scale, rest * poly, scale - one); }

// Natural logarithm of normal positive floats, within 1 ulp of max(1, |log x|): x = 2^e (1 + m) with
// 1 + m in [sqrt(1/2), sqrt(2)), log(1 + m) = m - m^2 / 2 + m^3 P(m). Coefficients: Cephes logf.
L2L_INLINE Vec log_positive(Vec x) {
  const IVec bits = (IVec)x;
  IVec e = ((bits >> 23) & 0xff) - 126;
  Vec m = (Vec)((bits & 0x007fffff) | 0x3f000000);  // [1/2, 1)
  const IVec small = m < broadcast(0.707106781186547524f);
  e += small;  // true is -1
  m = m + (Vec)((IVec)m & small) - broadcast(1.0f);
  const Vec m2 = m * m;
  constexpr float kLog[9] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                             -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                             2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  Vec y = broadcast(kLog[0]);
  L2L_UNROLL for (int i = 1; i < 9; i++) y = fma(y, m, broadcast(kLog[i]));
  y *= m * m2;
  const Vec exponent = __builtin_convertvector(e, Vec);
  y = fma(exponent, broadcast(-2.12194440e-4f), y);  // log 2 in two parts
  y = fma(m2, broadcast(-0.5f), y);
  return fma(exponent, broadcast(0.693359375f), m + y);
}

// 16-bit storage ---------------------------------------------------------------------------------

L2L_INLINE float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
L2L_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

L2L_INLINE float from_bf16(uint16_t x) { return bits_to_float(static_cast<uint32_t>(x) << 16); }
L2L_INLINE uint16_t to_bf16(float x) {  // to nearest even; NaN stays NaN
  const uint32_t bits = float_to_bits(x);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__F16C__)
L2L_INLINE float from_f16(uint16_t x) { return _cvtsh_ss(x); }
L2L_INLINE uint16_t to_f16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
L2L_INLINE float from_f16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
  const uint32_t magnitude = x & 0x7fff;
  if (magnitude >= 0x7c00)  // infinity, NaN
    return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13 | (magnitude > 0x7c00 ? 0x400000 : 0));
  if (magnitude < 0x400)
    return bits_to_float(sign | float_to_bits(static_cast<float>(magnitude) * 0x1p-24f));  // denormal
  return bits_to_float(sign | ((magnitude << 13) + 0x38000000));  // the exponent's bias is 112 larger
}
L2L_INLINE uint16_t to_f16(float x) {  // to nearest even
  const uint32_t bits = float_to_bits(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds beyond the largest finite value
  if (magnitude < 0x38800000) {                       // denormal: let the addition of 1/2 round
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(float_to_bits(shifted) - 0x3f000000);
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000;
  return sign | static_cast<uint16_t>(rounded >> 13);
}
#endif

L2L_INLINE Vec load_f16(const uint16_t* p) {
#if L2L_WIDTH == 16
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif L2L_WIDTH == 8
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec v;
  for (int i = 0; i < kWidth; i++) v[i] = from_f16(p[i]);
  return v;
#endif
}
L2L_INLINE void store_f16(uint16_t* p, Vec v) {
#if L2L_WIDTH == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif L2L_WIDTH == 8
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kWidth; i++) p[i] = to_f16(v[i]);
#endif
}

typedef uint16_t HalfVec __attribute__((vector_size(2 * L2L_WIDTH), aligned(2), may_alias));
typedef uint32_t UVec __attribute__((vector_size(4 * L2L_WIDTH)));

L2L_INLINE Vec load_bf16(const uint16_t* p) {
  return (Vec)(__builtin_convertvector(*reinterpret_cast<const HalfVec*>(p), UVec) << 16);
}
L2L_INLINE void store_bf16(uint16_t* p, Vec v) {
  const UVec bits = (UVec)v;
  const UVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UVec nan = (UVec)(v != v);
  const UVec result = (rounded & ~nan) | (((bits >> 16) | 0x40) & nan);
  *reinterpret_cast<HalfVec*>(p) = __builtin_convertvector(result, HalfVec);
}

// Transposition ----------------------------------------------------------------------------------

#if defined(__AVX2__)
L2L_INLINE void transpose8(__m256 (&r)[8]) {
  __m256 t[8], u[8];
  L2L_FOR (i, 4) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  L2L_FOR (i, 2) {
    u[4 * i + 0] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xEE);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xEE);
  }
  L2L_FOR (i, 4) {
    r[i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
    r[4 + i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
  }
}
#endif

// to[c][r] = from[r][c]; both counts multiples of 8.
L2L_INLINE void transpose(const float* from, int from_stride, float* to, int to_stride, int rows, int columns) {
#if defined(__AVX2__)
  for (int r = 0; r < rows; r += 8)
    for (int c = 0; c < columns; c += 8) {
      __m256 block[8];
      L2L_FOR (i, 8) block[i] = _mm256_loadu_ps(from + (r + i) * from_stride + c);
      transpose8(block);
      L2L_FOR (i, 8) _mm256_storeu_ps(to + (c + i) * to_stride + r, block[i]);
    }
#else
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < columns; c++) to[c * to_stride + r] = from[r * from_stride + c];
#endif
}

}  // namespace
}  // namespace l2l
