#include "kernels.inl"

namespace l2l {
const Kernels kAvx2Kernels = make_kernels("avx2");
}
