// The kernels for AMX: those of avx512 but for the matmul of many tokens, whose dot products tiles compute.
//
// A tile of codes holds one token of a group per row, 32 bytes; a tile of weights the 8 quads of a group, 16 rows side by side,
// which is the order in which the planes interleave them. Dots go through memory to the fp32 chains, which are those of all
// variants: ascending groups, multiply, then add.
//
// The full product multiplies signed weights: |d| <= 32 * 128 * 127 = 520,192. The draft multiplies u = 16 * hi and adds c (see
// kernels.inl): below 2^21. Both fit the tiles' int32, and float(d) is exact.
#include "kernels.hpp"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,f16c")
namespace elmoe {
namespace {
namespace amx {
constexpr int kTile = 16;
constexpr int kLeastTokens = 8;  // below, VNNI is as fast
constexpr int kSpan = 16;        // groups whose unpacked weights (8 KiB) stay in the L1 cache while all tokens pass
constexpr int kTogether = 16;     // tiles that share unpacked weights

struct TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

// Tile registers of even and odd groups: 0, 1 dots; 2, 3 codes; 4, 5 weights.
void shape_tiles(int tokens) {
    TileShapes shapes;
    for (int parity = 0; parity < 2; ++parity) {
        shapes.rows[parity] = shapes.rows[2 + parity] = static_cast<uint8_t>(tokens);
        shapes.rows[4 + parity] = kGroup / 4;
        shapes.row_bytes[parity] = shapes.row_bytes[4 + parity] = 4 * kBlockRows;
        shapes.row_bytes[2 + parity] = kGroup;
    }
    asm volatile("ldtilecfg %0" : : "m"(shapes));
}

// dots of a group = codes * weights. Not by intrinsics: theirs do not tell the compiler that a tile load reads memory.
template <int Parity, bool Full>
[[gnu::always_inline]] inline void multiply(const int8_t* codes, const uint8_t* weights) {
    const int64_t code_stride = kGroup, weight_stride = 4 * kBlockRows;
#define ELMOE_MULTIPLY(product, dots, x, w)                                                                                 \
    asm volatile("tileloadd (%0,%2,1), %%tmm" x "\n\ttileloadd (%1,%3,1), %%tmm" w "\n\ttilezero %%tmm" dots "\n\t" product \
                 " %%tmm" w ", %%tmm" x ", %%tmm" dots                                                                      \
                 :                                                                                                          \
                 : "r"(codes), "r"(weights), "r"(code_stride), "r"(weight_stride)                                           \
                 : "memory")
    if constexpr (Full && Parity == 0) ELMOE_MULTIPLY("tdpbssd", "0", "2", "4");
    if constexpr (Full && Parity == 1) ELMOE_MULTIPLY("tdpbssd", "1", "3", "5");
    if constexpr (!Full && Parity == 0) ELMOE_MULTIPLY("tdpbsud", "0", "2", "4");
    if constexpr (!Full && Parity == 1) ELMOE_MULTIPLY("tdpbsud", "1", "3", "5");
#undef ELMOE_MULTIPLY
}

template <int Parity>
[[gnu::always_inline]] inline void store_dots(int32_t* dots) {
    const int64_t stride = 4 * kBlockRows;
    if constexpr (Parity == 0)
        asm volatile("tilestored %%tmm0, (%0,%1,1)" : : "r"(dots), "r"(stride) : "memory");
    else
        asm volatile("tilestored %%tmm1, (%0,%1,1)" : : "r"(dots), "r"(stride) : "memory");
}

// Nibbles to bytes. The full product gets signed weights (hi ^ 8 is hi - 8 in two's complement) and so needs no correction;
// the draft unsigned ones, since its offset is in the correction.
template <bool Full>
void unpack(const uint8_t* hi, const uint8_t* lo, int groups, uint8_t* weights) {
    const __m512i high = _mm512_set1_epi8(static_cast<char>(0xF0)), flip = _mm512_set1_epi8(static_cast<char>(0x88));
    for (int g = 0; g < groups; ++g, hi += kGroupBytes, lo += kGroupBytes, weights += 2 * kGroupBytes)
        for (int j = 0; j < 4; ++j) {
            __m512i h = _mm512_loadu_si512(hi + 64 * j), first, second;
            if constexpr (Full) {
                const __m512i l = _mm512_loadu_si512(lo + 64 * j);
                h = _mm512_xor_si512(h, flip);
                first = _mm512_ternarylogic_epi32(high, _mm512_slli_epi16(h, 4), l, 0xCA);  // high ? h << 4 : l
                second = _mm512_ternarylogic_epi32(high, h, _mm512_srli_epi16(l, 4), 0xCA);
            } else {
                first = _mm512_and_si512(_mm512_slli_epi16(h, 4), high);
                second = _mm512_and_si512(h, high);
            }
            _mm512_store_si512(weights + 64 * j, first);
            _mm512_store_si512(weights + kGroupBytes + 64 * j, second);
        }
}

// Without the pragmas gcc keeps `total` in memory.
template <int T, bool Full>
[[gnu::always_inline]] inline void add_terms(const int32_t* dots, const uint16_t* scales, const float* token_scales,
                                             const int32_t* correction, __m512 (&total)[T]) {
    const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
        __m512i dot = _mm512_load_si512(dots + t * kBlockRows);
        if constexpr (!Full) dot = _mm512_add_epi32(dot, _mm512_set1_epi32(correction[t]));
        const __m512 product = _mm512_mul_ps(scale, _mm512_set1_ps(token_scales[t]));
        total[t] = _mm512_add_ps(total[t], _mm512_mul_ps(_mm512_cvtepi32_ps(dot), product));
    }
}

// Asks for a part of a group of the next span. Blocks lie one after the other: the last span of one asks for the first of the
// next.
template <bool Full>
[[gnu::always_inline]] inline void fetch_ahead(const uint8_t* hi, const uint8_t* lo, int bytes) {
    for (int at = kSpan * kGroupBytes; at < kSpan * kGroupBytes + bytes; at += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(hi + at), _MM_HINT_T0);
        if (Full) _mm_prefetch(reinterpret_cast<const char*>(lo + at), _MM_HINT_T0);
    }
}

// Groups first .. first + groups - 1 of a block, for the T tokens of a tile, onto `totals` (from 0 if first is 0). Each
// iteration multiplies a group, stores the dots of the one before, adds the terms of the one before that and asks for `bytes`
// of each plane (hi, lo: where this span's begin) of the next span.
template <int T, bool Full>
void span_product(const uint8_t* weights, const uint16_t* scales, int first, int groups, const Tile& tile, float* totals,
                  const uint8_t* hi, const uint8_t* lo, int bytes) {
    alignas(64) int32_t dots[4][T * kBlockRows];
    const int8_t* codes = tile.codes + static_cast<int64_t>(first) * T * kGroup;
    const float* token_scales = tile.scales + static_cast<int64_t>(first) * T;
    const int32_t* correction = tile.correction + static_cast<int64_t>(first) * T;
    const __mmask16 begun = first ? 0xFFFF : 0;
    __m512 total[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) total[t] = _mm512_maskz_load_ps(begun, totals + t * kBlockRows);
    auto iterate = [&]<int Parity>(int g) __attribute__((always_inline)) {
        if (g + 1 < groups) multiply<1 - Parity, Full>(codes + (g + 1) * T * kGroup, weights + (g + 1) * 2 * kGroupBytes);
        store_dots<Parity>(dots[g & 3]);
        fetch_ahead<Full>(hi + g * kGroupBytes, lo + g * kGroupBytes, bytes);
        if (g == 0) return;
        add_terms<T, Full>(dots[(g - 1) & 3], scales, token_scales, correction, total);
        scales += kBlockRows, token_scales += T, correction += T;
    };
    multiply<0, Full>(codes, weights);
    int g = 0;
    for (; g + 1 < groups; g += 2) {
        iterate.template operator()<0>(g);
        iterate.template operator()<1>(g + 1);
    }
    if (g < groups) iterate.template operator()<0>(g);
    add_terms<T, Full>(dots[(groups - 1) & 3], scales, token_scales, correction, total);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) _mm512_store_ps(totals + t * kBlockRows, total[t]);
}

