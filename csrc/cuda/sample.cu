#include "core/philox.h"
#include "cuda/outputs.cuh"
#include "ops/lm_head.h"
#include "ops/sample.h"

namespace flexidepth::cuda {

namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;
constexpr int kDigits = 256;  // of eight bits, four of them a key
constexpr float kMassUnit =
    0x1p40f;  // probabilities are counted in whole units: sums have no order

constexpr int kGroup = 16;  // digits
constexpr int kCopies = 8;  // of the counts of digits: lanes of a warp find the same digit often

// What a block shares. Every sum is over whole numbers or in a fixed order.
struct Shared {
  uint32_t low[kDigits * kCopies];  // of 64-bit sums; a copy's neighbours are in other banks
  uint32_t high[kDigits * kCopies];
  uint64_t mass[kDigits];
  uint64_t groups[kDigits / kGroup];
  uint64_t scan[kThreads];
  uint64_t ties_until[kWarps];  // tokens of the lightest weight in a warp's piece and before it
  float sums[kWarps];
  uint64_t best;
  uint32_t digit;
  uint64_t above;  // mass or number of what lies above the digits chosen so far; then the aim
  uint64_t ties;   // tokens of the lightest weight before the chosen piece
  int32_t piece;   // of the vocabulary, that the draw falls into
};

// One row of logits and a block that draws from it.
class Draw {
 public:
  __device__ Draw(const SampleArgs& args, Shared& shared)
      : args_(args),
        how_(settings_of(args)),
        shared_(shared),
        row_(dev::block()),
        logits_(row_of(args.logits, row_)) {}

  __device__ void run() {
    const int32_t best = find_best();
    const float peak = logits_[best];
    const bool nan = shared_.best >> 32 == 0xffffffffu;
    if (nan || !(peak > -INFINITY && peak < INFINITY)) {
      if (dev::thread() == 0) {
        args_.faults[row_] = nan ? kNanLogit : kNoFiniteLogit;
        args_.tokens[row_] = best;
        args_.logprobs[row_] = NAN;
      }
      return;
    }
    int32_t token = best;
    inverse_ = 1.0f / how_.temperature;
    peak_ = peak * inverse_;
    // A temperature so low that nothing but the best is left of the numbers is none.
    if (how_.temperature > 0.0f && fabsf(peak_) < INFINITY && inverse_ < INFINITY) {
      if (how_.top_k > 0 && how_.top_k < args_.vocab) limit_ = kth_largest();
      if (how_.top_p < 1.0f) keep_top_p();
      token = walk(best);
    }
    const float total = sum_of_exponentials(peak);
    if (dev::thread() == 0) {
      args_.faults[row_] = kSampled;
      args_.tokens[row_] = token;
      args_.logprobs[row_] = logits_[token] - peak - logf(total);
    }
  }

 private:
  __device__ static SampleSettings settings_of(const SampleArgs& args) {
    if (args.settings_at != nullptr) return *args.settings_at;
    const int64_t top_k = args.top_k < args.vocab ? args.top_k : args.vocab;
    return {args.temperature, args.top_p, args.min_p, static_cast<int32_t>(top_k)};
  }

  // The first of the largest logits; a NaN lies above all.
  __device__ int32_t find_best() {
    uint64_t best = 0;
    for (int64_t i = dev::thread(); i < args_.vocab; i += kThreads) {
      const uint64_t key = best_key(logits_[i], i);
      best = key > best ? key : best;
    }
    shared_.scan[dev::thread()] = best;
    dev::sync_block();
    if (dev::thread() < kWarp) {
      for (int i = dev::thread() + kWarp; i < kThreads; i += kWarp)
        best = shared_.scan[i] > best ? shared_.scan[i] : best;
      shared_.scan[dev::thread()] = best;
    }
    dev::sync_block();
    if (dev::thread() == 0) {
      for (int i = 1; i < kWarp; ++i) best = shared_.scan[i] > best ? shared_.scan[i] : best;
      shared_.best = best;
    }
    dev::sync_block();
    return best_token(shared_.best);
  }

  __device__ float sum_of_exponentials(float peak) {
    float sum = 0.0f;
    for (int64_t i = dev::thread(); i < args_.vocab; i += kThreads) sum += expf(logits_[i] - peak);
    sum = warp_sum(sum);
    if (dev::thread() % kWarp == 0) shared_.sums[dev::thread() / kWarp] = sum;
    dev::sync_block();
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += shared_.sums[w];
    return total;
  }

  __device__ float scaled(int64_t i) const { return logits_[i] * inverse_; }

  // Weight of a token relative to the best one's; 0 for what top-k leaves out.
  __device__ float weight(int64_t i) const {
    const float value = scaled(i);
    return ordered_bits(value) < limit_ ? 0.0f : expf(value - peak_);
  }
  __device__ static uint64_t mass_of(float weight) {
    return static_cast<uint64_t>(weight * kMassUnit + 0.5f);
  }

