// Random batches through the emulated CUDA kernels and the portable CPU kernels, compared. For
// sanitizers: every tensor ends where its memory ends, gaps between rows hold NaN and must keep it.
//
//   stress FIRST_SEED HOW_MANY [KIND]       KIND: one of kKinds
//
// A seed decides everything: shapes, layout, objective, kernel, and the order threads run in.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cuda/plan.h"
#include "cuda/rows.h"
#include "cuda_runtime.h"
#include "row.h"

using namespace dcpo;

namespace {

std::mt19937_64 draw;
int64_t pick(int64_t low, int64_t high) {
  return low + static_cast<int64_t>(draw() % static_cast<uint64_t>(high - low + 1));
}
template <class T, size_t n>
T pick(const T (&choices)[n]) {
  return choices[pick(0, n - 1)];
}
float normal() { return std::normal_distribution<float>()(draw); }

void put(DType dtype, void* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (dtype == kFloat32) std::memcpy(p, &bits, 4);
  if (dtype == kBFloat16) {
    const uint16_t high = static_cast<uint16_t>(bits >> 16);
    std::memcpy(p, &high, 2);
  }
  if (dtype == kFloat16) {
    const _Float16 half = static_cast<_Float16>(x);
    std::memcpy(p, &half, 2);
  }
}

float get(DType dtype, const void* p) {
  if (dtype == kFloat32) {
    float x;
    std::memcpy(&x, p, 4);
    return x;
  }
  if (dtype == kFloat16) {
    _Float16 half;
    std::memcpy(&half, p, 2);
    return static_cast<float>(half);
  }
  uint16_t high;
  std::memcpy(&high, p, 2);
  const uint32_t bits = static_cast<uint32_t>(high) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Rows in memory of their own: NaN in front of the first, between two, and nothing after the last.
struct Rows {
  DType dtype;
  int64_t rows, vocab, front, stride, elements;
  std::unique_ptr<unsigned char[]> memory;

  Rows(DType dtype, int64_t rows, int64_t vocab, int64_t front, int64_t gap)
      : dtype(dtype),
        rows(rows),
        vocab(vocab),
        front(front),
        stride(vocab + gap),
        elements(front + (rows - 1) * stride + vocab),
        memory(new unsigned char[elements * size_of(dtype)]) {
    std::memset(memory.get(), 0xff, elements * size_of(dtype));
  }
  Rows(const Rows& other) : Rows(other.dtype, other.rows, other.vocab, other.front, other.gap()) {
    std::memcpy(memory.get(), other.memory.get(), elements * size_of(dtype));
  }
  int64_t gap() const { return stride - vocab; }
  void* at(int64_t row, int64_t j) const {
    return memory.get() + (front + row * stride + j) * size_of(dtype);
  }
  View view() const { return {at(0, 0), rows, 0, stride}; }
  bool gaps_kept() const {
    for (int64_t i = 0; i < elements; ++i) {
      if (i >= front && (i - front) % stride < vocab) continue;
      for (size_t k = 0; k < static_cast<size_t>(size_of(dtype)); ++k)
        if (memory[i * size_of(dtype) + k] != 0xff) return false;
    }
    return true;
  }
};

struct Results {
  std::vector<float> loss, logprobs, entropy, ratio, row_max, log_sum;
  std::vector<int8_t> clipped, has_gradient;
  explicit Results(int64_t rows)
      : loss(rows, -7),
        logprobs(rows, -7),
        entropy(rows, -7),
        ratio(rows, -7),
        row_max(rows, -7),
        log_sum(rows, -7),
        clipped(rows, -7),
        has_gradient(rows, -7) {}
};

void complain(const char* what, int64_t row, int64_t j, float found, float wanted) {
  std::printf("%s of row %lld (%lld): %g, should be %g\n", what, static_cast<long long>(row),
              static_cast<long long>(j), found, wanted);
  throw std::runtime_error("wrong result");
}

void close(const char* what, int64_t row, int64_t j, float found, float wanted, float relative,
           float absolute) {
  if (std::isnan(found) && std::isnan(wanted)) return;
  if (found == wanted) return;  // infinities
  if (!(std::fabs(found - wanted) <= absolute + relative * std::fabs(wanted)))
    complain(what, row, j, found, wanted);
}

void close(const char* what, const std::vector<float>& found, const std::vector<float>& wanted) {
  for (size_t i = 0; i < found.size(); ++i) close(what, i, -1, found[i], wanted[i], 2e-5f, 2e-5f);
}

const char* const kKinds[] = {"resident", "streaming", "stats", "gradient", "multiply"};

void run(const std::string& kind, bool small) {
  const DType dtype = static_cast<DType>(pick(0, 2));
  const int64_t pack = 16 / static_cast<int64_t>(size_of(dtype));
  const int64_t rows = small ? pick(1, 3) : pick(1, 9);
  const bool resident = kind == "resident";

  int64_t vocab, front = 0, gap = 0;
  emu::Settings& gpu = emu::settings();
  gpu = emu::Settings();
  gpu.seed = draw();
  gpu.multiprocessors = static_cast<int>(pick(1, 9));
  int cluster = 0;
  if (resident) {
    const int sizes[] = {1, 2, 4, 8};
    cluster = small ? static_cast<int>(pick(1, 2)) : pick(sizes);
    const int64_t packs[] = {1, 8, 130, 1100, 9000};
    vocab = pick(1, small ? 300 : pick(packs)) * pack;
    gpu.shared_bytes = resident_plan(vocab * size_of(dtype), cluster).shared_bytes;
    gap = pick(0, 2) * pack;
  } else {
    const int64_t sizes[] = {1, 5, 31, 37, 1003, 4099, 8192, 33000};
    vocab = small ? pick(1, 5000) : pick(sizes) + pick(0, 1) * pick(0, 20);
    front = pick(0, 1) * pick(0, 9);
    gap = pick(0, 1) * pick(0, 9);
  }

  Rows logits(dtype, rows, vocab, front, gap);
  const float spread = std::exp(normal()), shift = pick(0, 3) == 0 ? 1e3f : 0.0f;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < vocab; ++j) put(dtype, logits.at(i, j), shift + spread * normal());
    if (pick(0, 5) == 0)
      for (int64_t j = 0; j < vocab; j += pick(1, 4)) put(dtype, logits.at(i, j), -INFINITY);
    if (pick(0, 9) == 0) put(dtype, logits.at(i, pick(0, vocab - 1)), NAN);
    if (pick(0, 9) == 0) put(dtype, logits.at(i, pick(0, vocab - 1)), INFINITY);
    if (pick(0, 3) == 0) put(dtype, logits.at(i, pick(0, vocab - 1)), shift + 25.0f);
  }
  const bool in_place = pick(0, 1) == 1;
  // Out of place, the gradient's rows lie on other boundaries than the logits'.
  const int64_t other_front = resident ? 0 : pick(0, 9);
  const int64_t other_gap = resident ? pick(0, 2) * pack : pick(0, 9);
  Rows found_gradient = in_place ? Rows(logits) : Rows(dtype, rows, vocab, other_front, other_gap);
  Rows wanted_gradient(found_gradient);
  Rows wanted_logits(logits);

