// One step of the rule for kPass coordinates at a time. Vectors run along coordinates, so weights are
// broadcast scalars and nothing is padded. Included once per instruction set.
#pragma once

#include "vec.h"

namespace l2l {
namespace {

constexpr int kVecs = kWidth == 4 ? 4 : 2;  // 4 gates x 2 vectors of sums hide the latency of FMA
constexpr int kPass = kVecs * kWidth;       // coordinates per pass: 16, or 32 with AVX-512
constexpr int kPassTiles = kPass / kTile;
constexpr int kGroup = 4;  // units between matrix product and activations

constexpr float kLog2E = 1.44269504088896340736f;

// Rows of kPass coordinates, which lie in kPassTiles pieces of kTile.
struct Rows {
  float* piece[kPassTiles];
  int stride;

  L2L_INLINE float* at(int row, int v) const { return piece[v * kWidth / kTile] + row * stride + v * kWidth % kTile; }
  L2L_INLINE Vec get(int row, int v) const { return load(at(row, v)); }
  L2L_INLINE void set(int row, int v, Vec x) const { store(at(row, v), x); }
  L2L_INLINE Rows from(int row) const {
    Rows r = *this;
    for (float*& p : r.piece) p += row * stride;
    return r;
  }
};

// A local buffer [rows][kPass], with `stride` floats from one row to the next.
L2L_INLINE Rows local_rows(float* buffer, int stride = kPass) {
  Rows r;
  for (int i = 0; i < kPassTiles; i++) r.piece[i] = buffer + i * kTile;
  r.stride = stride;
  return r;
}

// x[kFeatures][kPass] from grad[kPass].
L2L_INLINE void preprocess(const Weights& w, const float* grad, float* x) {
  L2L_FOR (v, kVecs) {
    const Vec g = load(grad + v * kWidth);
    const Vec not_finite = g * broadcast(0.0f);  // NaN for NaN and the infinities, else 0
    if (w.log_p == 0.0f) {
      store(x + v * kWidth, g + not_finite);
      store(x + kPass + v * kWidth, Vec{});
    } else {
      const Vec magnitude = (Vec)((IVec)g & 0x7fffffff);
      const IVec large = magnitude >= broadcast(w.threshold);
      const Vec log = log_positive(select(large, magnitude, broadcast(1.0f))) * broadcast(w.inverse_p);
      const Vec sign = (Vec)(((IVec)g & INT32_MIN) | (IVec)broadcast(1.0f));
      store(x + v * kWidth, select(large, log, broadcast(-1.0f)) + not_finite);
      store(x + kPass + v * kWidth, select(large, sign, g * broadcast(w.slope)) + not_finite);
    }
  }
}

// sums[r][v] += sum_k weights[k][r] * x[k][v]
template <int K>
L2L_INLINE void accumulate(const float* weights, const Rows& x, Vec (&sums)[4][kVecs]) {
#pragma GCC unroll 2
  for (int k = 0; k < K; k++) {
    Vec xv[kVecs];
    L2L_FOR (v, kVecs) xv[v] = x.get(k, v);
    L2L_FOR (r, 4) {
      const Vec weight = broadcast(weights[4 * k + r]);
      L2L_FOR (v, kVecs) sums[r][v] = fma(weight, xv[v], sums[r][v]);
    }
  }
}

// Gates of one unit before their nonlinearity, as exponents of 2: gates[4][kPass].
template <int K, int PREFETCH>
L2L_INLINE void unit_gates(const float* weights, const Rows& x, const Rows& h, float* gates, const char* next) {
  Vec sums[4][kVecs];
  L2L_FOR (r, 4)
    L2L_FOR (v, kVecs) sums[r][v] = broadcast(weights[r]);
  accumulate<kHidden>(weights + 4 * (1 + K), h, sums);
  if (PREFETCH)
    L2L_FOR (i, PREFETCH) __builtin_prefetch(next + 64 * i);
  accumulate<K>(weights + 4, x, sums);
  L2L_FOR (r, 4)
    L2L_FOR (v, kVecs) store(gates + r * kPass + v * kWidth, sums[r][v]);
}

// Vectors whose exponentials run in lock step: as many as the registers hold.
#if defined(__AVX512VL__)
constexpr int kLock = 8;
#else
constexpr int kLock = 4;
#endif
constexpr int kLockVecs = kLock / 4;  // of four gates each
static_assert(kVecs % kLockVecs == 0 && kGroup * kVecs % kLock == 0);

// What the activations need of a unit's four gates. With e = 2^z and z = -x log2(e): denominators
// 1 + e of the three sigmoids, and m = e - 1 for tanh = -m / (m + 2).
struct GateTerms {
  Vec i, f, m, o;
};

// Terms of kLockVecs vectors of one unit; gates[4][kPass].
template <int CLAMP>
L2L_INLINE void gate_terms(const float* gates, GateTerms (&terms)[kLockVecs]) {
  Vec z[kLock], scale[kLock], poly[kLock];
  L2L_FOR (m, kLock) z[m] = load(gates + m % 4 * kPass + m / 4 * kWidth);
  exp2_split<CLAMP>(z, scale, poly);
  const Vec one = pinned(1.0f);
  L2L_FOR (v, kLockVecs) {
    const int i = 4 * v, f = i + 1, g = i + 2, o = i + 3;
    terms[v] = {one_plus_exp2(z[i], scale[i], poly[i], one), one_plus_exp2(z[f], scale[f], poly[f], one),
                exp2_minus_one(z[g], scale[g], poly[g], one), one_plus_exp2(z[o], scale[o], poly[o], one)};
  }
}

// m = e^{-2c} - 1 of kLock cells; tanh(c) = -m / (m + 2).
L2L_INLINE void cell_terms(Vec (&c)[kLock], Vec (&m)[kLock]) {
  const Vec factor = pinned(-2 * kLog2E);
  Vec scale[kLock], poly[kLock];
  L2L_FOR (j, kLock) c[j] *= factor;
  exp2_split<kForwardClamp>(c, scale, poly);
  const Vec one = pinned(1.0f);
  L2L_FOR (j, kLock) m[j] = exp2_minus_one(c[j], scale[j], poly[j], one);
}

// New cells in place and new hidden values for kGroup units; one division for c, one for h.
L2L_INLINE void activate(const float* gates, const Rows& c, const Rows& h) {
  alignas(64) float o_denominator[kGroup * kPass];
#pragma GCC unroll 1
  for (int u = 0; u < kGroup; u++)
    L2L_FOR (lock, kVecs / kLockVecs) {
      GateTerms terms[kLockVecs];
      gate_terms<kForwardClamp>(gates + u * 4 * kPass + lock * kLockVecs * kWidth, terms);
      const Vec two = pinned(2.0f);
      L2L_FOR (j, kLockVecs) {
        const GateTerms& t = terms[j];
        const int v = lock * kLockVecs + j;
        const Vec ig = t.i * (t.m + two);
        c.set(u, v, (c.get(u, v) * ig - t.m * t.f) / (ig * t.f));
        store(o_denominator + u * kPass + v * kWidth, t.o);
      }
    }
#pragma GCC unroll 1
  for (int e = 0; e < kGroup * kVecs; e += kLock) {
    Vec cell[kLock], m[kLock];
    L2L_FOR (j, kLock) cell[j] = c.get((e + j) / kVecs, (e + j) % kVecs);
    cell_terms(cell, m);
    const Vec two = pinned(2.0f);
    L2L_FOR (j, kLock) {
      const Vec o = load(o_denominator + (e + j) * kWidth);
      h.set((e + j) / kVecs, (e + j) % kVecs, -m[j] / (o * (m[j] + two)));
    }
  }
}

// One layer: cells `c` in place, new hidden values to `h_new`, which must not be `h`.
template <int K, int PREFETCH>
L2L_INLINE void layer(const float (*weights)[1 + K + kHidden][kGates], const Rows& x, const Rows& h, const Rows& c,
                      const Rows& h_new, const char* next) {
  alignas(64) float gates[kGroup * 4 * kPass];
  for (int u0 = 0; u0 < kHidden; u0 += kGroup) {
    for (int u = u0; u < u0 + kGroup; u++)
      unit_gates<K, PREFETCH>(&weights[u][0][0], x, h, gates + (u - u0) * 4 * kPass, next + u * PREFETCH * 64);
    activate(gates, c.from(u0), h_new.from(u0));
  }
}

// One step for one pass: state in place (rows h1, c1, h2, c2), update[kPass] out. While each layer is at
// work, kHidden * PREFETCH cache lines from one of `next` are prefetched.
template <int PREFETCH>
L2L_INLINE void step_pass(const Weights& w, const float* grad, const Rows& state, float* update,
                          const char* const (&next)[2]) {
  alignas(64) float x[kFeatures * kPass], h1[kHidden * kPass], h2[kHidden * kPass];
  preprocess(w, grad, x);
  layer<kFeatures, PREFETCH>(w.forward1, local_rows(x), state, state.from(kHidden), local_rows(h1), next[0]);
  layer<kHidden, PREFETCH>(w.forward2, local_rows(h1), state.from(2 * kHidden), state.from(3 * kHidden), local_rows(h2),
                           next[1]);
  // Four short sums round less than one long one.
  Vec sums[kGroup][kVecs] = {};
  for (int u0 = 0; u0 < kHidden; u0 += kGroup)
    L2L_FOR (j, kGroup) {
      const int u = u0 + j;
      const Vec weight = broadcast(w.output[u]);
      L2L_FOR (v, kVecs) {
        const Vec h = load(h2 + u * kPass + v * kWidth);
        state.set(u, v, load(h1 + u * kPass + v * kWidth));
        state.set(2 * kHidden + u, v, h);
        sums[j][v] = fma(weight, h, sums[j][v]);
      }
    }
  L2L_FOR (v, kVecs) {
    const Vec sum = (sums[0][v] + sums[1][v]) + (sums[2][v] + sums[3][v]) + broadcast(w.output_bias);
    store(update + v * kWidth, sum * broadcast(w.output_scale));
  }
}

}  // namespace
}  // namespace l2l
