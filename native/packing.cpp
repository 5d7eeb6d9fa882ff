// Rows of files, or of floats, as planes of nibbles in blocks of 16 rows (defined in bitslice.nested): what a conversion
// spends its time on. Rows beyond the last keep what the arrays were filled with.
#include <algorithm>
#include <cstring>

#include "holders.hpp"

using namespace elmoe;

namespace {

constexpr int64_t kRows = 16, kGroup = 32, kBytes = 256;
constexpr uint64_t kLow = 0x0F0F0F0F0F0F0F0Full;

uint64_t load8(const uint8_t* from) {
    uint64_t word;
    std::memcpy(&word, from, 8);
    return word;
}

// 16 bytes of the column pairs (c, c + 16) of row n of a block, to their places in a group of a plane.
void put(uint8_t* group, int64_t n, const uint8_t* pairs) {
    for (int j = 0; j < 4; ++j) std::memcpy(group + 64 * j + 4 * n, pairs + 4 * j, 4);
}

// 32 bytes of codes: the low nibbles as pairs to one group, the high ones to another.
void split(const uint8_t* codes, uint64_t flip, uint8_t* low, uint8_t* high, int64_t n) {
    uint64_t below[2], above[2];
    for (int h = 0; h < 2; ++h) {
        const uint64_t a = load8(codes + 8 * h) ^ flip, b = load8(codes + 16 + 8 * h) ^ flip;
        below[h] = (a & kLow) | (b & kLow) << 4;
        above[h] = (a >> 4 & kLow) | (b & ~kLow);
    }
    put(low, n, reinterpret_cast<const uint8_t*>(below));
    put(high, n, reinterpret_cast<const uint8_t*>(above));
}

// Calls body(row, its block, its place in the block, unit, bytes of the unit) for all units of `size` bytes that lie behind
// `offset` in every block of a file's rows; the rows of a block of 16 together, so that a plane is written as it lies.
template <class Body>
void each_unit(const Input<uint8_t, 2>& raw, int64_t block_bytes, int64_t offset, int64_t size, const Body& body) {
    const int64_t rows = side(raw, 0), row_bytes = side(raw, 1), per_block = (block_bytes - offset) / size;
    const int64_t units = row_bytes / block_bytes * per_block;
    for (int64_t first = 0; first < rows; first += kRows)
        for (int64_t unit = 0; unit < units; ++unit) {
            const int64_t at = unit / per_block * block_bytes + offset + unit % per_block * size;
            for (int64_t n = 0; n < kRows && first + n < rows; ++n)
                body(first / kRows, n, unit, raw.data() + (first + n) * row_bytes + at);
        }
}

void check_blocks(const Input<uint8_t, 2>& raw, int64_t block_bytes, int64_t offset, int64_t unit) {
    require(block_bytes > 0 && offset >= 0 && block_bytes - offset >= unit && side(raw, 1) % block_bytes == 0,
            "rows are not whole blocks");
}

void check_plane(const Array<uint8_t, 3>& plane, int64_t rows, int64_t groups) {
    require(side(plane, 0) == groups_of(rows, kRows) && side(plane, 1) == groups && side(plane, 2) == kBytes,
            "a plane does not fit");
}

// Bytes of pairs, 16 a group, as a plane.
void pack_pairs(Input<uint8_t, 2> raw, int64_t block_bytes, int64_t offset, Array<uint8_t, 3> plane) {
    check_blocks(raw, block_bytes, offset, 16);
    const int64_t groups = side(raw, 1) / block_bytes * ((block_bytes - offset) / 16);
    check_plane(plane, side(raw, 0), groups);
    nb::gil_scoped_release release;
    each_unit(raw, block_bytes, offset, 16, [&](int64_t block, int64_t n, int64_t unit, const uint8_t* pairs) {
        put(plane.data() + (block * groups + unit) * kBytes, n, pairs);
    });
}

// 32 bytes of codes: of a group, to the planes of its low and high nibbles.
void split_codes(Input<uint8_t, 2> raw, int64_t block_bytes, int64_t offset, int flip, Array<uint8_t, 3> low,
                 Array<uint8_t, 3> high) {
    check_blocks(raw, block_bytes, offset, kGroup);
    const int64_t units = side(raw, 1) / block_bytes * ((block_bytes - offset) / kGroup);
    check_plane(low, side(raw, 0), units);
    check_plane(high, side(raw, 0), units);
    require(flip >= 0 && flip <= 255, "flip is a byte");
    nb::gil_scoped_release release;
    const uint64_t mask = 0x0101010101010101ull * static_cast<uint64_t>(flip);
    each_unit(raw, block_bytes, offset, kGroup, [&](int64_t block, int64_t n, int64_t unit, const uint8_t* codes) {
        const int64_t at = (block * units + unit) * kBytes;
        split(codes, mask, low.data() + at, high.data() + at, n);
    });
}

// The same where the low nibbles are one group and the high ones the next.
void split_groups(Input<uint8_t, 2> raw, int64_t block_bytes, int64_t offset, Array<uint8_t, 3> plane) {
    check_blocks(raw, block_bytes, offset, kGroup);
    const int64_t units = side(raw, 1) / block_bytes * ((block_bytes - offset) / kGroup);
    check_plane(plane, side(raw, 0), 2 * units);
    nb::gil_scoped_release release;
    each_unit(raw, block_bytes, offset, kGroup, [&](int64_t block, int64_t n, int64_t unit, const uint8_t* codes) {
        uint8_t* group = plane.data() + 2 * (block * units + unit) * kBytes;
        split(codes, 0, group, group + kBytes, n);
    });
}

// The largest magnitude of every group of 32 columns; NaN where one is NaN.
void group_maxima(Input<float, 2> weights, Array<float, 2> maxima) {
    const int64_t rows = side(weights, 0), columns = side(weights, 1), groups = groups_of(columns, kGroup);
    require(side(maxima, 0) == rows && side(maxima, 1) == groups, "maxima do not fit");
    nb::gil_scoped_release release;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t group = 0; group < groups; ++group) {
            const float* from = weights.data() + row * columns + kGroup * group;
            const int64_t count = std::min(kGroup, columns - kGroup * group);
            int32_t most = 0;  // magnitudes are ordered as the integers of their bits are, NaN above all
            for (int64_t i = 0; i < count; ++i) {
                int32_t bits;
                std::memcpy(&bits, from + i, 4);
                bits &= 0x7FFFFFFF;
                most = bits > most ? bits : most;
            }
            std::memcpy(maxima.data() + row * groups + group, &most, 4);
        }
}

