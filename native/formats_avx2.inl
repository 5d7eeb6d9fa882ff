// Integer dots of the packed formats by maddubs; see formats.inl. It adds pairs of products in 16 bits, so what meets in a lane
// must stay below 2^15:
//     nibbles            16 products of 15 * 127: 30,480, as in `plane_product`
//     e2m1 + 12          8 products of 24 * 127: 24,384, so the halves of a group are summed apart
//     table + 128        as two nibbles, 16 * upper + lower, looked up in two tables
//     six bits           4 products of 63 * 127: 32,004, widened after two steps

constexpr int kPlaneTile = 2;

inline __m128i load_bytes(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline __m256i signed_integers(const uint8_t* p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline __m256i unsigned_integers(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline Lanes load_unsigned(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(unsigned_integers(p)), _mm256_cvtepi32_ps(unsigned_integers(p + 8))};
}
inline Lanes load_signed(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(signed_integers(p)), _mm256_cvtepi32_ps(signed_integers(p + 8))};
}
inline __m256 powers(__m256i e) {  // 2^(e - 128)
    const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
    const __m256i subnormal = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), e);
    return _mm256_castsi256_ps(_mm256_blendv_epi8(normal, subnormal, _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e)));
}
inline Lanes load_power(const uint8_t* p) { return {powers(unsigned_integers(p)), powers(unsigned_integers(p + 8))}; }

inline __m256i four_codes(const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}
inline __m256i load_plane(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// Adds the products of 8 columns, 4 of either half of a group or 4 of one, to 16-bit sums.
template <int T>
[[gnu::always_inline]] inline void add_products(const int8_t* codes, __m256i first, __m256i last, PlaneSums (&sums)[T]) {
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
        const __m256i x = four_codes(codes + t * kGroup);
        sums[t].first = _mm256_add_epi16(sums[t].first, _mm256_maddubs_epi16(first, x));
        sums[t].last = _mm256_add_epi16(sums[t].last, _mm256_maddubs_epi16(last, x));
        asm("" : "+x"(sums[t].first), "+x"(sums[t].last));
    }
}

// 16-bit sums over the halves `From` .. `To` - 1 of a group of what a table says of its nibbles.
template <int T, int From, int To>
[[gnu::always_inline]] inline void table_product(const uint8_t* plane, const int8_t* codes, __m256i table, int64_t ahead,
                                                 PlaneSums (&sums)[T]) {
    const __m256i nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) sums[t].first = sums[t].last = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j, plane += 64, codes += 4) {
        _mm_prefetch(reinterpret_cast<const char*>(plane + ahead), _MM_HINT_T0);
        __m256i a = load_plane(plane), b = load_plane(plane + 32);
        for (int half = From; half < To; ++half) {
            const __m256i low = half ? _mm256_srli_epi16(a, 4) : a, high = half ? _mm256_srli_epi16(b, 4) : b;
            add_products<T>(codes + 16 * half, _mm256_shuffle_epi8(table, _mm256_and_si256(low, nibble)),
                            _mm256_shuffle_epi8(table, _mm256_and_si256(high, nibble)), sums);
        }
    }
}

inline void widen_sums(PlaneSums& sum, __m256i factor) {
    sum.first = _mm256_madd_epi16(sum.first, factor);
    sum.last = _mm256_madd_epi16(sum.last, factor);
}
inline void add_sums(PlaneSums& sum, const PlaneSums& other) {
    sum.first = _mm256_add_epi32(sum.first, other.first);
    sum.last = _mm256_add_epi32(sum.last, other.last);
}

