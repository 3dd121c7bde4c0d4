// A tile of the state in 8 bits: 16 coordinates share a power of 2 for each row, so that a number is
// q * 2^(scale - 126), with q = -128 for what is not finite. Included once per instruction set.
#pragma once

#include "vec.h"

namespace l2l {
namespace {

// [kRows][kTile] numbers, then a scale for each row.
constexpr int kInt8TileBytes = kTileSize + kRows;
static_assert(kRows % kTile == 0, "a packed state is an array of whole rows");

// Lanes from and to bytes; the compilers' own conversions take several times the instructions.
L2L_INLINE IVec load_bytes(const int8_t* p) {
#if L2L_WIDTH == 16
  return (IVec)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif L2L_WIDTH == 8
  return (IVec)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  IVec v;
  for (int i = 0; i < kWidth; i++) v[i] = p[i];
  return v;
#endif
}
L2L_INLINE void store_bytes(int8_t* p, IVec v) {
#if L2L_WIDTH == 16
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)v));
#elif L2L_WIDTH == 8
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(shorts, shorts));
#else
  for (int i = 0; i < kWidth; i++) p[i] = static_cast<int8_t>(v[i]);
#endif
}

constexpr int kInt8Largest = 127;
constexpr int kInt8NotFinite = -128;
constexpr int kInfinityBits = 0x7f800000;

L2L_INLINE int largest_lane(IVec v) {
#if L2L_WIDTH == 16
  return _mm512_reduce_max_epi32((__m512i)v);
#elif L2L_WIDTH == 8
  __m128i x = _mm_max_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
#else
  int largest = v[0];
  for (int i = 1; i < kWidth; i++) largest = v[i] > largest ? v[i] : largest;
  return largest;
#endif
}

// The scale of numbers of which the largest finite magnitude has these bits: it is brought to [64, 128).
L2L_INLINE int int8_scale(int bits) {
  const int exponent = bits >> 23;
  return exponent > 7 ? exponent - 7 : 0;
}

L2L_INLINE void read_int8_tile(const void* tile, float* rows, int stride) {
  const int8_t* numbers = static_cast<const int8_t*>(tile);
  const uint8_t* scales = static_cast<const uint8_t*>(tile) + kTileSize;
  for (int r = 0; r < kRows; r++) {
    const Vec scale = broadcast(bits_to_float(static_cast<uint32_t>(scales[r] + 1) << 23));
    L2L_UNROLL for (int i = 0; i < kTile; i += kWidth) {
      const IVec q = load_bytes(numbers + r * kTile + i);
      const IVec not_finite = q == kInt8NotFinite;  // all bits, and so NaN
      store(rows + r * stride + i, (Vec)((IVec)(__builtin_convertvector(q, Vec) * scale) | not_finite));
    }
  }
}

L2L_INLINE void write_int8_tile(const float* rows, int stride, void* tile) {
  int8_t* numbers = static_cast<int8_t*>(tile);
  uint8_t* scales = static_cast<uint8_t*>(tile) + kTileSize;
  // In the low bits of a sum with it stands the other term, rounded to nearest even.
  const Vec magic = pinned(12582912.0f), largest = pinned(kInt8Largest), smallest = pinned(-kInt8Largest);
  for (int r = 0; r < kRows; r++) {
    const float* row = rows + r * stride;
    IVec finite[kTile / kWidth], magnitude = {};
    L2L_FOR (i, kTile / kWidth) {
      const IVec bits = (IVec)load(row + i * kWidth) & 0x7fffffff;
      finite[i] = bits < kInfinityBits;
      const IVec counted = bits & finite[i];
      magnitude = counted > magnitude ? counted : magnitude;
    }
    const int scale = int8_scale(largest_lane(magnitude));
    scales[r] = static_cast<uint8_t>(scale);
    const Vec inverse = broadcast(bits_to_float(static_cast<uint32_t>(253 - scale) << 23));
    L2L_FOR (i, kTile / kWidth) {
      const Vec x = maximum(smallest, minimum(largest, load(row + i * kWidth) * inverse));
      const IVec q = (IVec)(x + magic) - (IVec)magic;
      const IVec stored = (q & finite[i]) | (kInt8NotFinite & ~finite[i]);
      store_bytes(numbers + r * kTile + i * kWidth, stored);
    }
  }
}

}  // namespace
}  // namespace l2l
