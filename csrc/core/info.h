// The codes of the ops: the outcome of one factorization, and the ways to place the band.
#pragma once

namespace condlr {

enum Info : int { kOk = 0, kNotConverged = 1, kNotFinite = 2, kAllZero = 3 };

enum Band : int { kRms = 0, kMean = 1, kOptimal = 2 };

}  // namespace condlr
