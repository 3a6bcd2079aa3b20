#include "engine/scratch.h"

#include <algorithm>
#include <cstring>

#include "ops/attention.h"

namespace flexidepth {

namespace {

int64_t floats_per_row(const ModelShape& s) {
  return 2 * s.hidden_size + 2 * s.query_width() + 2 * s.kv_width() + s.router_dim +
         (s.strict_router ? s.hidden_size : 0) + std::max(s.intermediate_size, s.adapter_dim) +
         s.head_dim + 3;
}

constexpr size_t kIntegerBytesPerRow = 3 * sizeof(int32_t) + sizeof(int64_t);
constexpr size_t kPieces = 24;  // an upper bound on take() calls, each of which may round up

size_t scratch_bytes(const ModelShape& s, int64_t max_rows) {
  const auto rows = static_cast<size_t>(max_rows);
  return rows * (static_cast<size_t>(floats_per_row(s)) * sizeof(float) + kIntegerBytesPerRow) +
         cpu::attention_scratch_floats(s.head_dim) * sizeof(float) + kPieces * kAlignment;
}

}  // namespace

Scratch::Scratch(const ModelShape& s, int64_t max_rows) : arena(scratch_bytes(s, max_rows)) {
  const auto floats = [&](int64_t per_row) {
    return reinterpret_cast<float*>(
        arena.take(static_cast<size_t>(max_rows * per_row) * sizeof(float)));
  };
  h = floats(s.hidden_size);
  x = floats(s.hidden_size);
  q = floats(s.query_width());
  k = floats(s.kv_width());
  v = floats(s.kv_width());
  attention = floats(s.query_width());
  encoded = floats(s.router_dim);
  decoded = floats(s.strict_router ? s.hidden_size : 0);
  activation = floats(std::max(s.intermediate_size, s.adapter_dim));
  cos_sin = floats(s.head_dim);
  gates = floats(1);
  run_scale = floats(1);
  skip_scale = floats(1);
  partials = reinterpret_cast<float*>(
      arena.take(cpu::attention_scratch_floats(s.head_dim) * sizeof(float)));
  float_bytes_ = arena.used();
  const auto take = [&](auto*& pointer) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(
        arena.take(static_cast<size_t>(max_rows) * sizeof(*pointer)));
  };
  take(run_index);
  take(skip_index);
  take(sequences);
  take(positions);
}

void Scratch::poison() { std::memset(arena.data(), 0xff, float_bytes_); }

}  // namespace flexidepth
