// Integer dots of the packed formats in plain C++; see formats.inl.

constexpr int kPlaneTile = 4;

inline Lanes load_unsigned(const uint8_t* p) {
    Lanes r;
    for (int i = 0; i < 16; ++i) r.v[i] = static_cast<float>(p[i]);
    return r;
}
inline Lanes load_signed(const uint8_t* p) {
    Lanes r;
    for (int i = 0; i < 16; ++i) r.v[i] = static_cast<float>(static_cast<int8_t>(p[i]));
    return r;
}
inline Lanes load_power(const uint8_t* p) {  // 2^(byte - 128)
    Lanes r;
    for (int i = 0; i < 16; ++i) {
        const uint32_t e = p[i];
        r.v[i] = from_bits(e < 2 ? 0x00200000u << e : (e - 1) << 23);
    }
    return r;
}

template <Codes C>
inline int code_value(int code) {
    if constexpr (C == Codes::plain) return code;
    if constexpr (C == Codes::zero8) return code - 8;
    return (C == Codes::e2m1 ? kE2m1 : kNonlinear)[code] - 128;
}

// float(dot) of a group for 16 rows and T tokens.
template <int T, Codes C>
inline void code_dots(const uint8_t* plane, const int8_t* codes, const Extra*, int64_t, Lanes (&dots)[T]) {
    for (int t = 0; t < T; ++t) {
        const int8_t* x = codes + t * kGroup;
        int32_t sum[16] = {};
        for (int j = 0; j < 4; ++j)
            for (int n = 0; n < 16; ++n)
                for (int i = 0; i < 4; ++i) {
                    const int both = plane[64 * j + 4 * n + i];
                    sum[n] += code_value<C>(both & 15) * x[4 * j + i] + code_value<C>(both >> 4) * x[16 + 4 * j + i];
                }
        for (int n = 0; n < 16; ++n) dots[t].v[n] = static_cast<float>(sum[n]);
    }
}

// float(sc0 * dot0 + sc1 * dot1) of a group of planes6.
template <int T, bool Full>
inline void plane_dots(const uint8_t* hi, const uint8_t* lo, const uint8_t* steps, const int8_t* codes, const Extra* extra,
                       int64_t, Lanes (&dots)[T]) {
    for (int t = 0; t < T; ++t) {
        const int8_t* x = codes + t * kGroup;
        int32_t first[16], second[16];
        for (int n = 0; n < 16; ++n) first[n] = extra[t].first, second[n] = extra[t].second;
        for (int j = 0; j < 4; ++j)
            for (int n = 0; n < 16; ++n)
                for (int i = 0; i < 4; ++i) {
                    const int both = hi[64 * j + 4 * n + i];
                    int low = (both & 15) << 2, high = (both >> 4) << 2;
                    if constexpr (Full) {
                        const int pairs = lo[64 * (j / 2) + 4 * n + i] >> 4 * (j % 2);
                        low |= pairs & 3;
                        high |= pairs >> 2 & 3;
                    }
                    first[n] += low * x[4 * j + i];
                    second[n] += high * x[16 + 4 * j + i];
                }
        for (int n = 0; n < 16; ++n)
            dots[t].v[n] = static_cast<float>(static_cast<int8_t>(steps[n]) * first[n] +
                                              static_cast<int8_t>(steps[16 + n]) * second[n]);
    }
}
