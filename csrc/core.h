// What the driver and the per-instruction-set kernels agree on: sizes, argument structs, function table.
//
// This header is seen by translation units with different instruction-set flags, so it holds plain
// data only: an inline function here could be merged by the linker into the wrong instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace l2l {

constexpr int kHidden = 20;         // units per layer
constexpr int kGates = 4;           // i, f, g, o, as in torch.nn.LSTMCell
constexpr int kRows = 4 * kHidden;  // state of a coordinate: h1, c1, h2, c2; also gates of a layer
constexpr int kFeatures = 2;        // the identity leaves the second one zero
constexpr int kTile = 16;           // coordinates per tile of a packed state [tiles][kRows][kTile]
constexpr int kTileSize = kRows * kTile;

// Columns of the input matrices whose product with the gate gradients is a weight gradient.
constexpr int kColumns1 = 24;  // layer 1: features, h1 before, padding
constexpr int kColumns2 = 40;  // layer 2: h1, h2 before

enum class Dtype : int { f32 = 0, f16 = 1, bf16 = 2, i8 = 3 };  // i8 of states only

// Weights as the kernels read them. Forward blocks are [unit][bias, inputs...][gate], scaled so that
// the sum is directly the exponent of 2 in the activations; backward blocks are unscaled and
// [input / 4][unit * 4 + gate][input % 4].
struct Weights {
  alignas(64) float forward1[kHidden][1 + kFeatures + kHidden][kGates];
  alignas(64) float forward2[kHidden][1 + 2 * kHidden][kGates];
  alignas(64) float backward1[kHidden / 4][kRows][4];
  alignas(64) float backward2[2 * kHidden / 4][kRows][4];
  alignas(64) float features1[kRows][kFeatures];
  alignas(64) float output[kHidden];
  float output_bias;
  float output_scale;
  // Preprocessing; log_p == 0 is the identity.
  float log_p;
  float threshold;  // exp(-log_p)
  float inverse_p;  // 1 / log_p
  float slope;      // exp(log_p)
};

struct StepTensor {
  void* param;
  const void* grad;
  void* state;  // [ceil(size / kTile)][kRows][kTile]; int8.inl has the form in 8 bits
  int64_t size;
  int64_t first_tile;  // in the numbering that runs through all tensors
};

struct StepArgs {
  const Weights* weights;
  const StepTensor* tensors;  // without empty ones
  Dtype dtype;                // of parameters and gradients
  Dtype state_dtype;
  float lr;
  float decay;      // 1 - lr * weight_decay
  float grad_sign;  // -1 to maximise
  bool skip_nonfinite;
};

// One differentiable step, out of place; states are coordinate-major [n][kRows].
struct ForwardArgs {
  const Weights* weights;
  int64_t n;
  const float* grad;
  const float* state;
  float* update;
  float* new_state;
};

// Backward of `steps` consecutive steps. The derivative by the update of step t is
// sum_{s >= t} loss_weights[s] * terms[s][.]; that of the last state is d_last_state or zero.
struct BackwardArgs {
  const Weights* weights;
  int64_t n;
  int64_t steps;
  const float* grads;         // [steps][n], what the rule saw
  const float* terms;         // [steps][n]
  const float* loss_weights;  // [steps]
  const float* state;         // [n][kRows] before the first step, or null for zeros
  const float* d_last_state;  // [n][kRows] or null for zeros
  float* d_grads;             // [steps][n] or null
  float* d_state;             // [n][kRows] or null
};

struct Kernels {
  const char* name;
  int coordinates;  // worked on together: a multiple of kTile
  size_t sums;      // doubles of weight gradients that `backward` adds into
  // All ranges are of tiles.
  void (*step)(const StepArgs&, int64_t tensor, int64_t begin, int64_t end);
  void (*forward)(const ForwardArgs&, int64_t begin, int64_t end);
  size_t (*scratch_floats)(int64_t steps);
  void (*backward)(const BackwardArgs&, int64_t begin, int64_t end, float* scratch, double* sums);
  // Adds `sums` to a flat weight gradient (two feature columns) in the public order.
  void (*collect)(const double* sums, double* d_weights);
  double (*fma_chains)(int64_t iterations);  // nothing but multiply-adds; returns how many operations
};

// Flat gradient with two feature columns, in the order of RuleSpec.weight_shapes.
constexpr int kFlat = kRows * kFeatures + kRows * kHidden + kRows + 2 * kRows * kHidden + kRows + kHidden + 1;

extern const Kernels kBaselineKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

}  // namespace l2l