template <bool Full, int T = kLeastTokens>
void dispatch(const uint8_t* weights, const uint16_t* scales, int first, int groups, const Tile& tile, float* totals,
              const uint8_t* hi, const uint8_t* lo, int bytes) {
    if constexpr (T < kTile)
        if (tile.tokens > T) return dispatch<Full, T + 1>(weights, scales, first, groups, tile, totals, hi, lo, bytes);
    span_product<T, Full>(weights, scales, first, groups, tile, totals, hi, lo, bytes);
}

// The tiles, at most kTogether, over one block.
template <bool Full>
void block_product(const Matrix& m, int block, const Tile* tiles, int count, float* y, int64_t stride, int& shaped) {
    alignas(64) uint8_t weights[kSpan * 2 * kGroupBytes];
    alignas(64) float totals[kTogether][kTile * kBlockRows];
    const int all = m.groups();
    const int64_t at = static_cast<int64_t>(block) * all;
    const int share = ceil_div(kGroupBytes / 64, count) * 64;
    for (int first = 0; first < all; first += kSpan) {
        const int groups = all - first < kSpan ? all - first : kSpan;
        const uint8_t* hi = m.hi + (at + first) * kGroupBytes;
        const uint8_t* lo = Full ? m.lo + (at + first) * kGroupBytes : hi;
        unpack<Full>(hi, lo, groups, weights);
        for (int turn = 0; turn < count; ++turn) {
            const int i = first / kSpan % 2 ? count - 1 - turn : turn;  // to and fro, so that shapes change seldom
            if (tiles[i].tokens != shaped) shape_tiles(shaped = tiles[i].tokens);
            dispatch<Full>(weights, m.scales + (at + first) * kBlockRows, first, groups, tiles[i], totals[i],
                           hi + turn * share, lo + turn * share, turn * share < kGroupBytes ? share : 0);
        }
    }
    for (int i = 0; i < count; ++i)
        for (int t = 0; t < tiles[i].tokens; ++t, y += stride)
            _mm512_storeu_ps(y, _mm512_load_ps(totals[i] + t * kBlockRows));
}

