#include "cpu/isa.h"

#include <cstdlib>

#include "core/check.h"

#if defined(FD_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace flexidepth::cpu {

namespace {

#ifdef FD_X86
// Whether the processor has AMX and the system lets this process use its tiles, for which it has to
// be asked once.
bool may_use_tiles() {
#ifdef __linux__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // <asm/prctl.h>, of later systems
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;  // of leaf 7, edx
  static const bool allowed = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBFloat16) != 0 &&
           (d & kTile) != 0 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return allowed;
#else
  return false;
#endif
}
#endif

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names{"generic"};
#ifdef FD_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    names.emplace_back("avx2");
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      names.emplace_back("avx512");
      if (__builtin_cpu_supports("avx512bf16")) {
        names.emplace_back("avx512bf16");
        if (may_use_tiles()) names.emplace_back("amx");
      }
    }
  }
#endif
  return names;
}

const Kernels* kernels_for(const std::string& isa) {
  std::string known;
  bool found = false;
  for (const auto& name : available_isas()) {
    known += (known.empty() ? "" : ", ") + name;
    found = found || name == isa;
  }
  check(found, ErrorKind::kUnsupported, "isa: '", isa,
        "' was asked; this build and processor have ", known,
        "; set FLEXIDEPTH_ISA to one of these or unset it");
#ifdef FD_X86
  if (isa == "avx2") return kernels_avx2();
  if (isa == "avx512") return kernels_avx512();
  if (isa == "avx512bf16") return kernels_avx512bf16();
  if (isa == "amx") return kernels_amx();
#endif
  return kernels_generic();
}

const Kernels* default_kernels() {
  const char* forced = std::getenv("FLEXIDEPTH_ISA");
  if (forced != nullptr && *forced != '\0') return kernels_for(forced);
  return kernels_for(available_isas().back());
}

}  // namespace flexidepth::cpu
