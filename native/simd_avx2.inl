// 16 lanes in two 256-bit registers, and the group dot product by maddubs on each nibble plane.

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

constexpr int kTile = 4;

// maddubs adds pairs in 16 bits: 2 * 15 * 127 fits for a nibble (2 * 255 * 127 would not for a whole code), so the planes
// are summed apart and joined as 16 * dot(hi) + dot(lo).
template <int T, bool Full>
inline void block_product(const uint8_t* hi, const uint8_t* lo, const uint16_t* scales, int groups, const Tile& tile, float* y,
                          int64_t stride) {
    const int8_t* codes = tile.codes;
    const float* token_scales = tile.scales;
    const int32_t* correction = tile.correction;
    const int ahead = prefetch_ahead;
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    Lanes total[T];
    for (int t = 0; t < T; ++t) total[t] = set1(0);
    for (int g = 0; g < groups; ++g, hi += kGroupBytes, lo += kGroupBytes, scales += kBlockRows, codes += T * kGroup,
             token_scales += T, correction += T) {
        Lanes scale = load_half(scales);
        for (int half = 0; half < 2; ++half) {  // 8 rows each
            __m256i high[T], low[T];
            for (int t = 0; t < T; ++t) high[t] = low[t] = _mm256_setzero_si256();
            for (int j = 0; j < 4; ++j) {
                const int at = 64 * j + 32 * half;
                _mm_prefetch(reinterpret_cast<const char*>(hi + ahead + at), _MM_HINT_T0);
                __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(hi + at));
                __m256i h0 = _mm256_and_si256(h, nibble), h1 = _mm256_and_si256(_mm256_srli_epi16(h, 4), nibble);
                __m256i l0 = h0, l1 = h1;
                if constexpr (Full) {
                    _mm_prefetch(reinterpret_cast<const char*>(lo + ahead + at), _MM_HINT_T0);
                    __m256i l = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lo + at));
                    l0 = _mm256_and_si256(l, nibble);
                    l1 = _mm256_and_si256(_mm256_srli_epi16(l, 4), nibble);
                }
                for (int t = 0; t < T; ++t) {
                    const int8_t* x = codes + t * kGroup + 4 * j;
                    int32_t first, second;
                    __builtin_memcpy(&first, x, 4);
                    __builtin_memcpy(&second, x + 16, 4);
                    const __m256i x0 = _mm256_set1_epi32(first), x1 = _mm256_set1_epi32(second);
                    // |pair sums| <= 3810 each, so two of them still fit 16 bits
                    __m256i s = _mm256_add_epi16(_mm256_maddubs_epi16(h0, x0), _mm256_maddubs_epi16(h1, x1));
                    high[t] = _mm256_add_epi32(high[t], _mm256_madd_epi16(s, ones));
                    if constexpr (Full) {
                        s = _mm256_add_epi16(_mm256_maddubs_epi16(l0, x0), _mm256_maddubs_epi16(l1, x1));
                        low[t] = _mm256_add_epi32(low[t], _mm256_madd_epi16(s, ones));
                    }
                }
            }
            for (int t = 0; t < T; ++t) {
                __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(high[t], 4), _mm256_set1_epi32(correction[t]));
                if constexpr (Full) sum = _mm256_add_epi32(sum, low[t]);
                __m256 product = _mm256_mul_ps(half ? scale.b : scale.a, _mm256_set1_ps(token_scales[t]));
                __m256 term = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), product);
                __m256& acc = half ? total[t].b : total[t].a;
                acc = _mm256_add_ps(acc, term);
            }
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