void matmul(const Matrix& m, bool draft, int first, int last, const Tile* tiles, int count, float* y, int64_t stride) {
    if (m.packed()) return avx512_kernels()->matmul(m, draft, first, last, tiles, count, y, stride);
    int shaped = 0;
    for (int i = 0, together; i < count; i += together) {
        together = 0;
        int tokens = 0;
        while (together < kTogether && i + together < count && tiles[i + together].tokens >= kLeastTokens)
            tokens += tiles[i + together++].tokens;
        if (together == 0) {
            together = 1, tokens = tiles[i].tokens;
            avx512_kernels()->matmul(m, draft, first, last, tiles + i, 1, y, stride);
        } else {
            for (int block = first; block < last; ++block)
                (draft ? block_product<false> : block_product<true>)(m, block, tiles + i, together, y + block * kBlockRows, stride,
                                                                    shaped);
        }
        y += tokens * stride;
    }
    if (shaped) asm volatile("tilerelease" : :);  // a thread with live tiles is dearer to switch
}

const Kernels* table() {
    static const Kernels kernels = [] {
        Kernels changed = *avx512_kernels();
        changed.name = "amx", changed.tile = kTile, changed.matmul = matmul;
        return changed;
    }();
    return &kernels;
}
}  // namespace amx
}  // namespace
#pragma GCC pop_options

// Linux gives a process the tiles' state if it asks for it.
const Kernels* amx_kernels() {
    constexpr unsigned tile = 1u << 24, int8 = 1u << 25;
    constexpr long request_permission = 0x1023, tile_data = 18;
    unsigned a, b, c, d;
    const bool able = avx512_kernels() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & tile) && (d & int8) &&
                      syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return able ? amx::table() : nullptr;
}
}  // namespace elmoe
#else
const elmoe::Kernels* elmoe::amx_kernels() { return nullptr; }
#endif
