#include "common/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fastmmkd {

namespace {

const char* name_of(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

bool has(Isa isa) {
#if FASTMMKD_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  return isa == Isa::baseline || avx2;
#else
  return isa == Isa::baseline;
#endif
}

Isa find(const std::string& name) {
  for (const Isa isa : {Isa::avx512, Isa::avx2, Isa::baseline}) {
    if (has(isa) && (name.empty() || name == name_of(isa))) {
      return isa;
    }
  }
  std::string names;
  for (const std::string& one : isa_names()) {
    names += (names.empty() ? "" : ", ") + one;
  }
  throw std::runtime_error("FASTMMKD_ISA=" + name + ": not one that this CPU has; expected one of " + names);
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{find(std::getenv("FASTMMKD_ISA") ? std::getenv("FASTMMKD_ISA") : "")};
  return isa;
}

}  // namespace

Isa isa() {
  return chosen().load(std::memory_order_relaxed);
}

void set_isa(const std::string& name) {
  chosen() = find(name);
}

std::string isa_name() {
  return name_of(isa());
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const Isa isa : {Isa::avx512, Isa::avx2, Isa::baseline}) {
    if (has(isa)) {
      names.emplace_back(name_of(isa));
    }
  }
  return names;
}

}  // namespace fastmmkd