  std::vector<int64_t> targets(rows);
  std::vector<float> old(rows), advantages(rows), weights(rows), ref(rows), importance(rows);
  std::vector<uint8_t> mask(rows);
  const int64_t k = std::min(pick(1, 40), vocab);
  std::vector<int64_t> topk_ids(rows * k);
  std::vector<float> topk(rows * k);
  for (int64_t i = 0; i < rows; ++i) {
    targets[i] = pick(0, 3) == 0 ? pick(0, 1) * (vocab - 1) : pick(0, vocab - 1);
    advantages[i] = pick(0, 4) == 0 ? 0.0f : normal();
    weights[i] = pick(0, 4) == 0 ? 0.0f : 0.1f + std::fabs(normal());
    mask[i] = pick(0, 4) != 0;
    old[i] = -std::fabs(5 * normal());
    ref[i] = old[i] + normal();
    importance[i] = std::exp(normal());
    if (weights[i] == 0) targets[i] = -100;
    for (int64_t j = 0; j < k; ++j) {
      topk_ids[i * k + j] = pick(0, vocab - 1);
      topk[i * k + j] = -5 - std::fabs(normal());
    }
  }

  std::vector<float> temperatures(rows);
  for (float& t : temperatures) t = pick(0, 1) ? 1.0f : 0.7f;
  const bool one_temperature = pick(0, 1);
  auto temperature_of = [&](int64_t row) { return temperatures[one_temperature ? 0 : row]; };
  // The held kernel takes none.
  const float softcap = !resident && pick(0, 2) == 0 ? 30.0f : 0.0f;
  // What the rows of every kernel are given.
  auto batch = [&](Batch& a, const View& view) {
    a.rows = rows;
    a.vocab = vocab;
    a.dtype = dtype;
    a.temperature = temperatures[0];
    a.temperatures = one_temperature ? nullptr : temperatures.data();
    a.softcap = softcap;
    a.logits = view;
    a.target_ids = targets.data();
  };
  Results found(rows), wanted(rows);
  auto compare_gradients = [&](const float* g, const float* h, const float* entropy) {
    const float rounding = dtype == kFloat32 ? 2e-5f : dtype == kFloat16 ? 2e-3f : 1.6e-2f;
    for (int64_t i = 0; i < rows; ++i) {
      float pull = (std::fabs(g[i]) + (h ? std::fabs(h[i]) * (1 + std::fabs(entropy[i])) : 0.0f)) /
                   temperature_of(i);
      if (!(pull < 1e30f)) pull = 0.0f;
      for (int64_t j = 0; j < vocab; ++j)
        close("gradient", i, j, get(dtype, found_gradient.at(i, j)),
              get(dtype, wanted_gradient.at(i, j)), rounding, 2e-5f * pull + 6e-8f);
    }
    if (!found_gradient.gaps_kept()) throw std::runtime_error("a gap was written to");
  };

