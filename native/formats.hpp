// The formats of weights (elmoe.models.formats): which sections a matrix has, and how many bytes they take.
#pragma once

#include <cstdint>
#include <string>

namespace elmoe {

constexpr int kGroup = 32;        // columns of a group
constexpr int kBlockRows = 16;    // output rows interleaved in a block
constexpr int kGroupBytes = 256;  // a plane of nibbles, one group, one block
constexpr int kSuper = 8;         // groups that share a super-scale

enum class Format { nested8, affine4_0, affine4_1, affine4_k, table4_nl, table4_xs, table4_mx, planes6 };
constexpr int kFormats = 8;

// Bytes of a group in one block; groups that share fp16 scales or minima, 0 where there are none.
struct FormatShape {
    const char* name;
    int lo, steps, scales, minima;
};
constexpr FormatShape kFormatShapes[kFormats] = {
    {"nested8", 256, 0, 1, 0},   {"affine4_0", 0, 0, 1, 0},  {"affine4_1", 0, 0, 1, 1},  {"affine4_k", 0, 32, kSuper, kSuper},
    {"table4_nl", 0, 0, 1, 0},   {"table4_xs", 0, 16, kSuper, 0}, {"table4_mx", 0, 16, 0, 0}, {"planes6", 128, 32, kSuper, 0},
};
constexpr const FormatShape& shape_of(Format format) { return kFormatShapes[static_cast<int>(format)]; }

// Throws std::invalid_argument for a name that is none.
Format format_named(const std::string& name);

// Of numbers that are not negative. Unsigned, so that the sum does not overflow.
inline int ceil_div(int value, int divisor) {
    return static_cast<int>((static_cast<unsigned>(value) + static_cast<unsigned>(divisor) - 1) / static_cast<unsigned>(divisor));
}

// Sections as they lie in a store: hi (blocks, groups, 256); lo (blocks, groups, 256 or 128), null where there is none or only a
// draft is wanted; scales, minima (blocks, groups or super-groups, 16) fp16 bits; steps (blocks, groups, 16 or 32).
struct Matrix {
    int rows, columns;
    const uint8_t *hi, *lo;
    const uint16_t* scales;
    Format format = Format::nested8;
    const uint16_t* minima = nullptr;
    const uint8_t* steps = nullptr;
    int blocks() const { return ceil_div(rows, kBlockRows); }
    int groups() const { return ceil_div(columns, kGroup); }
    bool packed() const { return format != Format::nested8; }
    bool whole() const { return lo || !shape_of(format).lo; }  // no slice is missing
    // Bytes that a full product reads of a block.
    int64_t block_bytes() const {
        const FormatShape& shape = shape_of(format);
        const int64_t halves = (shape.scales ? ceil_div(groups(), shape.scales) : 0) + (shape.minima ? ceil_div(groups(), shape.minima) : 0);
        return static_cast<int64_t>(groups()) * (kGroupBytes + shape.lo + shape.steps) + halves * 2 * kBlockRows;
    }
};

// One row as fp32, `columns` values: the value that the format defines. The matrix is whole.
void dequantize_row(const Matrix& matrix, int row, float* out);

}  // namespace elmoe
