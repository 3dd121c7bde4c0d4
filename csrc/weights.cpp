// From the public flat layout of the weights to the one that the kernels read.
#include "weights.h"

#include <cmath>
#include <cstring>

namespace l2l {

void pack_weights(const float* flat, int features, double log_p, double output_scale, Weights& packed) {
  constexpr double kLog2E = 1.44269504088896340736;
  constexpr double kGateScale[kGates] = {-kLog2E, -kLog2E, -2 * kLog2E, -kLog2E};
  std::memset(&packed, 0, sizeof(packed));
  const float* ih1 = flat;
  const float* hh1 = ih1 + kRows * features;
  const float* b1 = hh1 + kRows * kHidden;
  const float* ih2 = b1 + kRows;
  const float* hh2 = ih2 + kRows * kHidden;
  const float* b2 = hh2 + kRows * kHidden;
  const float* output = b2 + kRows;

  for (int u = 0; u < kHidden; u++)
    for (int gate = 0; gate < kGates; gate++) {
      const int row = gate * kHidden + u, to = u * kGates + gate;
      const double scale = kGateScale[gate];
      const auto scaled = [scale](float weight) { return static_cast<float>(scale * weight); };
      packed.forward1[u][0][gate] = scaled(b1[row]);
      packed.forward2[u][0][gate] = scaled(b2[row]);
      for (int k = 0; k < features; k++) {
        packed.forward1[u][1 + k][gate] = scaled(ih1[row * features + k]);
        packed.features1[to][k] = ih1[row * features + k];
      }
      for (int k = 0; k < kHidden; k++) {
        packed.forward1[u][1 + kFeatures + k][gate] = scaled(hh1[row * kHidden + k]);
        packed.forward2[u][1 + k][gate] = scaled(ih2[row * kHidden + k]);
        packed.forward2[u][1 + kHidden + k][gate] = scaled(hh2[row * kHidden + k]);
        packed.backward1[k / 4][to][k % 4] = hh1[row * kHidden + k];
        packed.backward2[k / 4][to][k % 4] = ih2[row * kHidden + k];
        packed.backward2[(kHidden + k) / 4][to][k % 4] = hh2[row * kHidden + k];
      }
    }
  std::memcpy(packed.output, output, sizeof(packed.output));
  packed.output_bias = output[kHidden];
  packed.output_scale = static_cast<float>(output_scale);
  packed.log_p = static_cast<float>(log_p);
  packed.threshold = static_cast<float>(std::exp(-log_p));
  packed.inverse_p = log_p == 0 ? 0.0f : static_cast<float>(1 / log_p);
  packed.slope = static_cast<float>(std::exp(log_p));
}

}  // namespace l2l