  if (kind == "multiply") {
    const float factors[] = {1.0f, 0.5f, -3.0f};
    const float factor = pick(factors);
    Rows before(logits);
    cuda_multiply({rows, vocab, dtype, logits.view(), &factor}, 0, 0);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < vocab; ++j)
        close("multiplied", i, j, get(dtype, logits.at(i, j)), get(dtype, before.at(i, j)) * factor,
              dtype == kFloat32   ? 1e-6f
              : dtype == kFloat16 ? 1e-3f
                                  : 8e-3f,
              6e-8f);
    if (!logits.gaps_kept()) throw std::runtime_error("a gap was written to");
    return;
  }

  if (kind == "stats" || kind == "gradient") {
    for (int64_t& target : targets)
      if (target < 0) target = 0;
    // Half of the time a row has several targets.
    const bool several = pick(0, 1);
    const int64_t each = several ? k : 1;
    const int64_t* ids = several ? topk_ids.data() : targets.data();
    float* g_values = several ? topk.data() : advantages.data();
    for (Results* r : {&found, &wanted}) r->logprobs.resize(rows * each, -7);
    auto stats = [&](Results& r, View view) {
      StatsArgs a{};
      batch(a, view);
      a.k = each;
      a.target_ids = ids;
      a.mask = mask.data();
      a.logprobs = r.logprobs.data();
      a.entropy = r.entropy.data();
      a.row_max = r.row_max.data();
      a.log_sum = r.log_sum.data();
      return a;
    };
    const StatsArgs reference = stats(wanted, logits.view());
    for (int64_t i = 0; i < rows; ++i) kRowKernelsPortable.stats(reference, i);
    if (kind == "stats") {
      cuda_stats(stats(found, logits.view()), 0, 0);
      close("logprobs", found.logprobs, wanted.logprobs);
      close("entropy", found.entropy, wanted.entropy);
      // Its two parts may differ: the CPU kernels take a maximum that is near enough.
      for (int64_t i = 0; i < rows; ++i)
        close("logsumexp", i, -1, found.row_max[i] / temperature_of(i) + found.log_sum[i],
              wanted.row_max[i] / temperature_of(i) + wanted.log_sum[i], 2e-6f, 2e-5f);
      return;
    }
    std::vector<float> pulls(rows);
    for (int64_t i = 0; i < rows; ++i) {
      if (!mask[i]) importance[i] = 0.0f;
      for (int64_t j = i * each; j < (i + 1) * each; ++j)
        pulls[i] += std::fabs(mask[i] ? g_values[j] : g_values[j] = 0.0f);
    }
    const bool with_h = pick(0, 1), with_factor = pick(0, 1);
    const float factor = 0.5f;
    auto gradient = [&](View view, View to) {
      GradientArgs a{};
      batch(a, view);
      a.k = each;
      a.target_ids = ids;
      a.gradient = to;
      a.row_max = wanted.row_max.data();
      a.log_sum = wanted.log_sum.data();
      a.entropy = wanted.entropy.data();
      a.g = g_values;
      a.h = with_h ? importance.data() : nullptr;
      a.factor = with_factor ? &factor : nullptr;
      return a;
    };
    const GradientArgs g =
        gradient(in_place ? wanted_gradient.view() : logits.view(), wanted_gradient.view());
    for (int64_t i = 0; i < rows; ++i) kRowKernelsPortable.gradient(g, i);
    cuda_gradient(gradient(in_place ? found_gradient.view() : logits.view(), found_gradient.view()),
                  0, 0);
    compare_gradients(pulls.data(), with_h ? importance.data() : nullptr, wanted.entropy.data());
    return;
  }

  Objective o{};
  o.surrogate = static_cast<int>(pick(0, std::size(kSurrogates) - 1));
  o.eps_low = o.eps_high = 0.3f;
  o.ratio_max = 4.0f;
  o.ratio_cap = 3.0f;
  o.limit_low = o.limit_high = 0.1f;
  o.kl_coef = pick(0, 1) * 0.1f;
  o.old_kl_coef = pick(0, 1) * 0.1f;
  o.kl_estimator = static_cast<int>(pick(0, std::size(kKlEstimators) - 1));
  o.old_kl_estimator = static_cast<int>(pick(0, std::size(kKlEstimators) - 1));
  o.entropy_coef = pick(0, 1) * 0.1f;
  o.floor_low = pick(0, 1) * 0.5f;
  o.floor_high = pick(0, 1) * 3.0f;
  if (o.surrogate == kReinforce || o.surrogate == kRatioMask)
    o.divergence = static_cast<int>(pick(0, resident ? 2 : 6));
  // A penalty on TV has a gradient of either sign where p and q are as good as equal.
  if (o.divergence == kBinaryKl || o.divergence == kTopkKl || o.divergence == kFullKl)
    o.penalty_coef = pick(0, 1) * 0.5f;
  if (o.surrogate == kReinforce && o.divergence == kNone && !resident)
    o.score_centering = static_cast<int>(pick(0, 1));
  // With a floor alpha is as large as 1 - sum p is small, and that is rounding in a peaked row.
  if (o.score_centering) o.floor_low = o.floor_high = 0.0f;
  const bool uses_topk = needs_topk(o);
  for (int64_t i = 0; uses_topk && i < rows; ++i) {  // which the operator wants distinct
    const int64_t first = pick(0, vocab - 1);
    for (int64_t j = 0; j < k; ++j) topk_ids[i * k + j] = (first + j) % vocab;
  }
  const bool uses_old = o.divergence == kFullTv || o.divergence == kFullKl;
  const DType old_dtype = pick(0, 1) ? dtype : static_cast<DType>(pick(0, 2));
  Rows old_logits(old_dtype, uses_old ? rows : 1, vocab, front, gap);
  for (int64_t i = 0; i < old_logits.rows; ++i)
    for (int64_t j = 0; j < vocab; ++j)
      put(old_dtype, old_logits.at(i, j), get(dtype, logits.at(i, j)) + 0.1f * normal());
  const bool with_entropy = o.entropy_coef != 0 || pick(0, 1);
  const bool with_old = pick(0, 3) != 0, with_gradient = resident || pick(0, 3) != 0;
  const bool with_importance = pick(0, 1);
  auto fused = [&](Results& r, const Rows& x, const Rows& dx) {
    FusedArgs a{};
    batch(a, in_place ? dx.view() : x.view());
    if (with_gradient) a.gradient = dx.view();
    a.topk_ids = uses_topk ? topk_ids.data() : nullptr;
    a.topk_logprobs = uses_topk ? topk.data() : nullptr;
    a.k = uses_topk ? k : 0;
    if (uses_old) a.old_logits = old_logits.view();
    a.old_dtype = old_dtype;
    a.objective = o;
    a.old_logprobs = with_old ? old.data() : nullptr;
    a.advantages = advantages.data();
    a.weights = weights.data();
    a.ref_logprobs = ref.data();
    a.importance_weights = with_importance ? importance.data() : nullptr;
    a.token_loss = r.loss.data();
    a.logprobs = r.logprobs.data();
    a.entropy = with_entropy ? r.entropy.data() : nullptr;
    a.ratio = r.ratio.data();
    a.clipped = r.clipped.data();
    a.has_gradient = r.has_gradient.data();
    return a;
  };
  const FusedArgs reference = fused(wanted, wanted_logits, wanted_gradient);
  for (int64_t i = 0; i < rows; ++i) kRowKernelsPortable.fused(reference, i);
  const FusedArgs args = fused(found, logits, found_gradient);
  if (resident && cuda_plan(vocab * size_of(dtype), 0, cluster).cluster != cluster)
    throw std::runtime_error("a row is not held that should be");
  cuda_fused(args, 0, 0, cluster, kByTable);

  // At the edge of a clip or a trust region the two may differ by a rounding, and then in g.
  close("logprobs", found.logprobs, wanted.logprobs);
  if (with_entropy) close("entropy", found.entropy, wanted.entropy);
  for (int64_t i = 0; i < rows; ++i) {
    close("ratio", i, -1, found.ratio[i], wanted.ratio[i], 2e-4f, 1e-6f);
    close("loss", i, -1, found.loss[i], wanted.loss[i], 2e-4f,
          1e-4f * (1 + std::fabs(wanted.logprobs[i])));
    if (found.clipped[i] != wanted.clipped[i])
      complain("clipped", i, -1, found.clipped[i], wanted.clipped[i]);
    if (found.has_gradient[i] != wanted.has_gradient[i])
      complain("has_gradient", i, -1, found.has_gradient[i], wanted.has_gradient[i]);
  }
  if (!with_gradient) return;
  std::vector<float> g(rows), h(rows, 0.1f);
  for (int64_t i = 0; i < rows; ++i)
    g[i] = 10 * weights[i] *
           (std::fabs(advantages[i]) * wanted.ratio[i] * importance[i] * 4 + std::fabs(ref[i]) + 1);
  compare_gradients(g.data(), h.data(), wanted.entropy.data());
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t first = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  const uint64_t count = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 100;
  for (uint64_t seed = first; seed < first + count; ++seed) {
    const std::string kind = argc > 3 ? argv[3] : kKinds[seed % 5];
    draw.seed(seed);
    try {
#if defined(DCPO_EMU_THREADS)
      run(kind, true);
#else
      run(kind, false);
#endif
    } catch (const std::exception& error) {
      std::printf("seed %llu, %s: %s\n", static_cast<unsigned long long>(seed), kind.c_str(),
                  error.what());
      return 1;
    }
  }
  std::printf("%llu batches agree\n", static_cast<unsigned long long>(count));
  return 0;
}
