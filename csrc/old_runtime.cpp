// Our own versions of what a new compiler takes from glibc and libstdc++, so that the libraries load with those of
// manylinux_2_28 (glibc 2.28, GCC 8) wherever they were built. tests/packaging/check.py audits the rest.
#include <cxxabi.h>

#include <new>
#include <sstream>

#define CONDLR_HIDDEN __attribute__((visibility("hidden")))

extern "C" {

// glibc 2.32: whether the process has one thread, so that references are counted without atomics. There may be more.
CONDLR_HIDDEN char __libc_single_threaded = 0;

// GCC 11: std::__throw_bad_array_new_length().
[[noreturn]] CONDLR_HIDDEN void condlr_bad_array() __asm__("_ZSt28__throw_bad_array_new_lengthv");
void condlr_bad_array() { abi::__cxa_throw_bad_array_new_length(); }

// GCC 9: the constructors of std::stringstream and std::ostringstream without arguments.
CONDLR_HIDDEN void condlr_stringstream(void* at) __asm__(
    "_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void condlr_stringstream(void* at) { new (at) std::stringstream(std::ios_base::in | std::ios_base::out); }
CONDLR_HIDDEN void condlr_ostringstream(void* at) __asm__(
    "_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void condlr_ostringstream(void* at) { new (at) std::ostringstream(std::ios_base::out); }

}
