#include "kernels.inl"

namespace l2l {
const Kernels kAvx512Kernels = make_kernels("avx512");
}
