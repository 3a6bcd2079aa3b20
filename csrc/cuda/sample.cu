// A row of logits is drawn from by several blocks where the device runs them at once. Each takes
// pieces of the vocabulary, and all meet (the barrier of a grid) where what they have found
// together decides how they go on. Sums are over whole numbers, or over the pieces in their order:
// the number of blocks changes no bit.
#include "core/philox.h"
#include "cuda/digits.cuh"
#include "cuda/outputs.cuh"
#include "ops/lm_head.h"
#include "ops/sample.h"

namespace flexidepth::cuda {

namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPieces = 256;                   // of the vocabulary: what a warp takes at a time
constexpr int kMostBlocks = kPieces / kWarps;  // of a row
constexpr float kMassUnit =
    0x1p40f;  // probabilities are counted in whole units: sums have no order

// What the tokens of a piece weigh that are kept, beside those of the lightest weight, of which not
// all are kept, and how many these are.
struct Piece {
  uint64_t mass;
  uint64_t ties;
};

// What the blocks of a row tell each other, in device memory.
struct Room {
  uint64_t mass[3][kDigits];  // of the present pass over the digits, the one before and the next
  uint64_t best[kMostBlocks];
  Piece pieces[kPieces];
  float sums[kPieces];
};
constexpr size_t kRoomsAt = 256;  // behind the barrier, which all rows share

// What a block shares.
struct Shared {
  DigitCounts<kThreads> digits;
  uint64_t scan[kThreads];
  uint64_t best[kWarps];
  float sums[kWarps];
  uint64_t wanted;  // mass that top-p keeps at least
  int32_t piece;    // that the draw falls into
  uint64_t aim;     // mass of that piece before the token
  uint64_t ties;    // tokens of the lightest weight before the piece
  int32_t token;
};

// One of the blocks that draw from a row.
class Draw {
 public:
  __device__ Draw(const SampleArgs& args, int blocks, Shared& shared)
      : args_(args),
        how_(settings_of(args)),
        shared_(shared),
        blocks_(blocks),
        part_(static_cast<int>(dev::block() % blocks)),
        row_(dev::block() / blocks),
        room_(reinterpret_cast<Room*>(static_cast<uint8_t*>(args.room) + kRoomsAt)[row_]),
        logits_(row_of(args.logits, row_)) {}

  __device__ void run() {
    const uint64_t key = find_best();
    const int32_t best = best_token(key);
    const float peak = logits_[best];
    const bool nan = key >> 32 == 0xffffffffu;
    const bool fault = nan || !(peak > -INFINITY && peak < INFINITY);
    if (!fault) sum_exponentials(peak);
    inverse_ = 1.0f / how_.temperature;
    peak_ = peak * inverse_;
    // A temperature so low that nothing but the best is left of the numbers is none.
    const bool draws = how_.temperature > 0.0f && inverse_ < INFINITY;
    const bool by_k = draws && how_.top_k > 0 && how_.top_k < args_.vocab;
    const bool by_p = draws && how_.top_p < 1.0f;
    int32_t token = best;
    if (draws && !fault && fabsf(peak_) < INFINITY) {
      if (by_k) limit_ = kth_largest();
      if (by_p) keep_top_p();
      weigh_pieces();
      meet();
      if (part_ == 0) token = walk(best);
    } else {  // those of other rows meet as often
      const int meetings = 1 + (by_k ? kKeyDigits : 0) + (by_p ? kKeyDigits : 0);
      for (int i = 0; i < meetings; ++i) meet();
    }
    if (part_ == 0) write(token, peak, nan ? kNanLogit : fault ? kNoFiniteLogit : kSampled);
  }

 private:
  __device__ static SampleSettings settings_of(const SampleArgs& args) {
    if (args.settings_at != nullptr) return *args.settings_at;
    const int64_t top_k = args.top_k < args.vocab ? args.top_k : args.vocab;
    return {args.temperature, args.top_p, args.min_p, static_cast<int32_t>(top_k)};
  }

  __device__ void write(int32_t token, float peak, SampleFault fault) {
    const float total = fault == kSampled ? total_of_exponentials() : 0.0f;
    if (dev::thread() != 0) return;
    args_.faults[row_] = fault;
    args_.tokens[row_] = token;
    args_.logprobs[row_] = fault == kSampled ? logits_[token] - peak - logf(total) : NAN;
  }

  // What any block of the grid wrote before is read by any behind it.
  __device__ void meet() {
    if (blocks_ == 1) return dev::sync_block();
    auto* barrier = static_cast<uint32_t*>(args_.room);
    dev::wait_for_grid(barrier, dev::arrive_at_grid(barrier));
  }

  // Tokens of a piece, whole turns of a warp.
  __device__ int64_t length() const { return ceil_div(args_.vocab, kPieces * kWarp) * kWarp; }