  // Adds to a digit's count, in this lane's copy. Halves of 32 bits, which shared memory adds by
  // itself: 64 bits it would only exchange, again and again while others do.
  __device__ void count(uint32_t digit, uint64_t value) {
    const uint32_t at = digit * kCopies + static_cast<uint32_t>(dev::thread() % kCopies);
    const auto low = static_cast<uint32_t>(value);
    auto high = static_cast<uint32_t>(value >> 32);
    if (dev::fetch_add(&shared_.low[at], low) + low < low) ++high;  // it went round
    if (high > 0) dev::fetch_add(&shared_.high[at], high);
  }
  __device__ void count_one(uint32_t digit) {
    dev::fetch_add(&shared_.low[digit * kCopies + static_cast<uint32_t>(dev::thread() % kCopies)],
                   1u);
  }

  // Counts the values whose key has the known digits, by their next digit; then finds the digit in
  // which the count from above passes `wanted`. add(i, digit) counts token i.
  template <class Key, class Add>
  __device__ void next_digit(int shift, uint32_t known, uint64_t wanted, const Key& key,
                             const Add& add) {
    for (int i = dev::thread(); i < kDigits * kCopies; i += kThreads)
      shared_.low[i] = shared_.high[i] = 0;
    dev::sync_block();
    for (int64_t i = dev::thread(); i < args_.vocab; i += kThreads) {
      const uint32_t own = key(i);
      if (shift < 24 && own >> (shift + 8) != known >> (shift + 8)) continue;
      add(i, own >> shift & 0xffu);
    }
    dev::sync_block();
    if (dev::thread() < kDigits) {
      uint64_t sum = 0;
      for (int i = dev::thread() * kCopies; i < (dev::thread() + 1) * kCopies; ++i)
        sum += shared_.low[i] + (static_cast<uint64_t>(shared_.high[i]) << 32);
      shared_.mass[dev::thread()] = sum;
    }
    dev::sync_block();
    if (dev::thread() < kDigits / kGroup) {
      uint64_t sum = 0;
      for (int i = 0; i < kGroup; ++i) sum += shared_.mass[dev::thread() * kGroup + i];
      shared_.groups[dev::thread()] = sum;
    }
    dev::sync_block();
    if (dev::thread() == 0) {
      uint64_t above = shift == 24 ? 0 : shared_.above;
      int d = kDigits - 1;
      for (; d >= kGroup && above + shared_.groups[d / kGroup] < wanted; d -= kGroup)
        above += shared_.groups[d / kGroup];
      while (d > 0 && above + shared_.mass[d] < wanted) above += shared_.mass[d--];
      shared_.digit = static_cast<uint32_t>(d);
      shared_.above = above;
    }
    dev::sync_block();
  }

  // Key of the k-th largest scaled logit.
  __device__ uint32_t kth_largest() {
    uint32_t known = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
      next_digit(
          shift, known, static_cast<uint64_t>(how_.top_k),
          [&](int64_t i) { return ordered_bits(scaled(i)); },
          [&](int64_t, uint32_t digit) { count_one(digit); });
      known |= shared_.digit << shift;
    }
    return known;
  }

