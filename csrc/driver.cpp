#include "driver.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <new>
#include <stdexcept>

#include "subnormals.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace l2l {
namespace {

// A thread is worth waking for this many tiles of forward work (about 20 microseconds).
constexpr int64_t kTilesPerThread = 8;
// The backward's partial sums: enough of them for many cores, few enough that their memory is small.
// Their number depends on the size alone, so that the result does not depend on the threads.
constexpr int64_t kMaxChunks = 64;
constexpr int64_t kMinChunkTiles = 4;

bool runs_here(const Kernels& k) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#ifdef L2L_HAVE_AVX512
  if (&k == &kAvx512Kernels)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") &&
           __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
#ifdef L2L_HAVE_AVX2
  if (&k == &kAvx2Kernels)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
#endif
  return &k == &kBaselineKernels;
}

std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> result = {&kBaselineKernels};
#ifdef L2L_HAVE_AVX2
  result.push_back(&kAvx2Kernels);
#endif
#ifdef L2L_HAVE_AVX512
  result.push_back(&kAvx512Kernels);
#endif
  result.erase(std::remove_if(result.begin(), result.end(), [](const Kernels* k) { return !runs_here(*k); }),
               result.end());
  return result;
}

std::atomic<const Kernels*>& selected() {
  static std::atomic<const Kernels*> current{usable().back()};
  return current;
}

int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }

int threads_for(int64_t tiles, int threads) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tiles / kTilesPerThread)));
}

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
template <typename T>
std::unique_ptr<T[], AlignedDelete> aligned(size_t count) {
  return std::unique_ptr<T[], AlignedDelete>(
      static_cast<T*>(::operator new[](count * sizeof(T), std::align_val_t(64))));
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* k : usable()) names.emplace_back(k->name);
  return names;
}

const Kernels& kernels() { return *selected(); }

void use_instruction_set(const std::string& name) {
  for (const Kernels* k : usable())
    if (name == k->name) {
      selected() = k;
      return;
    }
  std::string known;
  for (const std::string& n : instruction_sets()) known += (known.empty() ? "" : ", ") + n;
  throw std::invalid_argument("instruction set '" + name + "' can't be used here; usable: " + known);
}

double fma_peak(int64_t iterations) {
  const auto start = std::chrono::steady_clock::now();
  const double operations = kernels().fma_chains(iterations);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return operations / seconds.count();
}

void step(const StepArgs& args, int64_t count, int threads) {
  if (count == 0) return;
  const Kernels& k = kernels();
  const StepTensor* last = args.tensors + count - 1;
  const int64_t tiles = last->first_tile + tiles_of(last->size);
  const int64_t parts = threads_for(tiles, threads);
  [[maybe_unused]] const int workers = static_cast<int>(parts);
#pragma omp parallel for num_threads(workers) schedule(static) if (workers > 1)
  for (int64_t part = 0; part < parts; part++) {
    const SubnormalsAreZero here;
    const int64_t begin = tiles * part / parts, end = tiles * (part + 1) / parts;
    const StepTensor* tensor = std::upper_bound(args.tensors, args.tensors + count, begin,
                                                [](int64_t tile, const StepTensor& t) { return tile < t.first_tile; });
    k.step(args, tensor - args.tensors - 1, begin, end);
  }
}

void forward(const ForwardArgs& args, int threads) {
  const Kernels& k = kernels();
  const int64_t tiles = tiles_of(args.n);
  const int64_t parts = threads_for(tiles, threads);
  [[maybe_unused]] const int workers = static_cast<int>(parts);
#pragma omp parallel for num_threads(workers) schedule(static) if (workers > 1)
  for (int64_t part = 0; part < parts; part++) {
    const SubnormalsAreZero here;
    k.forward(args, tiles * part / parts, tiles * (part + 1) / parts);
  }
}

void backward(const BackwardArgs& args, int features, float* d_weights, int threads) {
  const Kernels& k = kernels();
  const int64_t tiles = tiles_of(args.n);
  const int64_t pass_tiles = k.coordinates / kTile;
  int64_t chunk = std::max(kMinChunkTiles, (tiles + kMaxChunks - 1) / kMaxChunks);
  chunk = (chunk + pass_tiles - 1) / pass_tiles * pass_tiles;
  const int64_t chunks = (tiles + chunk - 1) / chunk;
  const int workers = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, chunks)));

  std::vector<double> sums(static_cast<size_t>(chunks) * k.sums, 0.0);
  const size_t scratch_size = k.scratch_floats(args.steps);
  const auto scratch = aligned<float>(scratch_size * static_cast<size_t>(workers));
#pragma omp parallel num_threads(workers) if (workers > 1)
  {
    const SubnormalsAreZero here;
    // The first idle worker takes the next chunk; which one does changes no bit of the result.
    int worker = 0;
#ifdef _OPENMP
    worker = omp_get_thread_num();
#endif
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < chunks; i++)
      k.backward(args, i * chunk, std::min(tiles, (i + 1) * chunk), scratch.get() + scratch_size * worker,
                 sums.data() + static_cast<size_t>(i) * k.sums);
  }

  const SubnormalsAreZero here;
  std::vector<double> total(k.sums, 0.0), flat(kFlat, 0.0);
  for (int64_t i = 0; i < chunks; i++)
    for (size_t j = 0; j < k.sums; j++) total[j] += sums[static_cast<size_t>(i) * k.sums + j];
  k.collect(total.data(), flat.data());
  float* out = d_weights;
  for (int row = 0; row < kRows; row++)
    for (int f = 0; f < features; f++) *out++ = static_cast<float>(flat[row * kFeatures + f]);
  for (int i = kRows * kFeatures; i < kFlat; i++) *out++ = static_cast<float>(flat[i]);
}

}  // namespace l2l
