#include "ops/sample.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/check.h"
#include "core/philox.h"
#include "cpu/context.h"

namespace flexidepth::cpu {

namespace {

constexpr size_t kFirstSorted = 256;  // tokens sorted before top-p asks for more

struct Candidate {
  int32_t token;
  float weight;  // exp(scaled logit - peak)
};

bool heavier(const Candidate& a, const Candidate& b) {
  return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
}

int32_t argmax(const float* logits, int64_t vocab) {
  return static_cast<int32_t>(std::max_element(logits, logits + vocab) - logits);
}

// Drops everything below the k-th largest value to -inf.
void keep_top_k(std::vector<float>& scaled, int64_t top_k) {
  if (top_k <= 0 || top_k >= static_cast<int64_t>(scaled.size())) return;
  std::vector<float> copy(scaled);
  std::nth_element(copy.begin(), copy.begin() + (top_k - 1), copy.end(), std::greater<float>());
  const float limit = copy[static_cast<size_t>(top_k - 1)];
  for (float& value : scaled)
    if (value < limit) value = -std::numeric_limits<float>::infinity();
}

// A candidate stays while the weight of those before it is below top_p of the total. The order of
// the vocabulary is restored.
void keep_top_p(std::vector<Candidate>& candidates, float top_p) {
  double total = 0;
  for (const auto& c : candidates) total += c.weight;
  size_t sorted = 0, kept = candidates.size();
  double before = 0;
  for (size_t i = 0; i < kept; ++i) {
    if (i == sorted) {  // sort just as many as the nucleus turns out to need
      sorted = std::min(candidates.size(), std::max(kFirstSorted, sorted * 4));
      const auto first = candidates.begin() + static_cast<std::ptrdiff_t>(i);
      std::partial_sort(first, candidates.begin() + static_cast<std::ptrdiff_t>(sorted),
                        candidates.end(), heavier);
    }
    if (i > 0 && before >= top_p * total) kept = i;
    before += candidates[i].weight;
  }
  candidates.resize(kept);
  std::sort(candidates.begin(), candidates.end(),
            [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
}

int32_t draw(const std::vector<Candidate>& candidates, double uniform) {
  double total = 0;
  for (const auto& c : candidates) total += c.weight;
  double left = uniform * total;
  for (const auto& c : candidates) {
    left -= c.weight;
    if (left < 0) return c.token;
  }
  return candidates.back().token;
}

int32_t choose(const SampleArgs& args, const Kernels& kernels, const float* logits, int64_t row) {
  std::vector<float> scaled(logits, logits + args.vocab);
  const float peak = kernels.scale_max(scaled.data(), 1.0f / args.temperature, args.vocab);
  keep_top_k(scaled, args.top_k);
  kernels.exp_sum(scaled.data(), peak, args.vocab);
  std::vector<Candidate> candidates;
  for (int64_t i = 0; i < args.vocab; ++i) {
    const float weight = scaled[static_cast<size_t>(i)];
    if (weight > 0) candidates.push_back({static_cast<int32_t>(i), weight});
  }
  if (args.top_p < 1.0f) keep_top_p(candidates, args.top_p);
  if (args.min_p > 0.0f) {  // the best token weighs exp(0) = 1
    std::erase_if(candidates, [&](const Candidate& c) { return c.weight < args.min_p; });
  }
  return draw(candidates,
              philox_uniform(args.seeds[row], static_cast<uint64_t>(args.positions[row])));
}

}  // namespace

void sample(const SampleArgs& args, const Context& context) {
  std::vector<float> copy(static_cast<size_t>(args.vocab));
  for (int64_t i = 0; i < args.logits.count; ++i) {
    const float* logits = args.logits.row(i);
    bool any_nan = false;
    for (int64_t j = 0; j < args.vocab; ++j) any_nan |= std::isnan(logits[j]);
    check(!any_nan, ErrorKind::kValue, "sample: row ", i,
          " of the logits contains NaN; the weights or a logits processor produced it");
    const int32_t best = argmax(logits, args.vocab);
    check(std::isfinite(logits[best]), ErrorKind::kValue, "sample: the largest logit of row ", i,
          " is ", logits[best], "; at least one token must stay possible and finite");
    const int32_t token =
        args.temperature == 0.0f ? best : choose(args, context.kernels, logits, i);
    std::copy_n(logits, args.vocab, copy.begin());
    const float sum = context.kernels.exp_sum(copy.data(), logits[best], args.vocab);
    args.tokens[i] = token;
    args.logprobs[i] = logits[token] - logits[best] - std::log(sum);
  }
}

}  // namespace flexidepth::cpu
