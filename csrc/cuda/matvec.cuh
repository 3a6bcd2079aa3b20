// Products of a few rows with a matrix: y[m, n] = sum_k x[m, k] W[n, k], bound by reading W once.
//
// A warp computes pairs of outputs (a, b) of up to M rows. Its lanes take 8 inputs each, 256 a
// step, in ascending order, and are summed at the end: the order depends on k alone, whatever M and
// the grid. The block keeps x, normed on the way if wanted, in shared memory as float32: of every
// eight inputs the first four in one half and the others in the other, so that lanes read without
// conflicts.
//
// An Op says what the outputs are:
//   int64_t units() const                pairs
//   Pair<T> pair(unit)                   rows of W; b null where there is only one
//   void store(unit, row, ya, yb)        what becomes of the sums, by one lane
#pragma once

#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

namespace flexidepth::cuda {

constexpr int kMatvecWarps = 4;
constexpr int kMatvecThreads = kMatvecWarps * kWarp;
constexpr int kMatvecStep = kWarp * 8;   // inputs of a step
constexpr int64_t kMatvecInputs = 8192;  // x values of all rows in shared memory at a time
constexpr int64_t kMatvecRows = 8;

// Blocks that compute so many pairs, so many of them a warp, at once.
constexpr int64_t matvec_blocks(int64_t units, int pairs) {
  return ceil_div(units, kMatvecWarps * pairs);
}

template <class T>
struct Pair {
  const T* a;
  const T* b;
};

struct alignas(16) Four {
  float value[4];
};

// The rows of x, before their norm.
struct Input {
  Rows x;  // [rows, k]
  int64_t k;
  const float* norm;  // [k], null = as they are
  float eps;
};

// What a block shares beside the inputs.
template <int M>
struct RowsOf {
  const float* rows[M];  // where they are; null = there is none
  float factor[M];       // of the norm
  float sums[kMatvecWarps];
};

// A row's squares are summed in as many parts as a block has warps, which take 128 values in turn,
// a lane four, and the parts are added in order. So a warp each or one warp for all parts come to
// the same bits.
constexpr int64_t kNormTurn = kMatvecWarps * kWarp * 4;

// The sums of parts [first, first + kParts), each over the warp.
template <int kParts>
__device__ __forceinline__ void sum_squares(const float* row, int64_t k, int first,
                                            float (&sum)[kParts]) {
  constexpr int kAhead = 8 / kParts;  // turns whose loads are on their way together
  const bool wide = k % 4 == 0 && aligned(row);
  const int64_t own = (first * kWarp + dev::thread() % kWarp) * 4;
#pragma unroll
  for (int p = 0; p < kParts; ++p) sum[p] = 0.0f;
#pragma unroll 1
  for (int64_t begin = own; begin < k; begin += kAhead * kNormTurn) {
    Chunk x[kAhead][kParts];
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        const int64_t at = begin + a * kNormTurn + p * kWarp * 4;
        if (wide) {
          x[a][p] = dev::load_if(at < k, row + at);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) x[a][p].word[i] = at + i < k ? dev::bits_of(row[at + i]) : 0u;
        }
      }
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
#pragma unroll
      for (int p = 0; p < kParts; ++p)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float value = dev::float_of(x[a][p].word[i]);
          sum[p] = fmaf(value, value, sum[p]);
        }
  }
#pragma unroll
  for (int p = 0; p < kParts; ++p) sum[p] = warp_sum(sum[p]);
}

__device__ __forceinline__ float norm_factor(const Input& in, const float (&sums)[kMatvecWarps]) {
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kMatvecWarps; ++w) total += sums[w];
  return 1.0f / sqrtf(total / static_cast<float>(in.k) + in.eps);
}

// The norm's factor of a row, by the whole block; sums: shared.
__device__ __forceinline__ float norm_factor_of_block(const Input& in, const float* row,
                                                      float (&sums)[kMatvecWarps]) {
  const int warp = dev::thread() / kWarp;
  float sum[1];
  sum_squares<1>(row, in.k, warp, sum);
  if (dev::thread() % kWarp == 0) sums[warp] = sum[0];
  dev::sync_block();
  return norm_factor(in, sums);
}

