// Backward through consecutive steps for kPass coordinates at a time: recompute forward into scratch,
// then walk back. Names as in docs/derivation.md. Included once per instruction set.
#pragma once

#include "forward.inl"

namespace l2l {
namespace {

// What the walk back needs of one unit at one step, as rows of kPass.
enum Saved { kI, kF, kG, kO, kTanhC, kC, kSavedRows };
constexpr int kLayerRows = kHidden * kSavedRows;
constexpr int kStepRows = 2 * kLayerRows + kFeatures;  // layer 1, layer 2, features
constexpr int64_t kStepFloats = static_cast<int64_t>(kStepRows) * kPass;

// Weight gradients of a few tiles and steps, in float32; flushed into float64 sums.
struct Accumulators {
  float layer1[kRows][kColumns1];
  float layer2[kRows][kColumns2];
};
constexpr int kAccumulators = sizeof(Accumulators) / sizeof(float);
// The float64 sums: those of the accumulators, then both layers' biases, the output layer's weights and its
// bias, [lane] each. The latter are few and cancel most, so they never pass through long float32 sums.
constexpr int kBias1 = kAccumulators;
constexpr int kBias2 = kBias1 + kRows * kWidth;
constexpr int kOutput = kBias2 + kRows * kWidth;
constexpr int kOutputBias = kOutput + kHidden * kWidth;
constexpr int kSums = kOutputBias + kWidth;
// Steps of a pass between two flushes: 512 terms per float32 sum. Ten times as many were up to three times
// as wrong as eager's blocked sums.
constexpr int kFlushInterval = 512 / kPass;

// Vectors along the columns of a weight gradient; 8 lanes divide both column counts.
#if defined(__AVX2__)
typedef float ColumnVec __attribute__((vector_size(32), aligned(4), may_alias));
#else
typedef float ColumnVec __attribute__((vector_size(16), aligned(4), may_alias));
#endif
constexpr int kColumnWidth = sizeof(ColumnVec) / sizeof(float);
#if defined(__AVX512VL__)
constexpr int kOuterRows1 = 4, kOuterVecs1 = 3, kOuterRows2 = 4, kOuterVecs2 = 5;  // 32 registers
#elif defined(__AVX2__)
constexpr int kOuterRows1 = 4, kOuterVecs1 = 3, kOuterRows2 = 2, kOuterVecs2 = 5;  // 16 registers
#else
constexpr int kOuterRows1 = 4, kOuterVecs1 = 2, kOuterRows2 = 4, kOuterVecs2 = 2;
#endif

// d_weights[kRows][COLUMNS] += d_gates[kRows][kPass] inputs[kPass][COLUMNS]
// The pass is summed by itself first: two short sums round less than one long one.
template <int ROWS, int VECS, int COLUMNS>
L2L_INLINE void add_outer_products(float* d_weights, const float* d_gates, const float* inputs) {
  for (int column = 0; column < COLUMNS; column += VECS * kColumnWidth)
    for (int row = 0; row < kRows; row += ROWS) {
      ColumnVec sums[ROWS][VECS] = {};
#pragma GCC unroll 4
      for (int b = 0; b < kPass; b++) {
        ColumnVec x[VECS];
        L2L_FOR (v, VECS) x[v] = *reinterpret_cast<const ColumnVec*>(inputs + b * COLUMNS + column + v * kColumnWidth);
        L2L_FOR (r, ROWS) {
          const ColumnVec d = d_gates[(row + r) * kPass + b] - ColumnVec{};
          L2L_FOR (v, VECS) sums[r][v] += d * x[v];
        }
      }
      L2L_FOR (r, ROWS)
        L2L_FOR (v, VECS)
          *reinterpret_cast<ColumnVec*>(d_weights + (row + r) * COLUMNS + column + v * kColumnWidth) += sums[r][v];
    }
}

// Like `activate`, but keeps every factor that the backward multiplies by; saved[kGroup][kSavedRows][kPass].
L2L_INLINE void activate_and_save(const float* gates, const Rows& c_before, float* saved, float* h) {
#pragma GCC unroll 1
  for (int u = 0; u < kGroup; u++)
    L2L_FOR (lock, kVecs / kLockVecs) {
      GateTerms terms[kLockVecs];
      gate_terms<kBackwardClamp>(gates + u * 4 * kPass + lock * kLockVecs * kWidth, terms);
      const Vec one = pinned(1.0f), two = pinned(2.0f);
      const Vec least = pinned(0x1p-126f);  // what the clamp leaves of a saturated sigmoid
      L2L_FOR (j, kLockVecs) {
        const GateTerms& t = terms[j];
        const int v = lock * kLockVecs + j;
        const Vec i = one / t.i - least, f = one / t.f - least, o = one / t.o - least, g = -t.m / (t.m + two);
        float* out = saved + u * kSavedRows * kPass + v * kWidth;
        store(out + kI * kPass, i);
        store(out + kF * kPass, f);
        store(out + kG * kPass, g);
        store(out + kO * kPass, o);
        store(out + kC * kPass, fma(f, c_before.get(u, v), i * g));
      }
    }
#pragma GCC unroll 1
  for (int e = 0; e < kGroup * kVecs; e += kLock) {
    Vec cell[kLock], m[kLock];
    L2L_FOR (j, kLock) cell[j] = load(saved + ((e + j) / kVecs * kSavedRows + kC) * kPass + (e + j) % kVecs * kWidth);
    cell_terms(cell, m);
    const Vec two = pinned(2.0f);
    L2L_FOR (j, kLock) {
      float* out = saved + (e + j) / kVecs * kSavedRows * kPass + (e + j) % kVecs * kWidth;
      const Vec tanh_c = -m[j] / (m[j] + two);
      store(out + kTanhC * kPass, tanh_c);
      store(h + (e + j) * kWidth, load(out + kO * kPass) * tanh_c);
    }
  }
}

template <int K>
L2L_INLINE void layer_and_save(const float (*weights)[1 + K + kHidden][kGates], const Rows& x, const Rows& h,
                               const Rows& c_before, float* saved, float* h_new) {
  alignas(64) float gates[kGroup * 4 * kPass];
  for (int u0 = 0; u0 < kHidden; u0 += kGroup) {
    for (int u = u0; u < u0 + kGroup; u++)
      unit_gates<K, 0>(&weights[u][0][0], x, h, gates + (u - u0) * 4 * kPass, nullptr);
    activate_and_save(gates, c_before.from(u0), saved + u0 * kSavedRows * kPass, h_new + u0 * kPass);
  }
}

L2L_INLINE void add_exactly(double* sums, Vec terms) {
  typedef double DoubleVec __attribute__((vector_size(8 * L2L_WIDTH), aligned(8), may_alias));
  *reinterpret_cast<DoubleVec*>(sums) += __builtin_convertvector(terms, DoubleVec);
}

// d_gates[unit * 4 + gate][kPass] from d_h, and their sums to bias[kRows][kWidth]; d_c becomes the derivative
// by the cell before.
L2L_INLINE void gates_backward(const float* saved, const Rows& c_before, const float* d_h, float* d_c, float* d_gates,
                               double* bias) {
  const Vec one = broadcast(1.0f);
  for (int u = 0; u < kHidden; u++) {
    Vec sums[4] = {};
    L2L_FOR (v, kVecs) {
      const float* s = saved + u * kSavedRows * kPass + v * kWidth;
      const Vec i = load(s + kI * kPass), f = load(s + kF * kPass), g = load(s + kG * kPass), o = load(s + kO * kPass),
                tanh_c = load(s + kTanhC * kPass);
      const Vec dh = load(d_h + u * kPass + v * kWidth);
      const Vec dc = load(d_c + u * kPass + v * kWidth) + dh * o * (one - tanh_c * tanh_c);
      const Vec d[4] = {dc * g * (i * (one - i)), dc * c_before.get(u, v) * (f * (one - f)), dc * i * (one - g * g),
                        dh * tanh_c * (o * (one - o))};
      store(d_c + u * kPass + v * kWidth, dc * f);
      L2L_FOR (r, 4) {
        store(d_gates + (u * 4 + r) * kPass + v * kWidth, d[r]);
        sums[r] += d[r];
      }
    }
    L2L_FOR (r, 4) add_exactly(bias + (u * 4 + r) * kWidth, sums[r]);
  }
}

// out[4 * BLOCKS][kPass] = weights^T d_gates
template <int BLOCKS>
L2L_INLINE void inputs_backward(const float (*weights)[kRows][4], float* d_gates, float* out) {
  for (int k = 0; k < BLOCKS; k++) {
    Vec sums[4][kVecs] = {};
    accumulate<kRows>(&weights[k][0][0], local_rows(d_gates), sums);
    L2L_FOR (r, 4)
      L2L_FOR (v, kVecs) store(out + (4 * k + r) * kPass + v * kWidth, sums[r][v]);
  }
}

// out[kHidden][kPass] = hidden values of a layer at a step, from what was saved
L2L_INLINE void hidden_rows(const float* saved, float* out) {
  for (int u = 0; u < kHidden; u++)
    L2L_FOR (v, kVecs) {
      const float* s = saved + u * kSavedRows * kPass + v * kWidth;
      store(out + u * kPass + v * kWidth, load(s + kO * kPass) * load(s + kTanhC * kPass));
    }
}

L2L_INLINE void flush(Accumulators& accumulators, double* sums) {
  float* values = &accumulators.layer1[0][0];
  for (int i = 0; i < kAccumulators; i++) {
    sums[i] += static_cast<double>(values[i]);
    values[i] = 0.0f;
  }
}

// values[kPass] from the coordinates first .. first + count of a row, zero beyond.
L2L_INLINE void load_lanes(const float* row, int count, float* values) {
  for (int i = 0; i < count; i++) values[i] = row[i];
  for (int i = count; i < kPass; i++) values[i] = 0.0f;
}

// rows[kRows][kPass] from `count` coordinates of kRows each, zero beyond.
L2L_INLINE void load_states(const float* state, int count, float* rows) {
  alignas(64) float padded[kPass * kRows];
  if (count < kPass) {
    memcpy(padded, state, sizeof(float) * kRows * count);
    memset(padded + count * kRows, 0, sizeof(float) * kRows * (kPass - count));
    state = padded;
  }
  transpose(state, kRows, rows, kPass, kPass, kRows);
}

L2L_INLINE void store_states(const float* rows, int count, float* state) {
  alignas(64) float padded[kPass * kRows];
  float* to = count < kPass ? padded : state;
  transpose(rows, kPass, to, kRows, kRows, kPass);
  if (count < kPass) memcpy(state, padded, sizeof(float) * kRows * count);
}

struct Backward {
  const BackwardArgs& args;
  const Weights& w;
  Accumulators& accumulators;
  double* sums;
  float* scratch;  // [steps][kStepRows][kPass]
  int since_flush = 0;

