// Subnormal numbers count as zero while the kernels run.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace l2l {

// While it lives, subnormal operands and results of this thread are zero, whatever the caller has set; then the
// caller's setting is back. Adjoints that die out over a run become subnormal, and some processors take a hundred
// times as long for those.
class SubnormalsAreZero {
 public:
  SubnormalsAreZero() : before_(read()) { write(before_ | kZero); }
  ~SubnormalsAreZero() { write(before_); }
  SubnormalsAreZero(const SubnormalsAreZero&) = delete;
  SubnormalsAreZero& operator=(const SubnormalsAreZero&) = delete;

 private:
#if defined(__SSE2__)
  static constexpr uint64_t kZero = 0x8040;  // MXCSR: results (15), operands (6)
  static uint64_t read() { return _mm_getcsr(); }
  static void write(uint64_t control) { _mm_setcsr(static_cast<unsigned>(control)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kZero = uint64_t{1} << 24;  // FPCR.FZ: both
  static uint64_t read() {
    uint64_t control;
    asm volatile("mrs %0, fpcr" : "=r"(control));
    return control;
  }
  static void write(uint64_t control) { asm volatile("msr fpcr, %0" ::"r"(control) : "memory"); }
#else
  static constexpr uint64_t kZero = 0;
  static uint64_t read() { return 0; }
  static void write(uint64_t) {}
#endif

  const uint64_t before_;
};

}  // namespace l2l
