// The kernels that exist once per instruction set, behind one table of function pointers.
//
// Every function computes its outputs in the canonical order that elmoe.bitslice defines, so all tables give the same bits.
#pragma once

#include <cstdint>
#include <type_traits>

namespace elmoe {

constexpr int kGroup = 32;          // weights that share a scale
constexpr int kBlockRows = 16;      // output rows interleaved in a block
constexpr int kGroupBytes = 256;    // one plane, one group, one block
constexpr int kQueries = 32;        // attended to together
constexpr int kTilePositions = 64;  // positions whose keys or values stay in a near cache while all queries use them

// How many bytes ahead weights are asked for; changed between operations only, and no result depends on it.
extern int prefetch_ahead;

// Of numbers that are not negative. Unsigned, so that the sum does not overflow.
inline int ceil_div(int value, int divisor) {
    return static_cast<int>((static_cast<unsigned>(value) + static_cast<unsigned>(divisor) - 1) / static_cast<unsigned>(divisor));
}

// Planes as they lie in a store: hi, lo (blocks, groups, 256), scales (blocks, groups, 16) fp16 bits.
struct Matrix {
    int rows, columns;
    const uint8_t *hi, *lo;
    const uint16_t* scales;
    int blocks() const { return ceil_div(rows, kBlockRows); }
    int groups() const { return ceil_div(columns, kGroup); }
};

// Quantised activations of 1 to Kernels::tile tokens, group by group, the tokens of a group side by side: with the number of
// tokens known at compile time every operand lies at a fixed offset from three pointers. `correction` per group is
// (offset - 128) * sum(codes), or -128 * sum(codes) for the full product: with it the unsigned nibbles' dot product becomes
// that of the signed weights.
struct Tile {
    int tokens;
    int8_t* codes;        // (groups, tokens, 32)
    float* scales;        // (groups, tokens)
    int32_t* correction;  // (groups, tokens)
};

// Keys and values of one (slot, layer, kv head): page p begins at keys[p], values[p].
struct HeadPages {
    const uint16_t* const* keys;
    const uint16_t* const* values;
    int page_positions;
};

// A query head of a token: its vector and result (head_dim), and how many positions it sees.
struct Query {
    const float* vector;
    float* out;
    int length;
};

struct Kernels {
    const char* name;
    int tile;  // most tokens in a tile: their accumulators fit the registers
    // x (columns) -> token `t` of a tile; false if a value is NaN or infinite.
    bool (*quantize)(const float* x, int columns, const Tile& tile, int t, int factor);
    // y[token * stride + row] for the rows of blocks [first, last); rows are written up to the end of a block. Tokens are
    // numbered through the tiles.
    void (*matmul)(const Matrix& matrix, bool draft, int first, int last, const Tile* tiles, int count, float* y,
                   int64_t stride);
    void (*rms_norm)(const float* x, const float* weight, float* y, int size, float epsilon);
    // out[row] = canonical dot product of x with row `row` of a (rows, size) matrix.
    void (*dots)(const float* x, const float* rows, int count, int size, float* out);
    // x -> exp(x - max(x)) in place; returns the canonical sum.
    float (*softmax_numerators)(float* x, int size);
    void (*exp_shifted)(const float* x, float shift, float* y, int size);  // y = exp(x - shift)
    void (*swiglu)(const float* gate, const float* up, float* out, int size);
    // Queries over the same pages, at most kQueries at a time share a load of keys and values; scores: scratch of kQueries rows
    // of `stride`, at least the longest length rounded up to 16, and of kTilePositions rows of head_dim.
    void (*attend)(const Query* queries, int count, const HeadPages& pages, int head_dim, float scale, float* scores,
                   int64_t stride);
    // Round to nearest even; returns false if a result is not finite.
    bool (*to_half)(const float* x, uint16_t* y, int size);
    void (*multiply_add)(float* total, float weight, const float* y, int size);  // total = total + weight * y
    uint64_t (*read)(const uint8_t* data, int64_t size);                         // bandwidth probe: sums 64-bit words
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();    // null where the processor lacks them
const Kernels* avx512_kernels();  // null where the processor lacks them
const Kernels* amx_kernels();     // null where the processor or the system lacks them

}  // namespace elmoe
