#include "kernels.inl"

namespace l2l {
const Kernels kBaselineKernels = make_kernels("baseline");
}
