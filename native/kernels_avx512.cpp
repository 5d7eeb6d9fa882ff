// The kernels for avx512. The pragma stands behind all standard headers, so that nothing inline of theirs is compiled for it.
#include "kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,f16c")
namespace elmoe {
namespace {
namespace avx512 {
constexpr const char* kName = "avx512";
#include "simd_avx512.inl"

#include "formats_avx512.inl"

#include "formats.inl"

#include "kernels.inl"
}  // namespace avx512
}  // namespace
#pragma GCC pop_options

const Kernels* avx512_kernels() {
    __builtin_cpu_init();
    const bool able = __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
    return able ? avx512::table() : nullptr;
}
}  // namespace elmoe
#else
const elmoe::Kernels* elmoe::avx512_kernels() { return nullptr; }
#endif
