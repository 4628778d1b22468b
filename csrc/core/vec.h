// Vectors as wide as the instruction set in use, and the vector primitives of the factorizations.
//
// Everything under core/ is compiled once per instruction set, in the namespace CONDLR_ISA, and uses no
// inline code of the standard library: the linker could merge such code across instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "workspace.h"

#if defined(__FAST_MATH__)
#error "condlr_ext finds NaN and Inf by arithmetic: do not compile it with -ffast-math"
#endif

#if defined(__clang__)
#define CONDLR_UNROLL _Pragma("unroll")
#define CONDLR_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define CONDLR_UNROLL _Pragma("GCC unroll 16")
#define CONDLR_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace condlr {
namespace CONDLR_ISA {

template <class T>
struct Vec {
  static constexpr int kLanes = CONDLR_VECTOR_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(CONDLR_VECTOR_BYTES)));

  static inline type load(const T* p) {
    type v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static inline void store(T* p, const type& v) { std::memcpy(p, &v, sizeof v); }

  // The first n lanes, 0 < n < kLanes; the other lanes of a load are zero.
#if defined(__AVX512F__)
  static inline type load(const T* p, int64_t n) {
    if constexpr (sizeof(T) == 4) {
      return (type)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
    } else {
      return (type)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
    }
  }
  static inline void store(T* p, const type& v, int64_t n) {
    if constexpr (sizeof(T) == 4) {
      _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
    } else {
      _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), (__m512d)v);
    }
  }
#else
  static inline type load(const T* p, int64_t n) {
    type v{};
    std::memcpy(&v, p, sizeof(T) * static_cast<std::size_t>(n));
    return v;
  }
  static inline void store(T* p, const type& v, int64_t n) {
    std::memcpy(p, &v, sizeof(T) * static_cast<std::size_t>(n));
  }
#endif
};

// The 16-byte parts of a vector, to which a sum over lanes is reduced first.
template <class T>
struct Part {
  static constexpr int kLanes = 16 / sizeof(T);
  typedef T type __attribute__((vector_size(16)));
};

template <class T>
inline void store_part(const typename Vec<T>::type& v, T* out) {
  constexpr int kParts = CONDLR_VECTOR_BYTES / 16;
  typename Part<T>::type part[kParts];
  std::memcpy(part, &v, sizeof v);
  CONDLR_UNROLL
  for (int i = 1; i < kParts; ++i) part[0] += part[i];
  std::memcpy(out, part, 16);
}

// Sum over lanes.
template <class T>
inline T total(const typename Vec<T>::type& v) {
  T part[Part<T>::kLanes], sum = 0;
  store_part<T>(v, part);
  for (int i = 0; i < Part<T>::kLanes; ++i) sum += part[i];
  return sum;
}

template <class T>
inline T dot(const T* x, const T* y, int64_t n) {
  using V = Vec<T>;
  constexpr int kStep = 4 * V::kLanes;
  typename V::type sum[4] = {};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    CONDLR_UNROLL
    for (int k = 0; k < 4; ++k) sum[k] += V::load(x + i + k * V::kLanes) * V::load(y + i + k * V::kLanes);
  }
  for (; i + V::kLanes <= n; i += V::kLanes) sum[0] += V::load(x + i) * V::load(y + i);
  T result = total<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < n; ++i) result += x[i] * y[i];
  return result;
}

// y += a x
template <class T>
inline void axpy(int64_t n, T a, const T* __restrict x, T* __restrict y) {
  for (int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}

template <class T>
inline void scale(int64_t n, T a, T* x) {
  for (int64_t i = 0; i < n; ++i) x[i] *= a;
}

// Σ x² and Σ |x|
template <class T>
inline T sum_of_squares(const T* x, int64_t n) {
  using V = Vec<T>;
  typename V::type sum{};
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) sum += V::load(x + i) * V::load(x + i);
  T total = 0;
  for (int k = 0; k < V::kLanes; ++k) total += sum[k];
  for (; i < n; ++i) total += x[i] * x[i];
  return total;
}

template <class T>
inline T sum_of_magnitudes(const T* x, int64_t n) {
  using V = Vec<T>;
  typename V::type sum{};
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) {
    const typename V::type v = V::load(x + i);
    sum += v < 0 ? -v : v;
  }
  T total = 0;
  for (int k = 0; k < V::kLanes; ++k) total += sum[k];
  for (; i < n; ++i) total += x[i] < 0 ? -x[i] : x[i];
  return total;
}

template <class T>
inline bool all_finite(const T* x, int64_t n) {
  int bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= !(x[i] - x[i] == 0);
  return bad == 0;
}

template <class T>
inline void fill(T* x, int64_t n, T value) {
  for (int64_t i = 0; i < n; ++i) x[i] = value;
}

template <class T>
inline typename Vec<T>::type broadcast(T value) {
  return value - typename Vec<T>::type{};
}

template <class T>
inline typename Vec<T>::type square_root(const typename Vec<T>::type& v) {
  T lanes[Vec<T>::kLanes];
  Vec<T>::store(lanes, v);
  for (int i = 0; i < Vec<T>::kLanes; ++i) lanes[i] = __builtin_sqrt(lanes[i]);
  return Vec<T>::load(lanes);
}

template <class T>
inline typename Vec<T>::type magnitude(const typename Vec<T>::type& v) {
  return v < 0 ? -v : v;
}

// Whether any lane of the result of a comparison is set.
template <class Mask>
inline bool any(const Mask& mask) {
  int64_t words[CONDLR_VECTOR_BYTES / 8], all = 0;
  std::memcpy(words, &mask, sizeof words);
  for (int64_t word : words) all |= word;
  return all != 0;
}

// The length of a row of n in whole vectors, an odd number of them so that rows spread over the sets of the
// cache.
template <class T>
inline int64_t row_stride(int64_t n) {
  return ((n + Vec<T>::kLanes - 1) / Vec<T>::kLanes | 1) * Vec<T>::kLanes;
}

// Memory of a workspace, released at the end of the scope.
class Scratch {
 public:
  explicit Scratch(Workspace& workspace) : workspace_(workspace), mark_(workspace.mark()) {}
  ~Scratch() { workspace_.release(mark_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(int64_t n) {
    return static_cast<T*>(workspace_.take(sizeof(T) * static_cast<std::size_t>(n)));
  }

 private:
  Workspace& workspace_;
  Workspace::Mark mark_;
};

}  // namespace CONDLR_ISA
}  // namespace condlr