// The same by a warp.
__device__ __forceinline__ float norm_factor_of_warp(const Input& in, const float* row) {
  float sums[kMatvecWarps];
  sum_squares<kMatvecWarps>(row, in.k, 0, sums);
  return norm_factor(in, sums);
}

// How many inputs of each row are in shared memory at a time, a multiple of kMatvecStep.
template <int M>
constexpr int64_t matvec_chunk(int64_t k) {
  const int64_t room = kMatvecInputs / M, needed = ceil_div(k, kMatvecStep) * kMatvecStep;
  return needed < room ? needed : room;
}

template <int M>
constexpr size_t matvec_shared_bytes(int64_t k) {
  return static_cast<size_t>(M * matvec_chunk<M>(k)) * sizeof(float) + sizeof(RowsOf<M>);
}

// x[begin, begin + chunk) of all rows into shared memory, zeros behind k and for rows that are not
// there. A thread asks for several eights before it writes the first one.
template <int M>
__device__ __forceinline__ void stage_eights(const Input& in, const RowsOf<M>& of, int64_t begin,
                                             int chunk, float* shared) {
  constexpr int kAhead = M == 1 ? 2 : 4;  // what the registers hold
  const int of_row = chunk / 8, all = M * of_row;
  const bool normed = in.norm != nullptr;
#pragma unroll 1
  for (int first = dev::thread(); first < all; first += kAhead * kMatvecThreads) {
    Chunk x[kAhead][2], norm[kAhead][2];
    float factor[kAhead];
    float* to[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int own = first + a * kMatvecThreads, m = M == 1 ? 0 : own / of_row;
      const int eighth = own - m * of_row;
      const int64_t at = begin + eighth * 8;
      const float* row = own < all ? of.rows[m] : nullptr;
      const bool there = row != nullptr && at < in.k;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        x[a][half] = dev::load_if(there, row + at + half * 4);
        norm[a][half] = dev::load_if(there && normed, in.norm + at + half * 4);
      }
      factor[a] = there && normed ? of.factor[m] : 1.0f;
      to[a] = own < all ? shared + m * chunk + eighth * 4 : nullptr;
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (to[a] == nullptr) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Four values;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float value = dev::float_of(x[a][half].word[i]);
          values.value[i] =
              normed ? value * factor[a] * dev::float_of(norm[a][half].word[i]) : value;
        }
        *reinterpret_cast<Four*>(to[a] + half * (chunk / 2)) = values;
      }
    }
  }
}

template <int M>
__device__ void stage(const Input& in, const RowsOf<M>& of, int64_t begin, int64_t chunk,
                      float* shared) {
  bool wide = in.k % 8 == 0 && aligned(in.norm);
  for (int m = 0; m < M; ++m) wide = wide && aligned(of.rows[m]);
  if (wide) return stage_eights<M>(in, of, begin, static_cast<int>(chunk), shared);
#pragma unroll 1
  for (int m = 0; m < M; ++m) {
    const float* row = of.rows[m];
    const float factor = of.factor[m];
    float* own = shared + m * chunk;
    for (int64_t i = dev::thread(); i < chunk; i += kMatvecThreads) {
      const int64_t at = begin + i;
      float value = 0.0f;
      if (row != nullptr && at < in.k) {
        value = row[at];
        if (in.norm != nullptr) value = value * factor * in.norm[at];
      }
      own[(i & 4 ? chunk / 2 : 0) + i / 8 * 4 + i % 4] = value;
    }
  }
}

// The two rows of weights of each of a warp's pairs.
template <class T, int P>
using WeightRows = const T* [P][2];

// Rows that are not there are others, and what they give is not stored: no load asks which they
// are.
template <class T, int P, class Op>
__device__ __forceinline__ void find_weights(const Op& op, int64_t first, WeightRows<T, P>& rows) {
#pragma unroll
  for (int p = 0; p < P; ++p) {
    Pair<T> pair = op.pair(first + p < op.units() ? first + p : first);
    if (pair.a == nullptr) pair.a = op.pair(0).a;
    rows[p][0] = pair.a;
    rows[p][1] = pair.b == nullptr ? pair.a : pair.b;
  }
}