// float(dot) of a group for 16 rows and T tokens.
template <int T, Codes C>
[[gnu::always_inline]] inline void code_dots(const uint8_t* plane, const int8_t* codes, const Extra* extra, int64_t ahead,
                                             Lanes (&dots)[T]) {
    const __m256i ones = _mm256_set1_epi16(1);
    PlaneSums sums[T], other[T];
    if constexpr (C == Codes::nonlinear) {
        const __m256i table = _mm256_broadcastsi128_si256(load_bytes(kNonlinear)), nibble = _mm256_set1_epi8(15);
        table_product<T, 0, 2>(plane, codes, _mm256_and_si256(_mm256_srli_epi16(table, 4), nibble), ahead, sums);
        for (PlaneSums& sum : sums) widen_sums(sum, _mm256_set1_epi16(16));
        table_product<T, 0, 2>(plane, codes, _mm256_and_si256(table, nibble), ahead, other);
    } else if constexpr (C == Codes::e2m1) {
        const __m256i table = _mm256_sub_epi8(_mm256_broadcastsi128_si256(load_bytes(kE2m1)), _mm256_set1_epi8(116));
        table_product<T, 0, 1>(plane, codes, table, ahead, sums);
        for (PlaneSums& sum : sums) widen_sums(sum, ones);
        table_product<T, 1, 2>(plane, codes, table, ahead, other);
    } else {
        plane_product<T>(plane, codes, ahead, sums);
        for (PlaneSums& sum : sums) widen_sums(sum, ones);
    }
    for (int t = 0; t < T; ++t) {
        if constexpr (C == Codes::nonlinear || C == Codes::e2m1) {
            widen_sums(other[t], ones);
            add_sums(sums[t], other[t]);
        }
        int correction = 0;
        if constexpr (C == Codes::zero8) correction = extra[t].zero;
        if constexpr (C == Codes::nonlinear) correction = extra[t].table;
        if constexpr (C == Codes::e2m1) correction = extra[t].zero + extra[t].zero / 2;  // -12 * sum
        const __m256i shift = _mm256_set1_epi32(correction);
        dots[t] = {_mm256_cvtepi32_ps(_mm256_add_epi32(sums[t].first, shift)),
                   _mm256_cvtepi32_ps(_mm256_add_epi32(sums[t].last, shift))};
    }
}

// One half of a group of planes6: 32-bit sums, the correction of `Extra` not in them.
template <int T, bool Full, int Half>
[[gnu::always_inline]] inline void half_product(const uint8_t* hi, const uint8_t* lo, const int8_t* codes, PlaneSums (&sums)[T]) {
    const __m256i upper = _mm256_set1_epi8(0x3C), lower = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
    auto six = [&](int at, int j) __attribute__((always_inline)) {
        const __m256i both = load_plane(hi + 64 * j + at);
        __m256i bits = _mm256_and_si256(Half ? _mm256_srli_epi16(both, 2) : _mm256_slli_epi16(both, 2), upper);
        if constexpr (Full) {
            const __m256i pairs = load_plane(lo + 64 * (j / 2) + at);
            bits = _mm256_or_si256(bits, _mm256_and_si256(_mm256_srli_epi16(pairs, 4 * (j % 2) + 2 * Half), lower));
        }
        return bits;
    };
    for (int t = 0; t < T; ++t) sums[t].first = sums[t].last = _mm256_setzero_si256();
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
        PlaneSums part[T];
        for (int t = 0; t < T; ++t) part[t].first = part[t].last = _mm256_setzero_si256();
#pragma GCC unroll 2
        for (int j = 2 * v; j < 2 * v + 2; ++j) add_products<T>(codes + 16 * Half + 4 * j, six(0, j), six(32, j), part);
        for (int t = 0; t < T; ++t) {
            widen_sums(part[t], ones);
            add_sums(sums[t], part[t]);
        }
    }
}

// float(sc0 * dot0 + sc1 * dot1) of a group of planes6.
template <int T, bool Full>
[[gnu::always_inline]] inline void plane_dots(const uint8_t* hi, const uint8_t* lo, const uint8_t* steps, const int8_t* codes,
                                              const Extra* extra, int64_t ahead, Lanes (&dots)[T]) {
    for (int at = 0; at < 256; at += 64) _mm_prefetch(reinterpret_cast<const char*>(hi + ahead + at), _MM_HINT_T0);
    if constexpr (Full)
        for (int at = 0; at < 128; at += 64) _mm_prefetch(reinterpret_cast<const char*>(lo + ahead + at), _MM_HINT_T0);
    PlaneSums low[T], high[T];
    half_product<T, Full, 0>(hi, lo, codes, low);
    half_product<T, Full, 1>(hi, lo, codes, high);
    auto dot = [&](__m256i a, __m256i b, int t, int rows) __attribute__((always_inline)) {
        a = _mm256_mullo_epi32(_mm256_add_epi32(a, _mm256_set1_epi32(extra[t].first)), signed_integers(steps + rows));
        b = _mm256_mullo_epi32(_mm256_add_epi32(b, _mm256_set1_epi32(extra[t].second)), signed_integers(steps + 16 + rows));
        return _mm256_cvtepi32_ps(_mm256_add_epi32(a, b));
    };
    for (int t = 0; t < T; ++t) dots[t] = {dot(low[t].first, high[t].first, t, 0), dot(low[t].last, high[t].last, t, 8)};
}
