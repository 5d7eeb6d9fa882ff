// Values of weights one by one: what embeddings are made of. Not fast, and in every variant the same code.
//
// A code times its scale is exact in fp32 in all formats but for the minimum of affine4, which is subtracted last.
#include "formats.hpp"

#include <limits>
#include <stdexcept>

namespace elmoe {

namespace {
constexpr int8_t kNonlinear[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t kE2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// fp16 to float, exactly: also for subnormal scales.
float half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float value = exponent ? static_cast<float>(1024 + mantissa) : static_cast<float>(mantissa);
    for (int e = exponent ? exponent : 1; e < 25; ++e) value *= 0.5f;
    for (int e = 25; e < exponent; ++e) value *= 2.0f;
    if (exponent == 31)  // of a damaged file: what reads it fails by name
        value = mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
    return bits & 0x8000 ? -value : value;
}

float power(int exponent) {  // 2^(exponent - 128)
    float value = 1.0f;
    for (int e = exponent; e < 128; ++e) value *= 0.5f;
    for (int e = 128; e < exponent; ++e) value *= 2.0f;
    return value;
}

// The scales of a row in a group, two where halves of it differ.
struct RowScales {
    float first, second, minimum;
};

RowScales scales_of(const Matrix& m, int64_t block, int n, int g) {
    const FormatShape& shape = shape_of(m.format);
    auto value = [&](const uint16_t* halves, int span) {
        return half(halves[(block * ceil_div(m.groups(), span) + g / span) * kBlockRows + n]);
    };
    const uint8_t* steps = m.steps ? m.steps + (block * m.groups() + g) * shape.steps + n : nullptr;
    const auto* integers = reinterpret_cast<const int8_t*>(steps);
    const float scale = shape.scales ? value(m.scales, shape.scales) : 0.0f;
    switch (m.format) {
        case Format::affine4_1:
            return {scale, scale, value(m.minima, 1)};
        case Format::affine4_k:
            return {scale * steps[0], scale * steps[0], value(m.minima, kSuper) * steps[kBlockRows]};
        case Format::table4_xs:
            return {scale * integers[0], scale * integers[0], 0.0f};
        case Format::table4_mx:
            return {power(steps[0]), power(steps[0]), 0.0f};
        case Format::planes6:
            return {scale * integers[0], scale * integers[kBlockRows], 0.0f};
        default:
            return {scale, scale, 0.0f};
    }
}

// The integer of column c of a group, whose plane begins at hi.
int integer_of(const Matrix& m, const uint8_t* hi, const uint8_t* lo, int n, int c) {
    const int byte = 64 * (c % 16 / 4) + 4 * n + c % 4, shift = c < 16 ? 0 : 4, code = hi[byte] >> shift & 15;
    switch (m.format) {
        case Format::nested8:
            return 16 * (code - 8) + (lo[byte] >> shift & 15);
        case Format::affine4_0:
            return code - 8;
        case Format::table4_nl:
        case Format::table4_xs:
            return kNonlinear[code];
        case Format::table4_mx:
            return kE2m1[code];
        case Format::planes6: {
            const int pair = 4 * (c % 8 / 4) + (c < 16 ? 0 : 2);
            return 4 * code - 32 + (lo[64 * (c % 16 / 8) + 4 * n + c % 4] >> pair & 3);
        }
        default:
            return code;
    }
}
}  // namespace

Format format_named(const std::string& name) {
    for (int i = 0; i < kFormats; ++i)
        if (name == kFormatShapes[i].name) return static_cast<Format>(i);
    throw std::invalid_argument("there is no format '" + name + "'");
}

void dequantize_row(const Matrix& m, int row, float* out) {
    const int64_t block = row / kBlockRows, groups = m.groups();
    const int n = row % kBlockRows, lo_bytes = shape_of(m.format).lo;
    const bool minima = shape_of(m.format).minima;
    for (int g = 0; g < groups; ++g) {
        const RowScales scales = scales_of(m, block, n, g);
        const uint8_t *hi = m.hi + (block * groups + g) * kGroupBytes, *lo = lo_bytes ? m.lo + (block * groups + g) * lo_bytes : nullptr;
        for (int c = 0; c < kGroup && g * kGroup + c < m.columns; ++c) {
            const float product = static_cast<float>(integer_of(m, hi, lo, n, c)) * (c < 16 ? scales.first : scales.second);
            out[g * kGroup + c] = minima ? product - scales.minimum : product;
        }
    }
}

}  // namespace elmoe
