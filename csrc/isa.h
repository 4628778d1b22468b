// The compiled instruction sets, those that this CPU supports, and the one in use.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace condlr {

struct IsaLevel {
  const char* name;
  const KernelSet* kernels;
  bool supported;  // by this CPU and operating system
};

// Compiled levels, lowest first.
const std::vector<IsaLevel>& isa_levels();

// The level of that name. Throws std::invalid_argument if it is unknown or not supported here.
const IsaLevel& isa_level(const std::string& name);

// The highest supported level, or the one that CONDLR_EXT_ISA names; throws as isa_level.
const IsaLevel& default_isa();

std::vector<std::pair<std::string, bool>> cpu_features();

}  // namespace condlr