// sum[m] += x[m] w over eight inputs. low: the first four of the first row of x; the others are
// half a chunk behind.
template <int M, int P>
__device__ __forceinline__ void add_products(const float (&w)[P][2][8], const float* low, int chunk,
                                             float (&sum)[M][P][2]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
    dev::keep_order();  // one row's inputs at a time: all together would not fit the registers
    const Four x[2] = {*reinterpret_cast<const Four*>(low + m * chunk),
                       *reinterpret_cast<const Four*>(low + m * chunk + chunk / 2)};
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int p = 0; p < P; ++p)
#pragma unroll
        for (int side = 0; side < 2; ++side)
          sum[m][p][side] = fmaf(x[j / 4].value[j % 4], w[p][side][j], sum[m][p][side]);
  }
}

// Steps whose weights are asked for together: eight loads of 16 bytes are on their way at a time.
template <class T, int P>
constexpr int kStepsAhead = 8 / (2 * P * static_cast<int>(sizeof(T) / 2));

// The products of that many steps; a lane's inputs are [i, i + 8) of the first, below `end`, and
// unless kWhole the last steps may be beyond it. weights: at the chunk's beginning.
template <bool kWhole, class T, int M, int P>
__device__ __forceinline__ void add_steps(const WeightRows<T, P>& weights, const float* shared,
                                          int chunk, int i, int end, float (&sum)[M][P][2]) {
  constexpr int kSteps = kStepsAhead<T, P>;
  Eight<T> raw[kSteps][P][2];
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int p = 0; p < P; ++p)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int at = i + step * kMatvecStep;
        const T* from = weights[p][side] + at;
        raw[step][p][side] = kWhole ? fetch_eight(from) : fetch_eight_if(at < end, from);
      }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int at = i + step * kMatvecStep;
    if (!kWhole && at >= end) break;
    float w[P][2][8];
#pragma unroll
    for (int p = 0; p < P; ++p)
#pragma unroll
      for (int side = 0; side < 2; ++side) unpack(raw[step][p][side], w[p][side]);
    add_products(w, shared + at / 2, chunk, sum);
  }
}

// The products of a chunk, whose first `end` inputs there are.
template <class T, int M, int P>
__device__ __forceinline__ void add_chunk(const WeightRows<T, P>& weights, const float* shared,
                                          int chunk, int end, float (&sum)[M][P][2]) {
  constexpr int kInputs = kStepsAhead<T, P> * kMatvecStep;
  const int own = dev::thread() % kWarp * 8, whole = end / kInputs * kInputs;
#pragma unroll 1
  for (int i = 0; i < whole; i += kInputs)
    add_steps<true, T>(weights, shared, chunk, i + own, end, sum);
  if (whole < end) add_steps<false, T>(weights, shared, chunk, whole + own, end, sum);
}

// The same where rows of weights begin anywhere, weight by weight.
template <class T, int M, int P>
__device__ __forceinline__ void add_chunk_anywhere(const WeightRows<T, P>& weights,
                                                   const float* shared, int chunk, int end,
                                                   float (&sum)[M][P][2]) {
#pragma unroll 1
  for (int i = dev::thread() % kWarp * 8; i < end; i += kMatvecStep) {
    float w[P][2][8];
#pragma unroll
    for (int p = 0; p < P; ++p)
#pragma unroll
      for (int side = 0; side < 2; ++side)
#pragma unroll
        for (int j = 0; j < 8; ++j)
          w[p][side][j] = i + j < end ? to_float(weights[p][side][i + j]) : 0.0f;
    add_products(w, shared + i / 2, chunk, sum);
  }
}

// Of a row of weights, from its beginning: a short one whole, or what the first step or two take.
template <class T>
__device__ __forceinline__ int64_t first_bytes(int64_t k) {
  constexpr int64_t kWhole = 4096, kBeginning = 2048;
  const int64_t bytes = k * static_cast<int64_t>(sizeof(T));
  return bytes <= kWhole ? bytes : kBeginning;
}

