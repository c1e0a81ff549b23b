// Which instruction set runs, and over how many threads.
#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "rows.h"

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

// Threads of our own, made for the call: no second OpenMP pool beside torch's, and nothing left
// over for a fork to lose. Starting one costs some 20 us; a call that is worth one takes
// milliseconds.
template <class Row>
void for_each_row(int64_t rows, int64_t vocab, int threads, Row&& run) {
  constexpr int64_t kWorthAThread = 1 << 18;  // logits
  const int64_t useful = rows * vocab / kWorthAThread + 1;
  const int64_t count = std::min<int64_t>({threads, useful, rows});
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t row; (row = next.fetch_add(1, std::memory_order_relaxed)) < rows;) run(row);
  };
  std::vector<std::thread> helpers;
  try {
    for (int64_t i = 1; i < count; ++i) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // no more threads to be had: those that run do the work
  }
  work();
  for (std::thread& helper : helpers) helper.join();
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
  const RowKernels& kernels = *chosen().load()->kernels;
  for_each_row(args.shape.rows, args.shape.vocab, threads,
               [&](int64_t row) { kernels.fused(args, row); });
}

void cpu_stats(const StatsArgs& args, int threads) {
  const RowKernels& kernels = *chosen().load()->kernels;
  for_each_row(args.shape.rows, args.shape.vocab, threads,
               [&](int64_t row) { kernels.stats(args, row); });
}

void cpu_gradient(const GradientArgs& args, int threads) {
  const RowKernels& kernels = *chosen().load()->kernels;
  for_each_row(args.shape.rows, args.shape.vocab, threads,
               [&](int64_t row) { kernels.gradient(args, row); });
}

}  // namespace dcpo
