// The kernels that exist once per instruction set, behind one table of function pointers.
//
// Every function computes its outputs in the canonical order that elmoe.bitslice defines, so all tables give the same bits.
#pragma once

#include <cstdint>
#include <type_traits>

#include "formats.hpp"

namespace elmoe {

constexpr int kQueries = 32;        // attended to together
constexpr int kTilePositions = 64;  // positions whose keys or values stay in a near cache while all queries use them

// How many bytes ahead weights are asked for; changed between operations only, and no result depends on it.
extern int prefetch_ahead;

// What the packed formats need of a token's group beside its codes and scale: corrections that turn dot products of unsigned
// integers into those of the signed ones (table: -128 * sum of the codes; zero: -8 * sum; first, second: -32 * sum of a half, or
// more in a draft), and sum: the token's scale times the sum of its codes.
struct Extra {
    int32_t table, zero, first, second;
    float sum;
};

// What sums of codes are multiplied with in the corrections: of nested8, and of planes6.
struct Factors {
    int nested, planes;
};
constexpr Factors kFull = {-128, -32};

// Which integers nibbles stand for: themselves, less 8, or an entry of a table.
enum class Codes { plain, zero8, nonlinear, e2m1 };
// Entries of the tables plus 128.
alignas(16) constexpr uint8_t kNonlinear[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
alignas(16) constexpr uint8_t kE2m1[16] = {128, 129, 130, 131, 132, 134, 136, 140, 128, 127, 126, 125, 124, 122, 120, 116};

// Quantised activations of 1 to Kernels::tile tokens, group by group, the tokens of a group side by side: with the number of
// tokens known at compile time every operand lies at a fixed offset from three pointers. `correction` per group is
// (offset - 128) * sum(codes), or -128 * sum(codes) for the full product: with it the unsigned nibbles' dot product becomes
// that of the signed weights. `extra` is null where all matrices are nested8.
struct Tile {
    int tokens;
    int8_t* codes;        // (groups, tokens, 32)
    float* scales;        // (groups, tokens)
    int32_t* correction;  // (groups, tokens)
    Extra* extra = nullptr;  // (groups, tokens)
};

// Keys and values of one (slot, layer, kv head): page p begins at keys[p], values[p].
struct HeadPages {
    const uint16_t* const* keys;
    const uint16_t* const* values;
    int page_positions;
};

// A query head of a token: its vector and result (head_dim), the positions first .. length - 1 that it sees, and a score without a
// value, -infinity where there is none.
struct Query {
    const float* vector;
    float* out;
    int length, first;
    float sink;
};

// Latents and rotary keys of one (slot, layer): page p begins at rows[p], with key_dim values a position.
struct LatentPages {
    const uint16_t* const* rows;
    int page_positions, key_dim;
    const uint16_t* at(int position) const {
        return rows[position / page_positions] + static_cast<int64_t>(position % page_positions) * key_dim;
    }
};

struct Kernels {
    const char* name;
    int tile;  // most tokens in a tile: their accumulators fit the registers
    // x (columns) -> token `t` of a tile; false if a value is NaN or infinite.
    bool (*quantize)(const float* x, int columns, const Tile& tile, int t, Factors factors);
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
    // Of gate + gate_bias and up + up_bias, in place of gate.
    void (*clamped_swiglu)(float* gate, const float* up, const float* gate_bias, const float* up_bias, float alpha, float limit,
                           int size);
    // Queries over the same pages, at most kQueries at a time share a load of keys and values; scores: scratch of kQueries rows
    // of `stride`, at least the longest length rounded up to 16, and of kTilePositions rows of head_dim.
    void (*attend)(const Query* queries, int count, const HeadPages& pages, int head_dim, float scale, float* scores,
                   int64_t stride);
    // Round to nearest even; returns false if a result is not finite.
    bool (*to_half)(const float* x, uint16_t* y, int size);
    void (*multiply_add)(float* total, float weight, const float* y, int size);  // total = total + weight * y
    void (*add)(float* total, const float* y, int size);                         // total = total + y
    uint64_t (*read)(const uint8_t* data, int64_t size);                         // bandwidth probe: sums 64-bit words
    // scores[q * stride + p] of queries, columns (groups of 16 queries, key_dim, 16), at positions first .. last - 1; `first` is
    // a multiple of 16; widened: scratch of 16 rows of key_dim.
    void (*latent_scores)(const float* columns, int count, const LatentPages& pages, int first, int last, float scale,
                          float* scores, int64_t stride, float* widened);
    // Of each query, `out` (dims) = the sum of weights times the dimensions from first_dim on, divided by its divisor; weights
    // behind a query's length are 0 up to the longest; widened: scratch of kTilePositions rows of dims, a multiple of 16.
    void (*latent_values)(const Query* queries, int count, const LatentPages& pages, int first_dim, int dims,
                          const float* weights, int64_t stride, const float* divisors, float* widened);
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();    // null where the processor lacks them
const Kernels* avx512_kernels();  // null where the processor lacks them
const Kernels* amx_kernels();     // null where the processor or the system lacks them

}  // namespace elmoe