// The beginnings of the weights of a task's warp come closer, while what they are multiplied with
// is still on its way.
template <class T, int P, class Op>
__device__ __forceinline__ void prefetch_first(const Input& in, const Op& op, int64_t task) {
  const int64_t first = (task * kMatvecWarps + dev::thread() / kWarp) * P;
#pragma unroll
  for (int p = 0; p < P; ++p) {
    if (first + p >= op.units()) break;
    const Pair<T> pair = op.pair(first + p);
    if (pair.a != nullptr) dev::prefetch_by_warp(pair.a, first_bytes<T>(in.k));
    if (pair.b != nullptr) dev::prefetch_by_warp(pair.b, first_bytes<T>(in.k));
  }
}

// Which rows of x there are, count of them, at most M, and the factors of their norms, into shared
// memory; row_at(m) says where the m-th one is.
template <int M, class RowAt>
__device__ __forceinline__ void find_rows(const Input& in, int64_t count, const RowAt& row_at,
                                          float* shared) {
  auto& of = *reinterpret_cast<RowsOf<M>*>(shared + M * matvec_chunk<M>(in.k));
  if (dev::thread() < M)
    of.rows[dev::thread()] = dev::thread() < count ? row_at(dev::thread()) : nullptr;
  dev::sync_block();
  if (in.norm == nullptr) return;
  if (M == 1 || count == 1) {
    const float factor = norm_factor_of_block(in, of.rows[0], of.sums);
    if (dev::thread() == 0) of.factor[0] = factor;
  } else {
#pragma unroll 1
    for (int m = dev::thread() / kWarp; m < M && m < count; m += kMatvecWarps) {
      const float factor = norm_factor_of_warp(in, of.rows[m]);
      if (dev::thread() % kWarp == 0) of.factor[m] = factor;
    }
  }
  dev::sync_block();
}

// The weights of the chunk behind the present one, `left` inputs or fewer, while this one is
// staged.
template <class T, int P>
__device__ __forceinline__ void prefetch_next(const WeightRows<T, P>& weights, int64_t chunk,
                                              int64_t left) {
#pragma unroll
  for (int p = 0; p < P; ++p)
#pragma unroll
    for (int side = 0; side < 2; ++side)
      dev::prefetch_by_warp(weights[p][side] + chunk, first_bytes<T>(left < chunk ? left : chunk));
}

// P pairs of a warp and the rows that were found, [begin, begin + count) of the op's. block: which
// of those that share the units. staged: all inputs are in shared memory already.
template <class T, int M, int P, class Op>
__device__ __forceinline__ void multiply_rows(const Input& in, int64_t begin, int64_t count,
                                              const Op& op, float* shared, int64_t block,
                                              bool staged) {
  const int lane = dev::thread() % kWarp, warp = dev::thread() / kWarp;
  const int64_t chunk = matvec_chunk<M>(in.k);
  const auto& of = *reinterpret_cast<const RowsOf<M>*>(shared + M * chunk);
  const int64_t first = (block * kMatvecWarps + warp) * P;
  const bool aligned = in.k % 8 == 0, idle = first >= op.units();
  WeightRows<T, P> weights;
  find_weights<T, P>(op, idle ? 0 : first, weights);
  float sum[M][P][2] = {};
  for (int64_t at = 0; at < in.k; at += chunk) {
    if (M > 1 && at + chunk < in.k && !idle) prefetch_next<T, P>(weights, chunk, in.k - at - chunk);
    if (!staged) {
      if (at > 0) dev::sync_block();
      stage<M>(in, of, at, chunk, shared);
      dev::sync_block();
    }
    const int end = static_cast<int>(idle ? 0 : in.k - at < chunk ? in.k - at : chunk);
    if (aligned) {
      add_chunk<T>(weights, shared, static_cast<int>(chunk), end, sum);
    } else {
      add_chunk_anywhere<T>(weights, shared, static_cast<int>(chunk), end, sum);
    }
#pragma unroll
    for (int p = 0; p < P; ++p)
#pragma unroll
      for (int side = 0; side < 2; ++side) weights[p][side] += chunk;
  }
  // Every lane gets every sum and keeps one pair of them.
  float own[2] = {};
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int p = 0; p < P; ++p)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const float total = warp_sum(sum[m][p][side]);
        if (lane == m * P + p) own[side] = total;
      }
  const int64_t unit = first + lane % P;
  if (lane < M * P && lane / P < count && unit < op.units() && op.pair(unit).a != nullptr)
    op.store(unit, begin + lane / P, own[0], own[1]);
}

