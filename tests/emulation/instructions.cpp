// The instructions of cuda/device.cuh.
#include "core/check.h"
#include "core/dtype.h"
#include "cuda/device.cuh"

namespace flexidepth::cuda::dev {

namespace {

template <class Value>
Value exchanged(Value value, int lane, Place place) {
  struct Lane {
    Value value;
    int from;
  } own{value, lane};
  emulation::warp_step(
      &own,
      [](void* const all[32]) {
        Value values[32];
        for (int i = 0; i < 32; ++i) values[i] = static_cast<Lane*>(all[i])->value;
        for (int i = 0; i < 32; ++i) {
          auto* lane = static_cast<Lane*>(all[i]);
          lane->value = values[lane->from % 32];
        }
      },
      place);
  return own.value;
}

}  // namespace

float shuffle(float value, int lane, Place place) { return exchanged(value, lane, place); }
float shuffle_xor(float value, int lanes, Place place) {
  return exchanged(value, thread() % 32 ^ lanes, place);
}
uint64_t shuffle_xor(uint64_t value, int lanes, Place place) {
  return exchanged(value, thread() % 32 ^ lanes, place);
}

uint32_t ballot(bool value, Place place) {
  struct Lane {
    bool value;
    uint32_t all;
  } own{value, 0};
  emulation::warp_step(
      &own,
      [](void* const all[32]) {
        uint32_t bits = 0;
        for (int i = 0; i < 32; ++i)
          bits |= static_cast<uint32_t>(static_cast<Lane*>(all[i])->value) << i;
        for (int i = 0; i < 32; ++i) static_cast<Lane*>(all[i])->all = bits;
      },
      place);
  return own.all;
}

namespace {

Chunk copy_chunk(const void* from) {
  check(reinterpret_cast<uintptr_t>(from) % 16 == 0, ErrorKind::kInternal,
        "a load of 16 bytes from a misaligned address");
  Chunk c;
  std::memcpy(&c, from, sizeof c);
  return c;
}

}  // namespace

Chunk load_once(const void* from) {
  const Chunk c = copy_chunk(from);
  emulation::note_weights(from);
  return c;
}

Chunk load_once_if(bool wanted, const void* from) { return wanted ? load_once(from) : Chunk{}; }

Chunk load_written(const void* from) { return copy_chunk(from); }

Chunk load_written_if(bool wanted, const void* from) {
  return wanted ? load_written(from) : Chunk{};
}

Chunk load_if(bool wanted, const void* from) { return load_written_if(wanted, from); }

float half_bits_to_float(uint16_t bits) { return half_to_float(bits); }

// float32 to binary16, ties to even.
uint16_t float_to_half_bits(float value) {
  const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal: the addition rounds it to a multiple of 2^-24
    const float shifted = float_of(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_of(shifted) - 0x3f000000u));
  }
  magnitude += 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u) >> 13));
}

uint32_t pack(float low, float high, BFloat16) {
  return from_float<BFloat16>(low).bits | uint32_t{from_float<BFloat16>(high).bits} << 16;
}
uint32_t pack(float low, float high, Float16) {
  return from_float<Float16>(low).bits | uint32_t{from_float<Float16>(high).bits} << 16;
}

// PTX's ldmatrix.x4.trans: lane 8 m + r names row r of matrix m; lane 4 c + q then holds of every
// matrix what stands in column c of rows 2 q and 2 q + 1.
void load_transposed(uint32_t (&out)[4], const void* row, Place place) {
  check(reinterpret_cast<uintptr_t>(row) % 16 == 0, ErrorKind::kInternal,
        "a row of a matrix of 16 bytes at a misaligned address");
  struct Lane {
    uint16_t row[8];
    uint32_t* out;
  } own;
  std::memcpy(own.row, row, sizeof own.row);
  own.out = out;
  emulation::warp_step(
      &own,
      [](void* const all[32]) {
        for (int lane = 0; lane < 32; ++lane)
          for (int m = 0; m < 4; ++m) {
            const int column = lane / 4, first = 8 * m + lane % 4 * 2;
            const uint32_t low = static_cast<Lane*>(all[first])->row[column];
            const uint32_t high = static_cast<Lane*>(all[first + 1])->row[column];
            static_cast<Lane*>(all[lane])->out[m] = low | high << 16;
          }
      },
      place);
}

namespace {

struct MmaLane {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};

template <class T>
float element(const uint32_t* words, int i) {
  return to_float(T{static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16))});
}

// The fragments of PTX's mma.m16n8k16: lane = 4 g + q holds
//   a[0..3]: rows g, g + 8, g, g + 8, columns 2 q + {0, 1} and, the latter two, 8 more
//   b[0..1]: row (of b [8, 16]) g, columns 2 q + {0, 1} and 8 more;  c[0..3]: rows g, g, g + 8, g +
//   8
template <class T>
void mma_step(void* const all[32]) {
  float a[16][16], b[8][16];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* own = static_cast<MmaLane*>(all[lane]);
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 8; ++i)
      a[g + (i / 2 % 2) * 8][2 * q + i % 2 + (i / 4) * 8] = element<T>(own->a, i);
    for (int i = 0; i < 4; ++i) b[g][2 * q + i % 2 + (i / 2) * 8] = element<T>(own->b, i);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto* own = static_cast<MmaLane*>(all[lane]);
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; ++i) {
      double sum = 0;
      for (int k = 0; k < 16; ++k)
        sum += static_cast<double>(a[g + (i / 2) * 8][k]) * b[2 * q + i % 2][k];
      own->c[i] = static_cast<float>(own->c[i] + sum);
    }
  }
}

}  // namespace

void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16, Place place) {
  MmaLane own{c, a, b};
  emulation::warp_step(&own, mma_step<BFloat16>, place);
}
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Float16, Place place) {
  MmaLane own{c, a, b};
  emulation::warp_step(&own, mma_step<Float16>, place);
}

}  // namespace flexidepth::cuda::dev
