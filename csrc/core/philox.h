// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a random
// draw as a pure function of (seed, counter), so that a token's draw depends on its seed and
// position alone.
#pragma once

#include <cstdint>

namespace flexidepth {

struct Philox {
  uint32_t word[4];
};

constexpr Philox philox(uint64_t seed, uint64_t counter) {
  uint32_t c[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c[0], p1 = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0,
                   n2 = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[1] = static_cast<uint32_t>(p1);
    c[3] = static_cast<uint32_t>(p0);
    c[0] = n0;
    c[2] = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c[0], c[1], c[2], c[3]}};
}

// Uniform in [0, 1), 53 bits.
constexpr double philox_uniform(uint64_t seed, uint64_t counter) {
  const Philox r = philox(seed, counter);
  const uint64_t bits = (static_cast<uint64_t>(r.word[0]) << 32 | r.word[1]) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

}  // namespace flexidepth