// A block's share of a product: tasks `task`, `task + blocks`, ..., each P pairs of every warp. The
// inputs are staged once where all of them fit. Rows were found before.
template <class T, int M, int P, class Op>
__device__ __forceinline__ void multiply_in_turn(const Input& in, int64_t begin, int64_t count,
                                                 const Op& op, float* shared, int64_t task,
                                                 int64_t blocks) {
  const int64_t tasks = matvec_blocks(op.units(), P);
  const bool whole = in.k <= matvec_chunk<M>(in.k);
#pragma unroll 1
  for (bool staged = false; task < tasks; task += blocks) {
    if (task + blocks < tasks) prefetch_first<T, P>(in, op, task + blocks);
    multiply_rows<T, M, P>(in, begin, count, op, shared, task, staged);
    staged = whole;
    if (!whole) dev::sync_block();  // what was staged has been read
  }
}

// The same for rows [begin, begin + count), at most M, that are to be found first.
template <class T, int M, int P, class Op, class RowAt>
__device__ __forceinline__ void matvec(const Input& in, int64_t begin, int64_t count,
                                       const RowAt& row_at, const Op& op, float* shared,
                                       int64_t task, int64_t blocks) {
  find_rows<M>(in, count, row_at, shared);
  multiply_in_turn<T, M, P>(in, begin, count, op, shared, task, blocks);
}

// The same where the device alone knows how many rows there are: few of M take what few rows take,
// less to compute for each weight.
template <class T, int M, int P, class Op, class RowAt>
__device__ __forceinline__ void matvec_of_live(const Input& in, int64_t begin, int64_t count,
                                               const RowAt& row_at, const Op& op, float* shared,
                                               int64_t task, int64_t blocks) {
  if constexpr (M > 1 && sizeof(T) == 2) {
    constexpr int kFewer = M == 8 ? 4 : 1;
    if (count <= kFewer)
      return matvec_of_live<T, kFewer, P>(in, begin, count, row_at, op, shared, task, blocks);
  }
  matvec<T, M, P>(in, begin, count, row_at, op, shared, task, blocks);
}

// Blocks of a multiprocessor that registers must leave room for.
constexpr int matvec_resident(int m) { return m == 1 ? 6 : 3; }

// Pairs of a warp: with many rows two, so that each value of x that is read serves four products.
constexpr int matvec_pairs(int m) { return m < 4 ? 1 : 2; }

// body(integral_constant<M>) with the least M in {1, 4, 8} that holds the rows; beyond 8 rows
// blocks along y take 8 each.
template <class Body>
void with_few_rows(int64_t rows, const Body& body) {
  if (rows <= 1) return body(std::integral_constant<int, 1>{});
  if (rows <= 4) return body(std::integral_constant<int, 4>{});
  body(std::integral_constant<int, 8>{});
}

// The same for a model's weights: those of float32, which are for comparison, have the last kernel
// alone.
template <class T, class Body>
void with_rows(int64_t rows, const Body& body) {
  if constexpr (sizeof(T) == 2) {
    with_few_rows(rows, body);
  } else {
    body(std::integral_constant<int, 8>{});
  }
}

// Outputs n of a matrix in pairs (a, a + 8) of groups of 16: tiles.cuh takes the same ones.
__device__ __forceinline__ int64_t paired_output(int64_t unit) { return unit / 8 * 16 + unit % 8; }
constexpr int64_t paired_units(int64_t n) { return ceil_div(n, 16) * 8; }

template <class T>
__device__ __forceinline__ Pair<T> paired_rows(const PackedMatrix& w, int64_t unit) {
  const int64_t n = paired_output(unit);
  return {n < w.n ? weight_row<T>(w, n) : nullptr, n + 8 < w.n ? weight_row<T>(w, n + 8) : nullptr};
}

}  // namespace flexidepth::cuda
