// The kernels of one instruction set, in terms of tile ranges. Included by kernels_<set>.cpp.
#pragma once

#include "backward.inl"
#include "int8.inl"

namespace l2l {
namespace {

L2L_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Parameters and gradients of any storage type ---------------------------------------------------

L2L_INLINE void read_lanes(const void* from, Dtype dtype, int64_t first, int count, float* to) {
  if (dtype == Dtype::f32) {
    const float* p = static_cast<const float*>(from) + first;
    count == kTile ? memcpy(to, p, sizeof(float) * kTile) : memcpy(to, p, sizeof(float) * count);
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(from) + first;
  for (int i = 0; i < count; i++) to[i] = dtype == Dtype::f16 ? from_f16(p[i]) : from_bf16(p[i]);
}

L2L_INLINE void write_lanes(const float* from, Dtype dtype, int64_t first, int count, void* to) {
  if (dtype == Dtype::f32) {
    float* p = static_cast<float*>(to) + first;
    count == kTile ? memcpy(p, from, sizeof(float) * kTile) : memcpy(p, from, sizeof(float) * count);
    return;
  }
  uint16_t* p = static_cast<uint16_t*>(to) + first;
  for (int i = 0; i < count; i++) p[i] = dtype == Dtype::f16 ? to_f16(from[i]) : to_bf16(from[i]);
}

L2L_INLINE int64_t bytes_of_tile(Dtype dtype) {
  if (dtype == Dtype::i8) return kInt8TileBytes;
  return kTileSize * (dtype == Dtype::f32 ? 4 : 2);
}

L2L_INLINE void read_tile(const void* tile, Dtype dtype, float* rows, int stride) {
  if (dtype == Dtype::i8) return read_int8_tile(tile, rows, stride);
  const uint16_t* p = static_cast<const uint16_t*>(tile);
  for (int r = 0; r < kRows; r++)
    for (int i = 0; i < kTile; i += kWidth) {
      const uint16_t* at = p + r * kTile + i;
      store(rows + r * stride + i, dtype == Dtype::f16 ? load_f16(at) : load_bf16(at));
    }
}

L2L_INLINE void write_tile(const float* rows, int stride, Dtype dtype, void* tile) {
  if (dtype == Dtype::i8) return write_int8_tile(rows, stride, tile);
  uint16_t* p = static_cast<uint16_t*>(tile);
  for (int r = 0; r < kRows; r++)
    for (int i = 0; i < kTile; i += kWidth) {
      const Vec value = load(rows + r * stride + i);
      uint16_t* at = p + r * kTile + i;
      dtype == Dtype::f16 ? store_f16(at, value) : store_bf16(at, value);
    }
}

// In-place step ----------------------------------------------------------------------------------

// Where one tile lies.
struct TileOf {
  const StepTensor* tensor;
  int64_t first;  // coordinate within the tensor
  int count;      // coordinates in use, at most kTile
  char* state;
};

// The tile with the number `tile`, which is in `tensor` or a later one.
L2L_INLINE TileOf find_tile(const StepTensor*& tensor, int64_t tile, int64_t tile_bytes) {
  while (tile >= tensor->first_tile + (tensor->size + kTile - 1) / kTile) tensor++;
  const int64_t index = tile - tensor->first_tile;
  return {tensor, index * kTile, static_cast<int>(smaller(kTile, tensor->size - index * kTile)),
          static_cast<char*>(tensor->state) + index * tile_bytes};
}

L2L_INLINE void copy_piece(const Rows& from, int piece, const Rows& to) {
  for (int r = 0; r < kRows; r++)
    memcpy(to.piece[piece] + r * to.stride, from.piece[piece] + r * from.stride, sizeof(float) * kTile);
}

L2L_INLINE bool not_finite(float x) { return (float_to_bits(x) & 0x7f800000) == 0x7f800000; }

void step(const StepArgs& args, int64_t tensor, int64_t begin, int64_t end) {
  const bool narrow = args.state_dtype != Dtype::f32;
  const int64_t tile_bytes = bytes_of_tile(args.state_dtype);
  alignas(64) float grad[kPass], update[kPass], param[kPass], staged[kRows * kPass];
  alignas(64) float spare[kTileSize];  // stands in for the second tile of a last, half pass
  alignas(64) float before[kRows * kPass];

  const StepTensor* current = args.tensors + tensor;
  for (int64_t tile = begin; tile < end; tile += kPassTiles) {
    TileOf tiles[kPassTiles];
    const int used = static_cast<int>(smaller(kPassTiles, end - tile));
    Rows rows = local_rows(staged);
    memset(grad, 0, sizeof(grad));
    for (int i = 0; i < used; i++) {
      const TileOf& t = tiles[i] = find_tile(current, tile + i, tile_bytes);
      read_lanes(t.tensor->grad, args.dtype, t.first, t.count, grad + i * kTile);
      // What pads a tile must not count among those that share a scale, and NaN does not.
      if (args.state_dtype == Dtype::i8)
        for (int lane = t.count; lane < kTile; lane++) grad[i * kTile + lane] = bits_to_float(0x7fc00000);
      if (narrow) read_tile(t.state, args.state_dtype, staged + i * kTile, kPass);
    }
    if (!narrow) {
      rows.stride = kTile;
      for (int i = 0; i < kPassTiles; i++) rows.piece[i] = i < used ? reinterpret_cast<float*>(tiles[i].state) : spare;
      if (used < kPassTiles) memset(spare, 0, sizeof(spare));
    } else if (used < kPassTiles) {
      memset(staged, 0, sizeof(staged));
      for (int i = 0; i < used; i++) read_tile(tiles[i].state, args.state_dtype, staged + i * kTile, kPass);
    }

    bool skip[kPassTiles] = {};
    if (args.skip_nonfinite)
      for (int i = 0; i < used; i++) {
        for (int lane = 0; lane < tiles[i].count; lane++) skip[i] |= not_finite(grad[i * kTile + lane]);
        if (skip[i]) copy_piece(rows, i, local_rows(before));
      }

    const Vec sign = broadcast(args.grad_sign);
    alignas(64) float signed_grad[kPass];
    L2L_FOR (v, kVecs) store(signed_grad + v * kWidth, load(grad + v * kWidth) * sign);
    // The next pass lies too far away for the processor to foresee, in another tensor perhaps.
    const char* next[2];
    const StepTensor* upcoming = current;
    for (int half = 0; half < 2; half++) {
      const int64_t number = smaller(tile + kPassTiles + half * (kPassTiles - 1), end - 1);
      const TileOf t = find_tile(upcoming, number, tile_bytes);
      next[half] = t.state + (kPassTiles == 1 ? half * tile_bytes / 2 : 0);
      const int64_t at = t.first * (args.dtype == Dtype::f32 ? 4 : 2);
      __builtin_prefetch(static_cast<const char*>(t.tensor->grad) + at);
      __builtin_prefetch(static_cast<const char*>(t.tensor->param) + at);
    }
    step_pass<kPass / 8>(*args.weights, signed_grad, rows, update, next);

    for (int i = 0; i < used; i++) {
      const TileOf& t = tiles[i];
      float* values = param + i * kTile;
      if (t.count < kTile) memset(values, 0, sizeof(float) * kTile);
      read_lanes(t.tensor->param, args.dtype, t.first, t.count, values);
      const Vec lr = broadcast(args.lr), decay = broadcast(args.decay);
      alignas(64) float moved[kTile];
      L2L_UNROLL for (int lane = 0; lane < kTile; lane += kWidth)
          store(moved + lane, fma(lr, load(update + i * kTile + lane), decay * load(values + lane)));
      if (skip[i])
        for (int lane = 0; lane < t.count; lane++)
          if (not_finite(grad[i * kTile + lane])) {
            moved[lane] = values[lane];
            for (int r = 0; r < kRows; r++)
              rows.piece[i][r * rows.stride + lane] = before[r * kPass + i * kTile + lane];
          }
      if (narrow) write_tile(staged + i * kTile, kPass, args.state_dtype, t.state);
      write_lanes(moved, args.dtype, t.first, t.count, t.tensor->param);
    }
  }
}

// Differentiable step ----------------------------------------------------------------------------

void forward(const ForwardArgs& args, int64_t begin, int64_t end) {
  alignas(64) float grad[kPass], update[kPass], rows[kRows * kPass];
  for (int64_t first = begin * kTile; first < smaller(args.n, end * kTile); first += kPass) {
    const int count = static_cast<int>(smaller(kPass, smaller(args.n, end * kTile) - first));
    load_lanes(args.grad + first, count, grad);
    load_states(args.state + first * kRows, count, rows);
    step_pass<0>(*args.weights, grad, local_rows(rows), update, {nullptr, nullptr});
    store_states(rows, count, args.new_state + first * kRows);
    memcpy(args.update + first, update, sizeof(float) * count);
  }
}

// Backward ---------------------------------------------------------------------------------------

size_t scratch_floats(int64_t steps) { return static_cast<size_t>(steps * kStepFloats); }

void backward(const BackwardArgs& args, int64_t begin, int64_t end, float* scratch, double* sums) {
  alignas(64) Accumulators accumulators;
  memset(&accumulators, 0, sizeof(accumulators));
  Backward walk(args, accumulators, sums, scratch);
  const int64_t last = smaller(args.n, end * kTile);
  for (int64_t first = begin * kTile; first < last; first += kPass)
    walk.pass(first, static_cast<int>(smaller(kPass, last - first)));
  flush(accumulators, sums);
}

void collect(const double* sums, double* d_weights) {
  const double* layer1 = sums;
  const double* layer2 = layer1 + kRows * kColumns1;
  const double *bias1 = sums + kBias1, *bias2 = sums + kBias2, *output = sums + kOutput;
  const double* output_bias = sums + kOutputBias;

  double* ih1 = d_weights;
  double* hh1 = ih1 + kRows * kFeatures;
  double* b1 = hh1 + kRows * kHidden;
  double* ih2 = b1 + kRows;
  double* hh2 = ih2 + kRows * kHidden;
  double* b2 = hh2 + kRows * kHidden;
  double* out = b2 + kRows;
  for (int u = 0; u < kHidden; u++) {
    for (int gate = 0; gate < kGates; gate++) {
      const int from = u * kGates + gate, to = gate * kHidden + u;
      const double* row1 = layer1 + from * kColumns1;
      const double* row2 = layer2 + from * kColumns2;
      for (int k = 0; k < kFeatures; k++) ih1[to * kFeatures + k] += row1[k];
      for (int k = 0; k < kHidden; k++) hh1[to * kHidden + k] += row1[kFeatures + k];
      for (int lane = 0; lane < kWidth; lane++) b1[to] += bias1[from * kWidth + lane];
      for (int k = 0; k < kHidden; k++) ih2[to * kHidden + k] += row2[k];
      for (int k = 0; k < kHidden; k++) hh2[to * kHidden + k] += row2[kHidden + k];
      for (int lane = 0; lane < kWidth; lane++) b2[to] += bias2[from * kWidth + lane];
    }
    for (int lane = 0; lane < kWidth; lane++) out[u] += output[u * kWidth + lane];
  }
  for (int lane = 0; lane < kWidth; lane++) out[kHidden] += output_bias[lane];
}

// Peak -------------------------------------------------------------------------------------------

// Independent chains of fused multiply-adds, more than latency times throughput of any core; returns the operations.
double fma_chains(int64_t iterations) {
  constexpr int kChains = kWidth == 16 ? 16 : 12;  // as many as registers hold and L2L_FOR unrolls
  const Vec factor = pinned(0.999999f), term = pinned(1e-6f);
  Vec chains[kChains];
  for (Vec& chain : chains) chain = factor;
  for (int64_t k = 0; k < iterations; k++) {
    L2L_FOR (j, kChains) chains[j] = fma(chains[j], factor, term);
  }
  Vec sum = {};
  for (const Vec& chain : chains) sum += chain;
  alignas(64) float sink[kWidth];
  store(sink, sum);
  asm volatile("" : : "r"(sink) : "memory");
  return 2.0 * kChains * kWidth * static_cast<double>(iterations);
}

constexpr Kernels make_kernels(const char* name) {
  return {name, kPass, kSums, step, forward, scratch_floats, backward, collect, fma_chains};
}

}  // namespace
}  // namespace l2l
