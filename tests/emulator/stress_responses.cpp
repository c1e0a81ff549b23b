// Random batches through token_weights, decide and finish, emulated and on the CPU, compared. For
// sanitizers: every tensor ends where its memory ends.
//
//   stress_responses FIRST_SEED HOW_MANY
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "responses.h"

using namespace dcpo;

namespace {

std::mt19937_64 draw;
int64_t pick(int64_t low, int64_t high) {
  return low + static_cast<int64_t>(draw() % static_cast<uint64_t>(high - low + 1));
}
bool coin() { return pick(0, 1); }

using Floats = std::vector<float>;
using Ids = std::vector<int64_t>;
using Bytes = std::vector<uint8_t>;

Floats normal(int64_t n) {
  Floats x(n);
  for (float& value : x) value = std::normal_distribution<float>()(draw);
  return x;
}
// Zero in a part of the places.
Floats with_zeros(Floats x) {
  for (float& value : x) value = pick(0, 3) ? value : 0.0f;
  return x;
}

template <class T>
void same(const char* what, const std::vector<T>& found, const std::vector<T>& wanted) {
  for (size_t i = 0; i < found.size(); ++i) {
    const double x = found[i], y = wanted[i];
    if (std::fabs(x - y) <= 1e-4 * (1 + std::fabs(y)) || (x != x && y != y)) continue;
    std::printf("%s[%zu] is %g, not %g\n", what, i, x, y);
    std::exit(1);
  }
}

struct Out {
  Floats weights, spread;
  Bytes mask;
  Ids offsets, lengths;
  Floats token_loss, ratio, g, h;
  std::vector<int8_t> clipped;
  Floats loss, response_loss, summary;

  Out(int64_t rows, int64_t count)
      : weights(rows),
        spread(rows),
        mask(rows),
        offsets(count + 1),
        lengths(count),
        token_loss(rows),
        ratio(rows),
        g(rows),
        h(rows),
        clipped(rows),
        loss(1),
        response_loss(count),
        summary(kSummaryFields) {}
};

void run() {
  const int64_t count = pick(0, 3) ? pick(1, 12) : pick(0, 1500);
  const bool padded = count > 0 && coin();
  Ids lengths(count);
  int64_t sum = 0;
  for (int64_t& n : lengths) sum += n = padded ? 7 : pick(0, count > 12 ? 4 : 400);
  // Mostly as many rows as the lengths say.
  const int64_t rows = padded || pick(0, 2) ? sum : pick(0, sum + 5);
  Bytes mask(rows);
  for (uint8_t& counted : mask) counted = pick(0, 2) > 0;
  const bool by_response = coin(), whole = coin(), skip = coin();
  const Floats skip_zero = with_zeros(normal(by_response ? count : rows)), values = normal(count);
  const float total = 1e6f;
  std::vector<int64_t> whole_lengths(count);
  for (int64_t& n : whole_lengths) n = pick(0, 30);
  const Floats given = with_zeros(normal(rows));

  Out found(rows, count), wanted(rows, count);
  const Grouping grouping{coin() ? mask.data() : nullptr,
                          padded ? nullptr : lengths.data(),
                          static_cast<int>(pick(0, 5)),
                          coin() ? kAsCounted : 100000,
                          coin() ? kAsCounted : 0,
                          10000,
                          coin() ? &total : nullptr,
                          nullptr,
                          nullptr,
                          skip ? skip_zero.data() : nullptr,
                          by_response,
                          skip && whole,
                          coin() ? whole_lengths.data() : nullptr,
                          coin() ? given.data() : nullptr};
  auto token_weights = [&](Out& o) {
    return TokenWeightsArgs{rows,
                            count,
                            grouping,
                            {o.weights.data(), o.mask.data(), o.offsets.data(), o.lengths.data()},
                            1,
                            {values.data()},
                            {o.spread.data()}};
  };
  cuda_token_weights(token_weights(found), 0, 0);
  cpu_token_weights(token_weights(wanted));
  same("offsets", found.offsets, wanted.offsets);
  same("lengths", found.lengths, wanted.lengths);
  same("mask", found.mask, wanted.mask);
  same("weights", found.weights, wanted.weights);
  same("spread", found.spread, wanted.spread);

  const Floats logprobs = normal(rows), old = normal(rows), advantages = normal(rows);
  Objective numbers{};
  numbers.surrogate = coin() ? kClip : coin() ? kGeometricClip : kGamma;
  numbers.power_low = numbers.power_high = 2.0f;
  numbers.eps_low = numbers.eps_high = 0.2f;
  numbers.ratio_max = numbers.ratio_cap = INFINITY;
  numbers.kl_coef = numbers.entropy_coef = 0.1f;
  const bool decided_by_response = coin(), spread = decided_by_response && coin();
  const bool with_old = pick(0, 3) > 0, with_importance = numbers.surrogate != kGamma && coin();
  const bool with_log_ratio = coin(), with_entropy_weights = coin();
  const bool with_rollout = coin();
  auto decide = [&](Out& o) {
    return DecideArgs{rows,
                      count,
                      logprobs.data(),
                      logprobs.data(),
                      with_old ? old.data() : nullptr,
                      advantages.data(),
                      wanted.weights.data(),
                      old.data(),
                      with_importance ? advantages.data() : nullptr,
                      with_log_ratio ? old.data() : nullptr,
                      with_rollout ? advantages.data() : nullptr,
                      with_entropy_weights ? advantages.data() : nullptr,
                      numbers,
                      decided_by_response,
                      spread,
                      wanted.offsets.data(),
                      wanted.lengths.data(),
                      o.token_loss.data(),
                      o.ratio.data(),
                      o.clipped.data(),
                      o.g.data(),
                      o.h.data()};
  };
  cuda_decide(decide(found), 0, 0);
  cpu_decide(decide(wanted));
  same("token_loss", found.token_loss, wanted.token_loss);
  same("ratio", found.ratio, wanted.ratio);
  same("clipped", found.clipped, wanted.clipped);
  same("g", found.g, wanted.g);
  same("h", found.h, wanted.h);

  auto finish = [&](Out& o) {
    return FinishArgs{rows,
                      count,
                      wanted.token_loss.data(),
                      logprobs.data(),
                      nullptr,
                      wanted.ratio.data(),
                      wanted.clipped.data(),
                      wanted.weights.data(),
                      wanted.mask.data(),
                      wanted.offsets.data(),
                      wanted.lengths.data(),
                      o.loss.data(),
                      o.response_loss.data(),
                      o.summary.data()};
  };
  cuda_finish(finish(found), 0, 0);
  cpu_finish(finish(wanted));
  same("response_loss", found.response_loss, wanted.response_loss);
  same("summary", found.summary, wanted.summary);
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t first = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  const uint64_t count = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 100;
  for (uint64_t seed = first; seed < first + count; ++seed) {
    draw.seed(seed);
    emu::settings().seed = seed;
    run();
  }
  std::printf("%llu batches agree\n", static_cast<unsigned long long>(count));
  return 0;
}