  alignas(64) float state[kRows * kPass];  // before the first step
  alignas(64) float d_h1[kHidden * kPass], d_c1[kHidden * kPass], d_h2[kHidden * kPass], d_c2[kHidden * kPass];
  alignas(64) float d_gates[kRows * kPass];

  Backward(const BackwardArgs& a, Accumulators& to, double* sums64, float* buffer)
      : args(a), w(*a.weights), accumulators(to), sums(sums64), scratch(buffer) {}

  float* layer1(int64_t t) const { return scratch + t * kStepFloats; }
  float* layer2(int64_t t) const { return layer1(t) + kLayerRows * kPass; }
  float* features(int64_t t) const { return layer2(t) + kLayerRows * kPass; }
  // Cells before step t: saved by step t - 1, or in the initial state.
  Rows cells(int64_t t, int layer) {
    if (t == 0) return local_rows(state + (2 * layer + 1) * kHidden * kPass);
    return local_rows((layer ? layer2(t - 1) : layer1(t - 1)) + kC * kPass, kSavedRows * kPass);
  }

  void recompute(int64_t first, int count) {
    alignas(64) float hidden[2][2 * kHidden * kPass], grad[kPass];
    float *h1 = state, *h2 = state + 2 * kHidden * kPass;
    for (int64_t t = 0; t < args.steps; t++) {
      load_lanes(args.grads + t * args.n + first, count, grad);
      preprocess(w, grad, features(t));
      float* h_new = hidden[t & 1];
      layer_and_save<kFeatures>(w.forward1, local_rows(features(t)), local_rows(h1), cells(t, 0), layer1(t), h_new);
      layer_and_save<kHidden>(w.forward2, local_rows(h_new), local_rows(h2), cells(t, 1), layer2(t),
                              h_new + kHidden * kPass);
      h1 = h_new;
      h2 = h_new + kHidden * kPass;
    }
  }

