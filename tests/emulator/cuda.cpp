// The scheduler behind cuda_runtime.h.
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>

#include "cuda/hopper.cuh"
#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__) && !defined(DCPO_EMU_THREADS)
#include <ucontext.h>
#endif

namespace emu {
namespace {

struct Random {
  uint64_t state;
  uint64_t next() {  // xorshift64*
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545f4914f6cdd1dull;
  }
};

uint64_t mixed(uint64_t seed) { return (seed + 1) * 0x9e3779b97f4a7c15ull | 1; }

Dim block_dim_, grid_dim_;

}  // namespace

Settings& settings() {
  static Settings s;
  return s;
}
const Dim& block_dim() { return block_dim_; }
const Dim& grid_dim() { return grid_dim_; }

unsigned Barrier::arrive(bool orders_memory) {
  const unsigned generation = generation_.load(std::memory_order_relaxed);
  const auto order = orders_memory ? std::memory_order_acq_rel : std::memory_order_relaxed;
  if (arrived_.fetch_add(1, order) + 1 == expected_) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.fetch_add(1, order);
  }
  return generation;
}

void Barrier::wait(unsigned generation, bool orders_memory, const char* what) {
  const auto order = orders_memory ? std::memory_order_acquire : std::memory_order_relaxed;
  wait_until([&] { return generation_.load(order) != generation; }, what);
}

#if defined(DCPO_EMU_THREADS)

// ---- a thread of the system for each CUDA thread ------------------------------------------------

namespace {
thread_local Thread* self_;
thread_local Random random_{1};
}  // namespace

Thread& self() { return *self_; }
bool coin() { return random_.next() >> 63; }

void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel: %s\n", what);
  std::abort();
}

void wait_until(const std::function<bool()>& ready, const char*) {
  while (!ready()) std::this_thread::yield();
}

namespace {
void run_cluster(std::vector<Thread>& threads, const std::function<void()>& kernel) {
  std::vector<std::thread> running;
  for (size_t i = 0; i < threads.size(); ++i) {
    running.emplace_back([&, i] {
      self_ = &threads[i];
      random_ = {mixed(settings().seed * 1000003 + i)};
      kernel();
    });
  }
  for (std::thread& thread : running) thread.join();
}
}  // namespace

#else

// ---- a fiber for each CUDA thread ---------------------------------------------------------------

namespace {

constexpr size_t kStackBytes = 256 << 10;

struct Fiber {
  Thread* thread = nullptr;
  std::unique_ptr<unsigned char[]> stack;
  void* context = nullptr;  // where it stopped
  bool done = false;
  const char* waits_for = "";
#if !defined(__x86_64__)
  ucontext_t saved;
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// Stacks are used again by the next launch: making thousands of them takes longer than a kernel.
std::vector<Fiber> fibers;
Fiber* current = nullptr;
const std::function<void()>* running_kernel = nullptr;
Random random_{1};
uint64_t progress = 0;
std::string failure;

void* scheduler_context = nullptr;
#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
#endif

#if defined(__x86_64__)
extern "C" void dcpo_emu_switch(void** from, void* to);
asm(R"(
.text
.type dcpo_emu_switch, @function
dcpo_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dcpo_emu_switch, .-dcpo_emu_switch
)");
#else
ucontext_t scheduler_saved;
#endif

void to_fiber(Fiber& fiber) {
  current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack.get(), kStackBytes);
#endif
#if defined(__x86_64__)
  dcpo_emu_switch(&scheduler_context, fiber.context);
#else
  swapcontext(&scheduler_saved, &fiber.saved);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void to_scheduler() {
  Fiber& fiber = *current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.fake_stack, scheduler_stack,
                                 scheduler_stack_bytes);
#endif
#if defined(__x86_64__)
  dcpo_emu_switch(&fiber.context, scheduler_context);
#else
  swapcontext(&fiber.saved, &scheduler_saved);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

extern "C" void dcpo_emu_enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  (*running_kernel)();
  current->done = true;
  ++progress;
  to_scheduler();
  std::abort();  // a fiber that is done is not run again
}

void start(Fiber& fiber, Thread& thread) {
  fiber.thread = &thread;
  fiber.done = false;
  fiber.fake_stack = nullptr;
  if (!fiber.stack) fiber.stack.reset(new unsigned char[kStackBytes]);
#if defined(__x86_64__)
  // What dcpo_emu_switch pops: six registers and an address; then the stack is as after a call.
  uintptr_t top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackBytes) & ~uintptr_t{15};
  void** p = reinterpret_cast<void**>(top) - 8;
  std::fill(p, p + 8, nullptr);
  p[6] = reinterpret_cast<void*>(&dcpo_emu_enter);
  fiber.context = p;
#else
  getcontext(&fiber.saved);
  fiber.saved.uc_stack.ss_sp = fiber.stack.get();
  fiber.saved.uc_stack.ss_size = kStackBytes;
  fiber.saved.uc_link = nullptr;
  makecontext(&fiber.saved, dcpo_emu_enter, 0);
#endif
}

