// The copy engine behind cuda/hopper.cuh.
#include "cuda/hopper.cuh"

#include <map>
#include <mutex>
#include <stdexcept>

namespace {

// Under ThreadSanitizer the engine's own books neither order memory nor count as accesses.
#if defined(__SANITIZE_THREAD__)
extern "C" {
void AnnotateIgnoreSyncBegin(const char*, int);
void AnnotateIgnoreSyncEnd(const char*, int);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif
std::mutex books_mutex;

struct Books {
  Books() {
#if defined(__SANITIZE_THREAD__)
    AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
    books_mutex.lock();
  }
  ~Books() {
    books_mutex.unlock();
#if defined(__SANITIZE_THREAD__)
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
#endif
  }
};

// An mbarrier in its 8 bytes, from the low bit: phase, arrivals still to come, arrivals of a phase,
// bytes still to come (signed: they may land before they are expected).
struct State {
  uint64_t phase : 1, pending : 15, arrivals : 16;
  int64_t bytes : 32;
};
static_assert(sizeof(State) == 8);

State unpack(uint64_t bits) {
  State s;
  std::memcpy(&s, &bits, sizeof s);
  return s;
}
uint64_t pack(State s) {
  uint64_t bits;
  std::memcpy(&bits, &s, sizeof bits);
  return bits;
}

constexpr int64_t kMostBytes = (1 << 20) - 1;  // that a phase may wait for

void update(uint64_t* barrier, int arrivals, int64_t bytes) {
  uint64_t old = __atomic_load_n(barrier, __ATOMIC_RELAXED), wanted;
  do {
    State s = unpack(old);
    if (static_cast<int>(s.pending) < arrivals)
      emu::fail("more threads arrive at an mbarrier than it was made for, or it was never made");
    s.pending -= arrivals;
    s.bytes += bytes;
    if (s.bytes > kMostBytes) emu::fail("more bytes are expected than an mbarrier can count");
    if (s.pending == 0 && s.bytes == 0) {
      s.phase ^= 1;
      s.pending = s.arrivals;
    }
    wanted = pack(s);
  } while (!__atomic_compare_exchange_n(barrier, &old, wanted, false, __ATOMIC_ACQ_REL,
                                        __ATOMIC_RELAXED));
}

// Sixteen bytes that a peer sent, or a bulk load.
struct Landing {
  void* to;
  const void* from;  // null: `value`
  float4 value;
  uint32_t bytes;
};
std::map<uint64_t*, std::vector<Landing>> in_flight;

void land(const Landing& copy, uint64_t* barrier) {
  std::memcpy(copy.to, copy.from ? copy.from : &copy.value, copy.bytes);
  update(barrier, 0, -static_cast<int64_t>(copy.bytes));
}

void land_all(uint64_t* barrier) {
  std::vector<Landing> copies;
  {
    Books books;
    const auto found = in_flight.find(barrier);
    if (found != in_flight.end()) copies.swap(found->second);
  }
  if (copies.empty()) return;
  update(barrier, 0, 0);  // acquires what was released when the copies were issued
  for (const Landing& copy : copies) land(copy, barrier);
}

void issue(const Landing& copy, uint64_t* barrier) {
  if (emu::coin()) return land(copy, barrier);
  update(barrier, 0, 0);  // releases
  Books books;
  in_flight[barrier].push_back(copy);
}

void check_copy(const void* global, const void* shared, uint32_t bytes) {
  const uintptr_t both = reinterpret_cast<uintptr_t>(global) | reinterpret_cast<uintptr_t>(shared);
  if (both % 16 != 0) emu::fail("a bulk copy of an address that is not a multiple of 16");
  if (bytes % 16 != 0 || bytes == 0)
    emu::fail("a bulk copy of a size that is not a multiple of 16");
}

}  // namespace

namespace dcpo::hopper {

void init(uint64_t* barrier, uint32_t arrivals) {
  State s{};
  s.pending = s.arrivals = arrivals;
  *barrier = pack(s);
  emu::self().unfenced = true;
}

void fence_init() { emu::self().unfenced = false; }

void arrive_expect(uint64_t* barrier, uint32_t bytes) { update(barrier, 1, bytes); }

void wait(uint64_t* barrier, uint32_t parity) {
  emu::wait_until(
      [&] {
        auto ended = [&] {
          return unpack(__atomic_load_n(barrier, __ATOMIC_ACQUIRE)).phase != parity;
        };
        if (ended()) return true;
        land_all(barrier);
        return ended();
      },
      "an mbarrier");
}

void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  check_copy(global, shared, bytes);
  issue({shared, global, {}, bytes}, barrier);
}

void cluster_arrive() {
  emu::Thread& t = emu::self();
  if (t.unfenced) emu::fail("mbarriers that were not fenced are announced to the cluster");
  t.arrived = t.cluster->barrier.arrive(true);
}

void cluster_wait() {
  emu::Thread& t = emu::self();
  t.cluster->barrier.wait(t.arrived, true, "the cluster's barrier");
}

void send(float4* slot, float4 value, uint64_t* barrier, uint32_t rank) {
  emu::Thread& t = emu::self();
  if (rank >= t.cluster->blocks.size()) emu::fail("a send to a block outside the cluster");
  unsigned char* peer = t.cluster->blocks[rank].shared;
  auto there = [&](void* mine) {
    return peer + (static_cast<unsigned char*>(mine) - t.block->shared);
  };
  issue({there(slot), nullptr, value, sizeof value}, reinterpret_cast<uint64_t*>(there(barrier)));
}

}  // namespace dcpo::hopper

namespace emu::hopper {

void start_cluster() { in_flight.clear(); }

void finish_cluster() {
  for (const auto& [barrier, copies] : in_flight)
    if (!copies.empty())
      throw std::runtime_error("emulated kernel: it ends while loads are under way");
}

}  // namespace emu::hopper