  void step_back(int64_t t, const double* d_update) {
    alignas(64) float d_inputs[2 * kHidden * kPass];
    alignas(64) float inputs[kColumns2 * kPass], inputs_t[kPass * kColumns2];

    // Output layer.
    alignas(64) float rounded[kPass];
    for (int i = 0; i < kPass; i++) {
      const double d = static_cast<double>(w.output_scale) * d_update[i];
      sums[kOutputBias + i % kWidth] += d;
      rounded[i] = static_cast<float>(d);
    }
    Vec d_output[kVecs];
    L2L_FOR (v, kVecs) d_output[v] = load(rounded + v * kWidth);
    for (int u = 0; u < kHidden; u++) {
      Vec sum = {};
      L2L_FOR (v, kVecs) {
        const float* s = layer2(t) + u * kSavedRows * kPass + v * kWidth;
        float* dh = d_h2 + u * kPass + v * kWidth;
        sum = fma(d_output[v], load(s + kO * kPass) * load(s + kTanhC * kPass), sum);
        store(dh, fma(d_output[v], broadcast(w.output[u]), load(dh)));
      }
      add_exactly(sums + kOutput + u * kWidth, sum);
    }

    // Layer 2: its inputs are h1 of this step and h2 of the step before.
    gates_backward(layer2(t), cells(t, 1), d_h2, d_c2, d_gates, sums + kBias2);
    hidden_rows(layer1(t), inputs);
    if (t > 0)
      hidden_rows(layer2(t - 1), inputs + kHidden * kPass);
    else
      memcpy(inputs + kHidden * kPass, state + 2 * kHidden * kPass, sizeof(float) * kHidden * kPass);
    transpose(inputs, kPass, inputs_t, kColumns2, kColumns2, kPass);
    add_outer_products<kOuterRows2, kOuterVecs2, kColumns2>(&accumulators.layer2[0][0], d_gates, inputs_t);
    inputs_backward<2 * kHidden / 4>(w.backward2, d_gates, d_inputs);
    for (int i = 0; i < kHidden * kPass; i += kWidth) store(d_h1 + i, load(d_h1 + i) + load(d_inputs + i));
    memcpy(d_h2, d_inputs + kHidden * kPass, sizeof(d_h2));

    // Layer 1: its inputs are the features and h1 of the step before.
    gates_backward(layer1(t), cells(t, 0), d_h1, d_c1, d_gates, sums + kBias1);
    memcpy(inputs, features(t), sizeof(float) * kFeatures * kPass);
    if (t > 0)
      hidden_rows(layer1(t - 1), inputs + kFeatures * kPass);
    else
      memcpy(inputs + kFeatures * kPass, state, sizeof(float) * kHidden * kPass);
    memset(inputs + (kFeatures + kHidden) * kPass, 0, sizeof(float) * (kColumns1 - kFeatures - kHidden) * kPass);
    transpose(inputs, kPass, inputs_t, kColumns1, kColumns1, kPass);
    add_outer_products<kOuterRows1, kOuterVecs1, kColumns1>(&accumulators.layer1[0][0], d_gates, inputs_t);
    inputs_backward<kHidden / 4>(w.backward1, d_gates, d_h1);

    if (++since_flush >= kFlushInterval) {
      flush(accumulators, sums);
      since_flush = 0;
    }
  }

