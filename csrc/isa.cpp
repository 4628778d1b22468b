// Run-time choice of the instruction set.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace condlr {

#ifdef CONDLR_X86_LEVELS

std::vector<std::pair<std::string, bool>> cpu_features() {
  __builtin_cpu_init();
  return {{"avx2", __builtin_cpu_supports("avx2") != 0},
          {"fma", __builtin_cpu_supports("fma") != 0},
          {"avx512f", __builtin_cpu_supports("avx512f") != 0},
          {"avx512dq", __builtin_cpu_supports("avx512dq") != 0},
          {"avx512vl", __builtin_cpu_supports("avx512vl") != 0},
          {"avx512bw", __builtin_cpu_supports("avx512bw") != 0}};
}

static std::vector<IsaLevel> detect() {
  bool features_of_avx2 = true, features_of_avx512 = true;
  for (const auto& [name, present] : cpu_features()) {
    features_of_avx512 = features_of_avx512 && present;
    if (name == "avx2" || name == "fma") features_of_avx2 = features_of_avx2 && present;
  }
  return {{"baseline", &baseline::kernels, true},
          {"avx2", &avx2::kernels, features_of_avx2},
          {"avx512", &avx512::kernels, features_of_avx512}};
}

#else

std::vector<std::pair<std::string, bool>> cpu_features() { return {}; }

static std::vector<IsaLevel> detect() { return {{"baseline", &baseline::kernels, true}}; }

#endif

const std::vector<IsaLevel>& isa_levels() {
  static const std::vector<IsaLevel> levels = detect();
  return levels;
}

const IsaLevel& isa_level(const std::string& name) {
  std::string supported;
  for (const IsaLevel& level : isa_levels()) {
    if (!level.supported) continue;
    if (name == level.name) return level;
    supported += (supported.empty() ? "" : ", ") + std::string(level.name);
  }
  throw std::invalid_argument("condlr_ext: instruction set must be one this machine runs (" + supported +
                              "), got '" + name + "'");
}

static const IsaLevel& choose() {
  if (const char* name = std::getenv("CONDLR_EXT_ISA")) {
    try {
      return isa_level(name);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(std::string(error.what()) +
                                  " (from the environment variable CONDLR_EXT_ISA)");
    }
  }
  const IsaLevel* best = nullptr;
  for (const IsaLevel& level : isa_levels()) {
    if (level.supported) best = &level;
  }
  return *best;
}

const IsaLevel& default_isa() {
  static const IsaLevel& level = choose();
  return level;
}

}  // namespace condlr
