#include "cpu/isa.h"

#include <cstdlib>

#include "core/check.h"

namespace flexidepth::cpu {

std::vector<std::string> available_isas() {
  std::vector<std::string> names{"generic"};
#ifdef FD_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    names.emplace_back("avx2");
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      names.emplace_back("avx512");
      if (__builtin_cpu_supports("avx512bf16")) names.emplace_back("avx512bf16");
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
#endif
  return kernels_generic();
}

const Kernels* default_kernels() {
  const char* forced = std::getenv("FLEXIDEPTH_ISA");
  if (forced != nullptr && *forced != '\0') return kernels_for(forced);
  return kernels_for(available_isas().back());
}

}  // namespace flexidepth::cpu