  // d_grad[count] of the step just walked back, through the preprocessing of row[count].
  void features_backward(const float* row, int count, float* d_grad) const {
    alignas(64) float grad[kPass], result[kPass];
    load_lanes(row, count, grad);
    L2L_FOR (v, kVecs) {
      Vec sums[4][kFeatures] = {};
      for (int j = 0; j < kRows; j += 4)
        L2L_FOR (r, 4) {
          const Vec d = load(d_gates + (j + r) * kPass + v * kWidth);
          L2L_FOR (k, kFeatures) sums[r][k] = fma(broadcast(w.features1[j + r][k]), d, sums[r][k]);
        }
      Vec d_x[kFeatures];
      L2L_FOR (k, kFeatures) d_x[k] = (sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k]);
      if (w.log_p == 0.0f) {
        store(result + v * kWidth, d_x[0]);
      } else {
        const Vec g = load(grad + v * kWidth);
        const IVec large = (Vec)((IVec)g & 0x7fffffff) >= broadcast(w.threshold);
        const Vec slope = broadcast(w.log_p) * select(large, g, broadcast(1.0f));
        store(result + v * kWidth, select(large, d_x[0] / slope, d_x[1] * broadcast(w.slope)));
      }
    }
    memcpy(d_grad, result, sizeof(float) * count);
  }

