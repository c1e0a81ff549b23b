// Which instruction set runs, and over how many threads.
#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <functional>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "dispatch.h"
#include "row.h"

namespace dcpo {
namespace {

struct Isa {
  const char* name;
  const RowKernels* kernels;
};

std::vector<Isa> available() {
  std::vector<Isa> isas;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    isas.push_back({"avx512", &kRowKernelsAvx512});
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    isas.push_back({"avx2", &kRowKernelsAvx2});
#endif
  isas.push_back({"portable", &kRowKernelsPortable});
  return isas;
}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> list = available();
  return list;
}

std::atomic<const Isa*>& chosen() {
  static std::atomic<const Isa*> isa{&isas().front()};
  return isa;
}

// The OpenMP pool that torch runs on, found by name: this module links none, and a second pool
// would compete for the cores with the first, whose threads spin for milliseconds after each
// operator of torch.
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

#if defined(_WIN32)
Parallel torch_pool() { return nullptr; }
#else
// A pool does not survive a fork: a child would wait for threads that it does not have. Known from
// the import on, as torch may have started its pool before our first call.
std::atomic<bool> forked{false};
const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });

Parallel torch_pool() {
  static const auto pool = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return forked ? nullptr : pool;
}
#endif

// Calls work() in `threads` threads, this one among them; where there is no pool, in threads of our
// own, made for the call.
template <class Work>
void in_parallel(int threads, Work& work) {
  if (threads <= 1) return work();
  if (const Parallel pool = torch_pool())
    return pool([](void* data) { (*static_cast<Work*>(data))(); }, &work, threads, 0);
  std::vector<std::thread> helpers;
  try {
    for (int i = 1; i < threads; ++i) helpers.emplace_back(std::ref(work));
  } catch (const std::system_error&) {
    // no more threads to be had: those that run do the work
  }
  work();
  for (std::thread& helper : helpers) helper.join();
}

// A gradient in memory of its own comes fresh from the system, a page fault every 4 KiB; large
// pages take a third of the time. Advice: nothing depends on it.
void prefer_large_pages(const View& gradient, const Batch& batch) {
#if defined(MADV_HUGEPAGE)
  if (gradient.data == nullptr || gradient.data == batch.logits.data) return;
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t data = reinterpret_cast<uintptr_t>(gradient.data);
  const uintptr_t begin = (data + kPage - 1) / kPage * kPage;
  const uintptr_t end = (data + batch.rows * batch.vocab * size_of(batch.dtype)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Every row through one kernel of the chosen instruction set.
template <class Args>
void for_each_row(const Args& args, int threads,
                  void (*RowKernels::*kernel)(const Args&, int64_t)) {
  constexpr int64_t kWorthAThread = 1 << 18;  // logits
  const int64_t useful = args.rows * args.vocab / kWorthAThread + 1;
  const auto run = chosen().load()->kernels->*kernel;
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t row; (row = next.fetch_add(1, std::memory_order_relaxed)) < args.rows;)
      run(args, row);
  };
  in_parallel(static_cast<int>(std::min<int64_t>({threads, useful, args.rows})), work);
}

}  // namespace

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.push_back(isa.name);
  return names;
}

std::string cpu_isa() { return chosen().load()->name; }

void cpu_use_isa(const std::string& name) {
  std::string names;
  for (const Isa& isa : isas()) {
    if (isa.name == name) {
      chosen() = &isa;
      return;
    }
    names += std::string(names.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument("instruction set '" + name + "' is not available here; there is " +
                              names);
}

void cpu_fused(const FusedArgs& args, int threads) {
  prefer_large_pages(args.gradient, args);
  for_each_row(args, threads, &RowKernels::fused);
}

void cpu_stats(const StatsArgs& args, int threads) {
  for_each_row(args, threads, &RowKernels::stats);
}

void cpu_gradient(const GradientArgs& args, int threads) {
  prefer_large_pages(args.gradient, args);
  for_each_row(args, threads, &RowKernels::gradient);
}

void cpu_multiply(const MultiplyArgs& args, int threads) {
  if (*args.factor != 1.0f) for_each_row(args, threads, &RowKernels::multiply);
}

}  // namespace dcpo
