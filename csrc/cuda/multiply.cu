// The finished gradient times the upstream gradient, which is read where it lies: no host sync, and
// nothing else is read where it is 1.
#include <algorithm>

#include "cuda/rows.cuh"
#include "cuda/rows.h"
#include "cuda/runtime.h"

namespace dcpo {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPiece = kThreads * 8;  // packs of a row that one block takes

template <class T>
__global__ void __launch_bounds__(kThreads)
    multiply_kernel(const MultiplyArgs a, const int64_t pieces) {
  const float factor = *a.factor;
  if (factor == 1.0f) return;
  for (int64_t item = blockIdx.x; item < a.rows * pieces; item += gridDim.x) {
    T* x = row_of<T>(a.x, item / pieces);
    const Span<T> span(x, a.vocab);
    const int64_t begin = item % pieces * kPiece;
    const int64_t end = begin + kPiece < span.packs ? begin + kPiece : span.packs;
    uint4* packs = reinterpret_cast<uint4*>(x + span.head);
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      float values[kPack<T>];
      widen<T>(packs[i], values);
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) values[k] *= factor;
      packs[i] = narrow<T>(values);
    }
    const int64_t edge = begin == 0 ? span.edge(threadIdx.x) : -1;
    if (edge >= 0) narrow(widen(x[edge]) * factor, x[edge]);
  }
}

template <class T>
void launch(const MultiplyArgs& args, int device, uintptr_t stream) {
  static PerDevice<int> multiprocessors;
  const int64_t most =
      8 * multiprocessors.get(device, nullptr, 0, [&] { return limits(device).multiprocessors; });
  const int64_t pieces = (args.vocab / kPack<T> + kPiece) / kPiece;
  const Grid grid{std::min(args.rows * pieces, most), kThreads, 0, 0};
  Launcher(grid, stream).run("multiply", multiply_kernel<T>, args, pieces);
}

}  // namespace

void cuda_multiply(const MultiplyArgs& args, int device, uintptr_t stream) {
  if (args.rows == 0 || args.vocab == 0) return;
  DeviceGuard guard(device);
  with_dtype(args.dtype, [&](auto t) { launch<decltype(t)>(args, device, stream); });
}

void load_multiply() {
  each_dtype([](auto t) { load(multiply_kernel<decltype(t)>); });
}

}  // namespace dcpo
