// The kernels for avx2. The pragma stands behind all standard headers, so that nothing inline of theirs is compiled for it.
#include "kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,f16c")
namespace elmoe {
namespace {
namespace avx2 {
constexpr const char* kName = "avx2";
#include "simd_avx2.inl"

#include "formats_avx2.inl"

#include "formats.inl"

#include "kernels.inl"
}  // namespace avx2
}  // namespace
#pragma GCC pop_options

const Kernels* avx2_kernels() {
    __builtin_cpu_init();
    const bool able = __builtin_cpu_supports("avx2") &&
                      __builtin_cpu_supports("f16c");
    return able ? avx2::table() : nullptr;
}
}  // namespace elmoe
#else
const elmoe::Kernels* elmoe::avx2_kernels() { return nullptr; }
#endif
