// The kernels in plain C++, for any processor.
#include "kernels.hpp"

namespace elmoe {
namespace {
namespace portable {
constexpr const char* kName = "portable";
#include "simd_portable.inl"

#include "formats_portable.inl"

#include "formats.inl"

#include "kernels.inl"
}  // namespace portable
}  // namespace

const Kernels* portable_kernels() { return portable::table(); }
}  // namespace elmoe