  // work(piece, from, end) for each piece that is the warp's; from: the lane's first token.
  template <class Work>
  __device__ void for_own_pieces(const Work& work) const {
    for (int64_t piece = part_ * kWarps + dev::thread() / kWarp; piece * length() < args_.vocab;
         piece += blocks_ * kWarps) {
      const int64_t from = piece * length(), end = from + length();
      work(piece, from + dev::thread() % kWarp, end < args_.vocab ? end : args_.vocab);
    }
  }
  // The thread's piece where each has one.
  template <class Value>
  __device__ Value own_piece(const Value* pieces) const {
    return dev::thread() * length() < args_.vocab ? pieces[dev::thread()] : Value{};
  }
  // work(i) for each token in them, by one thread each.
  template <class Work>
  __device__ void for_own_tokens(const Work& work) const {
    for_own_pieces([&](int64_t, int64_t from, int64_t end) {
      for (int64_t i = from; i < end; i += kWarp) work(i);
    });
  }

  // Key of the first of the largest logits; a NaN lies above all.
  __device__ uint64_t find_best() {
    if (part_ == 0 && dev::thread() < kDigits) room_.mass[0][dev::thread()] = 0;
    uint64_t best = 0;
    for_own_tokens([&](int64_t i) {
      const uint64_t key = best_key(logits_[i], i);
      best = key > best ? key : best;
    });
    best = warp_max(best);
    if (dev::thread() % kWarp == 0) shared_.best[dev::thread() / kWarp] = best;
    dev::sync_block();
    for (int w = 0; w < kWarps; ++w) best = shared_.best[w] > best ? shared_.best[w] : best;
    if (dev::thread() == 0) room_.best[part_] = best;
    meet();
    for (int b = 0; b < blocks_; ++b) best = room_.best[b] > best ? room_.best[b] : best;
    return best;
  }

  // Of each piece, for total_of_exponentials() behind the next meeting.
  __device__ void sum_exponentials(float peak) {
    for_own_pieces([&](int64_t piece, int64_t from, int64_t end) {
      float sum = 0.0f;
      for (int64_t i = from; i < end; i += kWarp) sum += expf(logits_[i] - peak);
      sum = warp_sum(sum);
      if (dev::thread() % kWarp == 0) room_.sums[piece] = sum;
    });
  }
  __device__ float total_of_exponentials() {
    const float sum = warp_sum(own_piece(room_.sums));
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

  // Counts the values whose key has the known digits, by their next digit; then finds the digit in
  // which the count from above passes wanted(), which thread 0 asks. add(i, digit) counts token i.
  template <class Wanted, class Key, class Add>
  __device__ void next_digit(int shift, uint32_t known, const Wanted& wanted, const Key& key,
                             const Add& add) {
    // The next pass's counts: they were read two passes ago, and all have met since.
    uint64_t *mass = room_.mass[pass_ % 3], *next = room_.mass[(pass_ + 1) % 3];
    ++pass_;
    if (part_ == 0 && dev::thread() < kDigits) next[dev::thread()] = 0;
    shared_.digits.clear();
    dev::sync_block();
    for_own_tokens([&](int64_t i) {
      const uint32_t own = key(i);
      if (shift == 24 || own >> (shift + 8) == known >> (shift + 8)) add(i, own >> shift & 0xffu);
    });
    dev::sync_block();
    shared_.digits.add_to(mass);
    meet();
    shared_.digits.choose(mass, shift == 24, wanted);
  }

  // Key of the k-th largest scaled logit.
  __device__ uint32_t kth_largest() {
    uint32_t known = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
      next_digit(
          shift, known, [&] { return static_cast<uint64_t>(how_.top_k); },
          [&](int64_t i) { return ordered_bits(scaled(i)); },
          [&](int64_t, uint32_t digit) { shared_.digits.add_one(digit); });
      known |= shared_.digits.digit << shift;
    }
    return known;
  }

  // By one thread, behind the pass over the first digits, which every token with a mass is in.
  __device__ uint64_t top_p_of_total() const {
    const double wanted =
        static_cast<double>(how_.top_p) * static_cast<double>(shared_.digits.all());
    return static_cast<uint64_t>(ceil(wanted));  // at least 1: the best token's mass is kMassUnit
  }

  // The lightest weight that is kept, and of how many tokens of just that weight.
  __device__ void keep_top_p() {
    uint32_t known = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
      next_digit(
          shift, known,
          [&] {
            if (shift == 24) shared_.wanted = top_p_of_total();
            return shared_.wanted;
          },
          [&](int64_t i) { return dev::bits_of(weight(i)); },
          [&](int64_t i, uint32_t digit) {
            const uint64_t mass = mass_of(weight(i));
            if (mass > 0) shared_.digits.add(digit, mass);
          });
      known |= shared_.digits.digit << shift;
    }
    lightest_ = known;
    const uint64_t each = mass_of(dev::float_of(known)),
                   left = shared_.wanted - shared_.digits.above;
    ties_ = each == 0 || left == 0 ? 1 : (left + each - 1) / each;
  }

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