  // The lightest weight that is kept, and of how many tokens of just that weight.
  __device__ void keep_top_p() {
    const uint64_t total = sum_over_tokens([&](int64_t i) { return mass_of(weight(i)); });
    const double wanted = static_cast<double>(how_.top_p) * static_cast<double>(total);
    const auto whole = static_cast<uint64_t>(ceil(wanted));
    uint32_t known = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
      next_digit(
          shift, known, whole < 1 ? 1 : whole, [&](int64_t i) { return dev::bits_of(weight(i)); },
          [&](int64_t i, uint32_t digit) {
            const uint64_t mass = mass_of(weight(i));
            if (mass > 0) count(digit, mass);
          });
      known |= shared_.digit << shift;
    }
    lightest_ = known;
    const uint64_t each = mass_of(dev::float_of(known)), left = whole - shared_.above;
    ties_ = each == 0 || left == 0 ? 1 : (left + each - 1) / each;
    dev::sync_block();  // `above` may be written again
  }

  // Tokens of a warp in the walk: a piece of the vocabulary.
  __device__ int64_t piece() const { return (args_.vocab + kWarps - 1) / kWarps; }

  // Inclusive sums over the threads, in shared_.scan.
  __device__ void scan(uint64_t own) {
    shared_.scan[dev::thread()] = own;
    dev::sync_block();
    for (int apart = 1; apart < kThreads; apart *= 2) {
      const uint64_t before =
          dev::thread() >= apart ? shared_.scan[dev::thread() - apart] : uint64_t{0};
      dev::sync_block();
      shared_.scan[dev::thread()] += before;
      dev::sync_block();
    }
  }

  template <class Value>
  __device__ uint64_t sum_over_tokens(const Value& value) {
    uint64_t sum = 0;
    for (int64_t i = dev::thread(); i < args_.vocab; i += kThreads) sum += value(i);
    scan(sum);
    const uint64_t total = shared_.scan[kThreads - 1];
    dev::sync_block();
    return total;
  }

  // Mass of a token, and whether it has the lightest weight, of which not all are kept.
  struct Kept {
    uint64_t mass;
    bool tie;
  };
  __device__ Kept kept(int64_t i) const {
    const float w = weight(i);
    const uint32_t bits = dev::bits_of(w);
    if (w < how_.min_p || bits < lightest_) return {0, false};
    return {mass_of(w), bits == lightest_ && lightest_ > 0};
  }
  // How many of `ties` tokens are kept, which have `before` before them.
  __device__ uint64_t kept_ties(uint64_t before, uint64_t ties) const {
    const uint64_t left = before < ties_ ? ties_ - before : 0;
    return ties < left ? ties : left;
  }

  // Draws among what is left, token by token in their order; `best` where nothing has any mass.
  // First the piece of a warp that holds it, whose lanes read neighbours, then the token in there.
  __device__ int32_t walk(int32_t best) {
    const int64_t from = dev::thread() / kWarp * piece();
    const int64_t end = from + piece() < args_.vocab ? from + piece() : args_.vocab;
    uint64_t mass = 0, ties = 0;
    for (int64_t i = from + dev::thread() % kWarp; i < end; i += kWarp) {
      const Kept one = kept(i);
      (one.tie ? ties : mass) += one.tie ? 1 : one.mass;
    }
    const uint64_t each = mass_of(dev::float_of(lightest_));
    scan(ties);
    if (dev::thread() < kWarps) shared_.ties_until[dev::thread()] = warp_end(dev::thread());
    dev::sync_block();
    scan(mass);
    if (dev::thread() == 0) choose_piece(each);
    dev::sync_block();
    if (shared_.piece < 0) return best;  // the same for all threads
    find_token(each);
    const auto token = static_cast<int32_t>(shared_.digit);
    dev::sync_block();
    return token;
  }

  // A warp's last entry of the scan.
  __device__ uint64_t warp_end(int warp) const { return shared_.scan[(warp + 1) * kWarp - 1]; }

  // By one thread: the piece that the draw falls into, -1 where nothing has any mass; how much of
  // that piece lies before the aim, and how many ties before the piece.
  __device__ void choose_piece(uint64_t each) {
    const auto ties_before_end = [&](int warp) {
      return warp < 0 ? uint64_t{0} : shared_.ties_until[warp];
    };
    const auto until = [&](int warp) {
      return warp < 0 ? uint64_t{0} : warp_end(warp) + kept_ties(0, ties_before_end(warp)) * each;
    };
    const uint64_t total = until(kWarps - 1);
    shared_.piece = -1;
    if (total == 0) return;
    const double uniform =
        philox_uniform(args_.seeds[row_], static_cast<uint64_t>(args_.positions[row_]));
    auto aim = static_cast<uint64_t>(uniform * static_cast<double>(total));
    aim = aim < total ? aim : total - 1;
    int warp = 0;
    while (aim >= until(warp)) ++warp;
    shared_.piece = warp;
    shared_.above = aim - until(warp - 1);
    shared_.ties = ties_before_end(warp - 1);
  }

  // The token of the chosen piece at the aim, into shared_.digit.
  __device__ void find_token(uint64_t each) {
    const int64_t own = (piece() + kThreads - 1) / kThreads;
    const int64_t first = shared_.piece * piece(), last = first + piece();
    const int64_t from = first + dev::thread() * own;
    int64_t end = from + own < last ? from + own : last;
    end = end < args_.vocab ? end : args_.vocab;
    uint64_t mass = 0, ties = 0;
    for (int64_t i = from; i < end; ++i) {
      const Kept one = kept(i);
      (one.tie ? ties : mass) += one.tie ? 1 : one.mass;
    }
    scan(ties);
    uint64_t ties_before = shared_.ties + shared_.scan[dev::thread()] - ties;
    dev::sync_block();
    mass += kept_ties(ties_before, ties) * each;
    scan(mass);
    const uint64_t until = shared_.scan[dev::thread()], aim = shared_.above;
    if (aim >= until - mass && aim < until) {  // one thread's tokens hold it
      uint64_t at = until - mass;
      for (int64_t i = from; i < end; ++i) {
        const Kept one = kept(i);
        at += one.tie ? kept_ties(ties_before, 1) * each : one.mass;
        ties_before += one.tie ? 1 : 0;
        if (aim < at) {
          shared_.digit = static_cast<uint32_t>(i);
          break;
        }
      }
    }
    dev::sync_block();
  }

  const SampleArgs& args_;
  const SampleSettings how_;
  Shared& shared_;
  const int64_t row_;
  const float* logits_;
  float inverse_ = 1.0f;
  float peak_ = 0.0f;
  uint32_t limit_ = 0;     // smallest key that top-k keeps
  uint32_t lightest_ = 0;  // bits of the smallest weight that top-p keeps
  uint64_t ties_ = 0;
};

__global__ void __launch_bounds__(kThreads, 1) sample_kernel(const SampleArgs args) {
  dev::await_inputs();
  Draw(args, *dev::shared_memory<Shared>()).run();
}

}  // namespace

void sample(const SampleArgs& args, const Context& context) {
  if (args.logits.count == 0) return;
  dev::launch("sample", sample_kernel, grid_of(args.logits.count), kThreads, sizeof(Shared),
              context, args);
}

}  // namespace flexidepth::cuda
