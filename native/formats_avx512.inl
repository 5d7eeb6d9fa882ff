// Integer dots of the packed formats on VNNI; see formats.inl. dpbusd multiplies unsigned bytes, so tables hold their integers
// plus 128, and the sum begins with the correction of `Extra`.

constexpr int kPlaneTile = 8;  // two sums and one total of each token fit the registers

inline __m128i load_bytes(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline Lanes load_unsigned(const uint8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_bytes(p)))}; }
inline Lanes load_signed(const uint8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_bytes(p)))}; }
inline Lanes load_power(const uint8_t* p) {  // 2^(byte - 128)
    const __m512i e = _mm512_cvtepu8_epi32(load_bytes(p));
    const __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
    const __mmask16 small = _mm512_cmplt_epu32_mask(e, _mm512_set1_epi32(2));
    return {_mm512_castsi512_ps(_mm512_mask_sllv_epi32(normal, small, _mm512_set1_epi32(0x00200000), e))};
}

inline __m512i four_codes(const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
}

// float(dot) of a group for 16 rows and T tokens.
template <int T, Codes C>
[[gnu::always_inline]] inline void code_dots(const uint8_t* plane, const int8_t* codes, const Extra* extra, int64_t ahead,
                                             Lanes (&dots)[T]) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i table = _mm512_broadcast_i32x4(load_bytes(C == Codes::e2m1 ? kE2m1 : kNonlinear));
    __m512i sum[T];
    for (int t = 0; t < T; ++t) {
        if constexpr (C == Codes::plain)
            sum[t] = _mm512_setzero_si512();
        else
            sum[t] = _mm512_set1_epi32(C == Codes::zero8 ? extra[t].zero : extra[t].table);
    }
    for (int j = 0; j < 4; ++j) {
        _mm_prefetch(reinterpret_cast<const char*>(plane + ahead + 64 * j), _MM_HINT_T0);
        const __m512i both = _mm512_loadu_si512(plane + 64 * j);
        __m512i first = _mm512_and_si512(both, nibble), second = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
        if constexpr (C == Codes::nonlinear || C == Codes::e2m1) {
            first = _mm512_shuffle_epi8(table, first);
            second = _mm512_shuffle_epi8(table, second);
        }
        for (int t = 0; t < T; ++t) {
            const int8_t* x = codes + t * kGroup + 4 * j;
            sum[t] = _mm512_dpbusd_epi32(sum[t], first, four_codes(x));
            sum[t] = _mm512_dpbusd_epi32(sum[t], second, four_codes(x + 16));
        }
    }
    for (int t = 0; t < T; ++t) dots[t].v = _mm512_cvtepi32_ps(sum[t]);
}

// float(sc0 * dot0 + sc1 * dot1) of a group of planes6.
template <int T, bool Full>
[[gnu::always_inline]] inline void plane_dots(const uint8_t* hi, const uint8_t* lo, const uint8_t* steps, const int8_t* codes,
                                              const Extra* extra, int64_t ahead, Lanes (&dots)[T]) {
    const __m512i upper = _mm512_set1_epi8(0x3C), lower = _mm512_set1_epi8(3);
    __m512i low[T], high[T];
    for (int t = 0; t < T; ++t) low[t] = _mm512_set1_epi32(extra[t].first), high[t] = _mm512_set1_epi32(extra[t].second);
    for (int v = 0; v < 2; ++v) {
        __m512i pairs = _mm512_setzero_si512();
        if constexpr (Full) {
            _mm_prefetch(reinterpret_cast<const char*>(lo + ahead + 64 * v), _MM_HINT_T0);
            pairs = _mm512_loadu_si512(lo + 64 * v);
        }
        for (int j = 2 * v; j < 2 * v + 2; ++j) {
            _mm_prefetch(reinterpret_cast<const char*>(hi + ahead + 64 * j), _MM_HINT_T0);
            const __m512i both = _mm512_loadu_si512(hi + 64 * j);
            __m512i first = _mm512_and_si512(_mm512_slli_epi16(both, 2), upper);
            __m512i second = _mm512_and_si512(_mm512_srli_epi16(both, 2), upper);
            if constexpr (Full) {
                const __m512i own = j % 2 ? _mm512_srli_epi16(pairs, 4) : pairs;
                first = _mm512_or_si512(first, _mm512_and_si512(own, lower));
                second = _mm512_or_si512(second, _mm512_and_si512(_mm512_srli_epi16(own, 2), lower));
            }
            for (int t = 0; t < T; ++t) {
                const int8_t* x = codes + t * kGroup + 4 * j;
                low[t] = _mm512_dpbusd_epi32(low[t], first, four_codes(x));
                high[t] = _mm512_dpbusd_epi32(high[t], second, four_codes(x + 16));
            }
        }
    }
    const __m512i sc0 = _mm512_cvtepi8_epi32(load_bytes(steps)), sc1 = _mm512_cvtepi8_epi32(load_bytes(steps + 16));
    for (int t = 0; t < T; ++t)
        dots[t].v = _mm512_cvtepi32_ps(
            _mm512_add_epi32(_mm512_mullo_epi32(low[t], sc0), _mm512_mullo_epi32(high[t], sc1)));
}