  // What is left of each piece, for walk() behind the next meeting.
  __device__ void weigh_pieces() {
    for_own_pieces([&](int64_t piece, int64_t from, int64_t end) {
      Piece own{};
      for (int64_t i = from; i < end; i += kWarp) {
        const Kept one = kept(i);
        (one.tie ? own.ties : own.mass) += one.tie ? 1 : one.mass;
      }
      own = {warp_sum(own.mass), warp_sum(own.ties)};
      if (dev::thread() % kWarp == 0) room_.pieces[piece] = own;
    });
  }

  // Draws among what is left, token by token in their order; `best` where nothing has any mass.
  // First the piece that holds the draw, a thread a piece, then the token in there.
  __device__ int32_t walk(int32_t best) {
    static_assert(kPieces <= kThreads);
    const uint64_t each = mass_of(dev::float_of(lightest_));
    const Piece own = own_piece(room_.pieces);
    if (dev::thread() == 0) shared_.piece = -1;
    scan(own.ties);
    const uint64_t ties_before = shared_.scan[dev::thread()] - own.ties;
    dev::sync_block();
    const uint64_t mass = own.mass + kept_ties(ties_before, own.ties) * each;
    scan(mass);
    const uint64_t until = shared_.scan[dev::thread()], total = shared_.scan[kThreads - 1];
    const double uniform =
        philox_uniform(args_.seeds[row_], static_cast<uint64_t>(args_.positions[row_]));
    auto aim = static_cast<uint64_t>(uniform * static_cast<double>(total));
    aim = aim < total ? aim : total - 1;
    if (total > 0 && aim >= until - mass && aim < until) {  // one thread
      shared_.piece = dev::thread();
      shared_.aim = aim - (until - mass);
      shared_.ties = ties_before;
    }
    dev::sync_block();
    if (shared_.piece < 0) return best;  // the same for all threads
    find_token(each);
    const int32_t token = shared_.token;
    dev::sync_block();
    return token;
  }

  // The token of the chosen piece at the aim, into shared_.token.
  __device__ void find_token(uint64_t each) {
    const int64_t own = (length() + kThreads - 1) / kThreads;
    const int64_t first = shared_.piece * length(), last = first + length();
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
    const uint64_t until = shared_.scan[dev::thread()], aim = shared_.aim;
    if (aim >= until - mass && aim < until) {  // one thread's tokens hold it
      uint64_t at = until - mass;
      for (int64_t i = from; i < end; ++i) {
        const Kept one = kept(i);
        at += one.tie ? kept_ties(ties_before, 1) * each : one.mass;
        ties_before += one.tie ? 1 : 0;
        if (aim < at) {
          shared_.token = static_cast<int32_t>(i);
          break;
        }
      }
    }
    dev::sync_block();
  }

  const SampleArgs& args_;
  const SampleSettings how_;
  Shared& shared_;
  const int blocks_;  // of the row
  const int part_;    // this one's number
  const int64_t row_;
  Room& room_;
  const float* logits_;
  int pass_ = 0;  // over the digits
  float inverse_ = 1.0f;
  float peak_ = 0.0f;
  uint32_t limit_ = 0;     // smallest key that top-k keeps
  uint32_t lightest_ = 0;  // bits of the smallest weight that top-p keeps
  uint64_t ties_ = 0;
};

__global__ void __launch_bounds__(kThreads, 1)
    sample_kernel(const SampleArgs args, const int blocks) {
  dev::await_inputs();
  Draw(args, blocks, *dev::shared_memory<Shared>()).run();
}

// Blocks of a row: together at most half of what the device runs at once, of which others may have
// a part.
int blocks_of_row(int64_t rows) {
  const int64_t most = dev::resident_blocks("sample", sample_kernel, kThreads, sizeof(Shared)) / 2;
  int blocks = kMostBlocks;
  while (blocks > 1 && rows * blocks > most) blocks /= 2;
  return blocks;
}

}  // namespace

size_t sample_room_bytes(int64_t rows) {
  return kRoomsAt + static_cast<size_t>(rows) * sizeof(Room);
}

void sample(const SampleArgs& args, const Context& context) {
  const int64_t rows = args.logits.count;
  if (rows == 0) return;
  const int blocks = args.together ? blocks_of_row(rows) : 1;
  if (blocks > 1 && dev::launch_together("sample", sample_kernel, rows * blocks, kThreads,
                                         sizeof(Shared), context, args, blocks))
    return;
  dev::launch("sample", sample_kernel, grid_of(rows), kThreads, sizeof(Shared), context, args, 1);
}

}  // namespace flexidepth::cuda
