// 16 lanes in one 512-bit register, and the group dot product on VNNI.
//
// d = c + dot(u, x) (see kernels.inl): nibbles are joined to the bytes u, and dpbusd adds four products of an unsigned and a
// signed byte to an int32 without saturation, from c on: below 2^21 throughout.

struct Lanes {
    __m512 v;
};
inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
inline Lanes set1(float a) { return {_mm512_set1_ps(a)}; }
inline Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Lanes minimum(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Lanes maximum(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes rint(Lanes a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Lanes zero_where_less(Lanes a, Lanes b, Lanes value) {  // value, 0 where a < b
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ), value.v)};
}
inline Lanes power_of_two(Lanes n) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}
inline Lanes keep_first(Lanes a, int count, float other) {  // lanes >= count become other
    return {_mm512_mask_mov_ps(_mm512_set1_ps(other), static_cast<__mmask16>((1u << count) - 1), a.v)};
}
inline Lanes load_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline void store_half(uint16_t* p, Lanes a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline uint32_t largest_magnitude(const float* p) {  // bits of the largest |x| of 16; NaN and infinity come out largest
    __m512i bits = _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(0x7FFFFFFF));
    return static_cast<uint32_t>(_mm512_reduce_max_epi32(bits));
}
inline int store_codes(int8_t* p, Lanes a) {  // a within -127..127, integral; returns the sum
    __m512i integers = _mm512_cvtps_epi32(a.v);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(integers));
    return _mm512_reduce_add_epi32(integers);
}

// Attention keeps Q * kKeyBlocks<Q> sums of scores and Q * kValueChunks<Q> sums of outputs in registers.
constexpr int kTogether = 4;  // most queries Q
constexpr int kWiden = 9;     // least queries for which keys and values are converted once, to memory
template <int Q>
constexpr int kKeyBlocks = 4;
template <int Q>
constexpr int kValueChunks = Q == 1 ? 8 : 4;
constexpr int kLatentPositions = 8;  // whose scores of 16 queries are in registers
constexpr int kTile = 12;

// Per group and 16 rows: weights' nibbles become unsigned bytes, full (hi << 4 | lo) or draft (hi << 4), and dpbusd adds
// four products at a time to 32-bit lanes. |dot| <= 32 * 255 * 127 < 2^20, exact in float32 later.
template <int T, bool Full>
inline void block_product(const uint8_t* hi, const uint8_t* lo, const uint16_t* scales, int groups, const Tile& tile, float* y,
                          int64_t stride) {
    const int8_t* codes = tile.codes;
    const float* token_scales = tile.scales;
    const int32_t* correction = tile.correction;
    const int ahead = prefetch_ahead;
    const __m512i high = _mm512_set1_epi8(static_cast<char>(0xF0));
    __m512 total[T];
    for (int t = 0; t < T; ++t) total[t] = _mm512_setzero_ps();
    for (int g = 0; g < groups; ++g, hi += kGroupBytes, lo += kGroupBytes, scales += kBlockRows, codes += T * kGroup,
             token_scales += T, correction += T) {
        __m512i sum[T];
        for (int t = 0; t < T; ++t) sum[t] = _mm512_set1_epi32(correction[t]);
        for (int j = 0; j < 4; ++j) {
            _mm_prefetch(reinterpret_cast<const char*>(hi + ahead + 64 * j), _MM_HINT_T0);
            __m512i h = _mm512_loadu_si512(hi + 64 * j);
            __m512i first = _mm512_slli_epi16(h, 4), second = h;
            if constexpr (Full) {
                _mm_prefetch(reinterpret_cast<const char*>(lo + ahead + 64 * j), _MM_HINT_T0);
                __m512i l = _mm512_loadu_si512(lo + 64 * j);
                first = _mm512_ternarylogic_epi32(high, first, l, 0xCA);  // high ? first : l
                second = _mm512_ternarylogic_epi32(high, second, _mm512_srli_epi16(l, 4), 0xCA);
            } else {
                first = _mm512_and_si512(first, high);
                second = _mm512_and_si512(second, high);
            }
            for (int t = 0; t < T; ++t) {
                const int8_t* x = codes + t * kGroup + 4 * j;
                int32_t low, upper;
                __builtin_memcpy(&low, x, 4);
                __builtin_memcpy(&upper, x + 16, 4);
                sum[t] = _mm512_dpbusd_epi32(sum[t], first, _mm512_set1_epi32(low));
                sum[t] = _mm512_dpbusd_epi32(sum[t], second, _mm512_set1_epi32(upper));
            }
        }
        __m512 scale = load_half(scales).v;
        for (int t = 0; t < T; ++t) {
            __m512 product = _mm512_mul_ps(scale, _mm512_set1_ps(token_scales[t]));
            total[t] = _mm512_add_ps(total[t], _mm512_mul_ps(_mm512_cvtepi32_ps(sum[t]), product));
        }
    }
    for (int t = 0; t < T; ++t) _mm512_storeu_ps(y + t * stride, total[t]);
}

uint64_t read(const uint8_t* data, int64_t size) {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    int64_t i = 0;
    for (; i + 256 <= size; i += 256) {
        a = _mm512_add_epi64(a, _mm512_loadu_si512(data + i));
        b = _mm512_add_epi64(b, _mm512_loadu_si512(data + i + 64));
        c = _mm512_add_epi64(c, _mm512_loadu_si512(data + i + 128));
        d = _mm512_add_epi64(d, _mm512_loadu_si512(data + i + 192));
    }
    a = _mm512_add_epi64(_mm512_add_epi64(a, b), _mm512_add_epi64(c, d));
    uint64_t total = static_cast<uint64_t>(_mm512_reduce_add_epi64(a));
    for (; i < size; ++i) total += data[i];
    return total;
}
