// The status codes of the ops and the kinds of bands, with the numbers of the Python side.
#pragma once

namespace condlr {

enum Info : int { kOk = 0, kNotConverged = 1, kNotFinite = 2, kAllZero = 3 };

enum Band : int { kRms = 0, kMean = 1, kOptimal = 2 };

}  // namespace condlr
