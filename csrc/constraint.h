// The check of tau, band and sigma_max for the torch ops and for _core.
#pragma once

#include <sstream>
#include <string>

#include "core/info.h"

namespace condlr {

// The error text, or an empty string.
inline std::string constraint_error(const std::string& where, double tau, double band, double sigma_max) {
  std::ostringstream text;
  if (!(tau >= 0)) {
    text << where << ": tau must be >= 0 (inf for no clip), got " << tau;
  } else if (band != kRms && band != kMean && band != kOptimal) {
    text << where << ": band must be 0 (rms), 1 (mean) or 2 (optimal), got " << band;
  } else if (!(sigma_max > 0)) {
    text << where << ": sigma_max must be > 0 (inf for no cap), got " << sigma_max;
  }
  return text.str();
}

}  // namespace condlr