  void pass(int64_t first, int count) {
    if (args.state)
      load_states(args.state + first * kRows, count, state);
    else
      memset(state, 0, sizeof(state));
    recompute(first, count);

    alignas(64) float d_state[kRows * kPass];
    if (args.d_last_state)
      load_states(args.d_last_state + first * kRows, count, d_state);
    else
      memset(d_state, 0, sizeof(d_state));
    memcpy(d_h1, d_state, sizeof(d_h1));
    memcpy(d_c1, d_state + kHidden * kPass, sizeof(d_c1));
    memcpy(d_h2, d_state + 2 * kHidden * kPass, sizeof(d_h2));
    memcpy(d_c2, d_state + 3 * kHidden * kPass, sizeof(d_c2));

    // The suffix sum stays in float64: rounded at every step it would bias the gradient of the output layer.
    alignas(64) double d_update[kPass] = {};
    alignas(64) float term[kPass];
    for (int64_t t = args.steps - 1; t >= 0; t--) {
      load_lanes(args.terms + t * args.n + first, count, term);
      for (int i = 0; i < kPass; i++) d_update[i] += static_cast<double>(args.loss_weights[t]) * term[i];
      step_back(t, d_update);
      if (args.d_grads) {
        const int64_t at = t * args.n + first;
        features_backward(args.grads + at, count, args.d_grads + at);
      }
    }

    if (args.d_state) {
      memcpy(d_state, d_h1, sizeof(d_h1));
      memcpy(d_state + kHidden * kPass, d_c1, sizeof(d_c1));
      memcpy(d_state + 2 * kHidden * kPass, d_h2, sizeof(d_h2));
      memcpy(d_state + 3 * kHidden * kPass, d_c2, sizeof(d_c2));
      store_states(d_state, count, args.d_state + first * kRows);
    }
  }
};

}  // namespace
}  // namespace l2l