// Weights over their group's scale (0 where it is 0), rounded to even, within -127..127, as planes of code + 128.
void quantize_planes(Input<float, 2> weights, Input<float, 2> scales, Array<uint8_t, 3> low, Array<uint8_t, 3> high) {
    const int64_t rows = side(weights, 0), columns = side(weights, 1), groups = groups_of(columns, kGroup);
    require(side(scales, 0) == rows && side(scales, 1) == groups, "scales do not fit");
    check_plane(low, rows, groups);
    check_plane(high, rows, groups);
    nb::gil_scoped_release release;
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer, ties to even
    for (int64_t first = 0; first < rows; first += kRows)
        for (int64_t group = 0; group < groups; ++group)
            for (int64_t n = 0; n < kRows && first + n < rows; ++n) {
                const float* from = weights.data() + (first + n) * columns + kGroup * group;
                const float scale = scales.data()[(first + n) * groups + group];
                const int64_t count = std::min(kGroup, columns - kGroup * group);
                float padded[kGroup] = {};
                if (scale != 0) std::memcpy(padded, from, 4 * count);
                const float divisor = scale != 0 ? scale : 1.0f;
                uint8_t codes[kGroup];
                for (int i = 0; i < kGroup; ++i) {
                    float ratio = padded[i] / divisor;
                    ratio = ratio < -127.0f ? -127.0f : ratio > 127.0f ? 127.0f : ratio;
                    const float shifted = ratio + magic;
                    int32_t bits;
                    std::memcpy(&bits, &shifted, 4);
                    codes[i] = static_cast<uint8_t>(bits - 0x4B400000 + 128);
                }
                const int64_t at = (first / kRows * groups + group) * kBytes;
                split(codes, 0, low.data() + at, high.data() + at, n);
            }
}

}  // namespace

void bind_packing(nb::module_& m) {
    m.def("pack_pairs", &pack_pairs);
    m.def("split_codes", &split_codes);
    m.def("split_groups", &split_groups);
    m.def("group_maxima", &group_maxima);
    m.def("quantize_planes", &quantize_planes);
}