void run_cluster(std::vector<Thread>& threads, const std::function<void()>& kernel) {
  running_kernel = &kernel;
  if (fibers.size() < threads.size()) fibers.resize(threads.size());
  for (size_t i = 0; i < threads.size(); ++i) start(fibers[i], threads[i]);

  const size_t warps = threads.size() / 32;
  std::vector<size_t> order(warps), lanes(32);
  for (size_t i = 0; i < warps; ++i) order[i] = i;
  for (size_t i = 0; i < 32; ++i) lanes[i] = i;
  std::vector<uint32_t> patience(warps);  // of 256: how often a warp gets to run
  for (uint32_t& p : patience) p = 32 + random_.next() % 225;
  auto shuffle = [](std::vector<size_t>& list) {
    for (size_t i = list.size(); i > 1; --i) std::swap(list[i - 1], list[random_.next() % i]);
  };

  for (size_t left = threads.size(); left > 0;) {
    const uint64_t before = progress;
    shuffle(order);
    shuffle(lanes);
    // A first round of some warps, and where that moved nothing one of all.
    for (bool all : {false, true}) {
      for (size_t warp : order) {
        if (!all && random_.next() % 256 >= patience[warp]) continue;
        for (size_t lane : lanes) {
          Fiber& fiber = fibers[warp * 32 + lane];
          if (fiber.done) continue;
          to_fiber(fiber);
          if (fiber.done) --left;
          if (!failure.empty()) throw std::runtime_error("emulated kernel: " + failure);
        }
      }
      if (progress != before) break;
    }
    if (progress == before) {
      std::string where;
      for (size_t i = 0; i < threads.size(); ++i) {
        const std::string wait = fibers[i].waits_for;
        if (!fibers[i].done && where.find(wait) == std::string::npos) where += " " + wait + ",";
      }
      throw std::runtime_error("emulated kernel: deadlock; threads wait for" + where +
                               " and nothing moves");
    }
  }
}

}  // namespace

Thread& self() { return *current->thread; }
bool coin() { return random_.next() >> 63; }

void fail(const char* what) {
  failure = what;
  to_scheduler();
  std::abort();
}

void wait_until(const std::function<bool()>& ready, const char* what) {
  current->waits_for = what;
  while (!ready()) to_scheduler();
  ++progress;
}

#endif  // DCPO_EMU_THREADS

void launch(const Grid& grid, const std::function<void()>& kernel) {
  const int64_t size = std::max(grid.cluster, 1);
  if (grid.threads % 32 != 0 || grid.threads > 1024 || grid.blocks % size != 0 || grid.blocks < 1 ||
      grid.blocks > 0x7fffffff || size > 8 || grid.shared_bytes > settings().shared_bytes)
    throw std::runtime_error("emulated launch: invalid configuration");
  block_dim_ = {static_cast<unsigned>(grid.threads)};
  grid_dim_ = {static_cast<unsigned>(grid.blocks)};
#if !defined(DCPO_EMU_THREADS)
  random_ = {mixed(settings().seed)};
  failure.clear();
#endif
  // Ends where the shared memory ends, so that AddressSanitizer sees a step beyond it.
  const size_t words = (grid.shared_bytes + 15) / 16;
  for (int64_t first = 0; first < grid.blocks; first += size) {
    Cluster cluster;
    cluster.blocks = std::vector<Block>(size);
    cluster.barrier.expect(static_cast<int>(size) * grid.threads);
    std::vector<std::unique_ptr<float4[]>> shared(size);
    std::vector<Thread> threads(size * grid.threads);
    for (int64_t b = 0; b < size; ++b) {
      Block& block = cluster.blocks[b];
      shared[b].reset(new float4[words]);
      block.shared = reinterpret_cast<unsigned char*>(shared[b].get());
      std::memset(block.shared, 0xff, words * 16);  // NaN in every format
      block.rank = static_cast<unsigned>(b);
      block.barrier.expect(grid.threads);
      block.warps = std::vector<Warp>(grid.threads / 32);
      for (Warp& warp : block.warps) warp.barrier.expect(32);
      for (int i = 0; i < grid.threads; ++i) {
        Thread& thread = threads[b * grid.threads + i];
        thread.thread_index = {static_cast<unsigned>(i), 0, 0};
        thread.block_index = {static_cast<unsigned>(first + b), 0, 0};
        thread.cluster = &cluster;
        thread.block = &block;
        thread.warp = &block.warps[i / 32];
        thread.lane = i % 32;
      }
    }
    hopper::start_cluster();
    run_cluster(threads, kernel);
    hopper::finish_cluster();
  }
}

}  // namespace emu
