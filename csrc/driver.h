// Whole calls: the choice of instruction set, work split over threads, scratch memory, reductions.
#pragma once

#include <string>
#include <vector>

#include "core.h"

namespace l2l {

// Names of the instruction sets that this build has and this processor runs, fastest last.
std::vector<std::string> instruction_sets();
// The kernels in use.
const Kernels& kernels();
// Throws std::invalid_argument if `name` is not one of instruction_sets().
void use_instruction_set(const std::string& name);

// Operations per second of one thread in multiply-adds alone.
double fma_peak(int64_t iterations);

void step(const StepArgs& args, int64_t count, int threads);
void forward(const ForwardArgs& args, int threads);
// Writes the flat weight gradient, with `features` columns in its first block. The result does not
// depend on the number of threads.
void backward(const BackwardArgs& args, int features, float* d_weights, int threads);

}  // namespace l2l
