#pragma once

#include "core.h"

namespace l2l {

// `flat` is laid out as RuleSpec.weight_shapes says, with `features` columns in its first block.
// `log_p` is p of LogAndSign, or 0 for the identity.
void pack_weights(const float* flat, int features, double log_p, double output_scale, Weights& packed);

}  // namespace l2l
