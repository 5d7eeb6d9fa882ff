// 16 lanes in two 256-bit registers, and the group dot product by maddubs on each nibble plane.
//
// d = 16 * dot(hi, x) + dot(lo, x) + c (see kernels.inl), or 16 * dot(hi, x) + c in a draft. A plane's dot is summed in 16 bits,
// 16 products per lane of at most 15 * 127: 30,480 < 2^15. It is widened to 32 bits before it is multiplied by 16.

struct Lanes {
    __m256 a, b;
};
inline Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Lanes x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline Lanes set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes operator+(Lanes x, Lanes y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Lanes operator-(Lanes x, Lanes y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Lanes operator*(Lanes x, Lanes y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Lanes operator/(Lanes x, Lanes y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Lanes minimum(Lanes x, Lanes y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Lanes maximum(Lanes x, Lanes y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Lanes rint(Lanes x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
inline Lanes zero_where_less(Lanes x, Lanes y, Lanes value) {
    return {_mm256_and_ps(_mm256_cmp_ps(x.a, y.a, _CMP_NLT_UQ), value.a),
            _mm256_and_ps(_mm256_cmp_ps(x.b, y.b, _CMP_NLT_UQ), value.b)};
}
inline __m256 power_of_two_half(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline Lanes power_of_two(Lanes n) { return {power_of_two_half(n.a), power_of_two_half(n.b)}; }
inline Lanes keep_first(Lanes x, int count, float other) {
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256 low = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), index));
    __m256 high = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count - 8), index));
    __m256 rest = _mm256_set1_ps(other);
    return {_mm256_blendv_ps(rest, x.a, low), _mm256_blendv_ps(rest, x.b, high)};
}
inline Lanes load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline void store_half(uint16_t* p, Lanes x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
inline uint32_t largest_magnitude(const float* p) {
    const __m256i mask = _mm256_set1_epi32(0x7FFFFFFF);
    __m256i m = _mm256_max_epi32(_mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), mask),
                                 _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8)), mask));
    alignas(32) int32_t lane[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lane), m);
    int32_t best = 0;
    for (int32_t value : lane) best = value > best ? value : best;
    return static_cast<uint32_t>(best);
}
inline int store_codes(int8_t* p, Lanes x) {
    alignas(32) int32_t value[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(value), _mm256_cvtps_epi32(x.a));
    _mm256_store_si256(reinterpret_cast<__m256i*>(value + 8), _mm256_cvtps_epi32(x.b));
    int sum = 0;
    for (int i = 0; i < 16; ++i) {
        p[i] = static_cast<int8_t>(value[i]);
        sum += value[i];
    }
    return sum;
}

// Attention keeps Q * kKeyBlocks<Q> sums of scores and Q * kValueChunks<Q> sums of outputs in registers.
constexpr int kTogether = 4;  // most queries Q
constexpr int kWiden = 9;     // least queries for which keys and values are converted once, to memory
template <int Q>
constexpr int kKeyBlocks = 4 / Q;
template <int Q>
constexpr int kValueChunks = Q == 1 ? 8 : 4 / Q;
constexpr int kLatentPositions = 4;  // whose scores of 16 queries are in registers
constexpr int kTile = 4;

// Sums of one plane's nibbles times codes, in 16 bits, for the first and the last 8 rows. maddubs adds pairs: a nibble times a
// code is at most 15 * 127, so all 16 products that meet in a lane stay below 2^15 (16 * 15 * 127 = 30480) and are widened once.
struct PlaneSums {
    __m256i first, last;
};

template <int T>
[[gnu::always_inline]] inline void plane_product(const uint8_t* plane, const int8_t* codes, int64_t ahead, PlaneSums (&sums)[T]) {
    const __m256i nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) sums[t].first = sums[t].last = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j, plane += 64, codes += 4) {
        _mm_prefetch(reinterpret_cast<const char*>(plane + ahead), _MM_HINT_T0);
        const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(plane));
        const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(plane + 32));
        auto add = [&](const int8_t* x, __m256i first, __m256i last) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                int32_t four;
                __builtin_memcpy(&four, x + t * kGroup, 4);
                const __m256i all = _mm256_set1_epi32(four);
                sums[t].first = _mm256_add_epi16(sums[t].first, _mm256_maddubs_epi16(first, all));
                sums[t].last = _mm256_add_epi16(sums[t].last, _mm256_maddubs_epi16(last, all));
                // Keeps the compiler from reordering the sums, which takes more registers than there are.
                asm("" : "+x"(sums[t].first), "+x"(sums[t].last));
            }
        };
        add(codes, _mm256_and_si256(a, nibble), _mm256_and_si256(b, nibble));
        add(codes + 16, _mm256_and_si256(_mm256_srli_epi16(a, 4), nibble), _mm256_and_si256(_mm256_srli_epi16(b, 4), nibble));
    }
}

// The planes are summed one after the other, so that the sums of all rows fit the registers, and joined as
// 16 * dot(hi) + dot(lo).
template <int T, bool Full>
inline void block_product(const uint8_t* hi, const uint8_t* lo, const uint16_t* scales, int groups, const Tile& tile, float* y,
                          int64_t stride) {
    const int8_t* codes = tile.codes;
    const float* token_scales = tile.scales;
    const int32_t* correction = tile.correction;
    const int64_t ahead = prefetch_ahead;
    const __m256i ones = _mm256_set1_epi16(1), sixteens = _mm256_set1_epi16(16);
    Lanes total[T];
    for (int t = 0; t < T; ++t) total[t] = set1(0);
    for (int g = 0; g < groups; ++g, hi += kGroupBytes, lo += kGroupBytes, scales += kBlockRows, codes += T * kGroup,
             token_scales += T, correction += T) {
        PlaneSums sums[T], low[T];
        plane_product<T>(hi, codes, ahead, sums);
        for (PlaneSums& sum : sums) {
            sum.first = _mm256_madd_epi16(sum.first, sixteens);
            sum.last = _mm256_madd_epi16(sum.last, sixteens);
        }
        if constexpr (Full) {
            plane_product<T>(lo, codes, ahead, low);
            for (int t = 0; t < T; ++t) {
                sums[t].first = _mm256_add_epi32(sums[t].first, _mm256_madd_epi16(low[t].first, ones));
                sums[t].last = _mm256_add_epi32(sums[t].last, _mm256_madd_epi16(low[t].last, ones));
            }
        }
        const Lanes scale = load_half(scales);
        for (int t = 0; t < T; ++t) {
            const __m256i shift = _mm256_set1_epi32(correction[t]);
            const Lanes sum = {_mm256_cvtepi32_ps(_mm256_add_epi32(sums[t].first, shift)),
                               _mm256_cvtepi32_ps(_mm256_add_epi32(sums[t].last, shift))};
            total[t] = total[t] + sum * (scale * set1(token_scales[t]));
        }
    }
    for (int t = 0; t < T; ++t) store(y + t * stride, total[t]);
}

uint64_t read(const uint8_t* data, int64_t size) {
    __m256i a = _mm256_setzero_si256(), b = a;
    int64_t i = 0;
    for (; i + 64 <= size; i += 64) {
        a = _mm256_add_epi64(a, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + i)));
        b = _mm256_add_epi64(b, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + i + 32)));
    }
    alignas(32) uint64_t lane[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lane), _mm256_add_epi64(a, b));
    uint64_t total = lane[0] + lane[1] + lane[2] + lane[3];
    for (; i < size; ++i) total += data[i];
    return total;
}
