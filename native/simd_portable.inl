// 16 lanes in an array: plain C++ that a compiler may vectorise as it likes; fp16 conversion in software.
//
// d = c + dot(u, x) (see kernels.inl) in int32, below 2^21 throughout.

struct Lanes {
    float v[16];
};
#define ELMOE_EACH(expression)                      \
    Lanes r;                                        \
    for (int i = 0; i < 16; ++i) r.v[i] = expression; \
    return r
inline Lanes load(const float* p) { ELMOE_EACH(p[i]); }
inline void store(float* p, const Lanes& a) {
    for (int i = 0; i < 16; ++i) p[i] = a.v[i];
}
inline Lanes set1(float a) { ELMOE_EACH(a); }
inline Lanes operator+(const Lanes& a, const Lanes& b) { ELMOE_EACH(a.v[i] + b.v[i]); }
inline Lanes operator-(const Lanes& a, const Lanes& b) { ELMOE_EACH(a.v[i] - b.v[i]); }
inline Lanes operator*(const Lanes& a, const Lanes& b) { ELMOE_EACH(a.v[i] * b.v[i]); }
inline Lanes operator/(const Lanes& a, const Lanes& b) { ELMOE_EACH(a.v[i] / b.v[i]); }
inline Lanes minimum(const Lanes& a, const Lanes& b) { ELMOE_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline Lanes maximum(const Lanes& a, const Lanes& b) { ELMOE_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline float rint_one(float x) {  // to nearest even, for |x| < 2^22 (adding 1.5 * 2^23 rounds); larger values are integral
    if (!(x < 4194304.0f && x > -4194304.0f)) return x;
    const float shifted = x + 12582912.0f;
    return shifted - 12582912.0f;
}
inline Lanes rint(const Lanes& a) { ELMOE_EACH(rint_one(a.v[i])); }
inline Lanes zero_where_less(const Lanes& a, const Lanes& b, const Lanes& value) {
    ELMOE_EACH(a.v[i] < b.v[i] ? 0.0f : value.v[i]);
}
inline float from_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t to_bits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}
inline Lanes power_of_two(const Lanes& n) { ELMOE_EACH(from_bits(static_cast<uint32_t>(static_cast<int>(n.v[i]) + 127) << 23)); }
inline Lanes keep_first(const Lanes& a, int count, float other) { ELMOE_EACH(i < count ? a.v[i] : other); }

inline float half_to_float(uint16_t h) {
    uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    if (exponent == 31) return from_bits(sign | 0x7F800000u | mantissa << 13);
    if (exponent) return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
    float value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24, exact
    return sign ? -value : value;
}
inline uint16_t float_to_half(float value) {  // round to nearest even
    uint32_t bits = to_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude >= 0x7F800000u) return static_cast<uint16_t>(sign | 0x7C00u | (magnitude > 0x7F800000u ? 0x200u : 0));
    if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // rounds to infinity
    if (magnitude < 0x38800000u) {  // subnormal: the unit is 2^-24
        if (magnitude < 0x33000000u) return static_cast<uint16_t>(sign);
        uint32_t exponent = magnitude >> 23, mantissa = (magnitude & 0x7FFFFFu) | 0x800000u, shift = 126 - exponent;
        uint32_t result = mantissa >> shift, rest = mantissa & ((1u << shift) - 1), middle = 1u << (shift - 1);
        result += rest > middle || (rest == middle && (result & 1));
        return static_cast<uint16_t>(sign | result);
    }
    uint32_t result = (magnitude - 0x38000000u) >> 13, rest = magnitude & 0x1FFFu;
    result += rest > 0x1000u || (rest == 0x1000u && (result & 1));
    return static_cast<uint16_t>(sign | result);
}
inline Lanes load_half(const uint16_t* p) { ELMOE_EACH(half_to_float(p[i])); }
inline void store_half(uint16_t* p, const Lanes& a) {
    for (int i = 0; i < 16; ++i) p[i] = float_to_half(a.v[i]);
}
inline uint32_t largest_magnitude(const float* p) {
    uint32_t best = 0;
    for (int i = 0; i < 16; ++i) {
        uint32_t bits = to_bits(p[i]) & 0x7FFFFFFFu;
        best = bits > best ? bits : best;
    }
    return best;
}
inline int store_codes(int8_t* p, const Lanes& a) {
    int sum = 0;
    for (int i = 0; i < 16; ++i) {
        p[i] = static_cast<int8_t>(a.v[i]);
        sum += p[i];
    }
    return sum;
}
#undef ELMOE_EACH

// Attention keeps Q * kKeyBlocks<Q> sums of scores and Q * kValueChunks<Q> sums of outputs in registers.
constexpr int kTogether = 4;  // most queries Q
constexpr int kWiden = 2;     // least queries for which keys and values are converted once, to memory
template <int Q>
constexpr int kKeyBlocks = 1;
template <int Q>
constexpr int kValueChunks = 8 / Q;
constexpr int kLatentPositions = 2;  // whose scores of 16 queries are in registers
constexpr int kTile = 4;

template <int T, bool Full>
inline void block_product(const uint8_t* hi, const uint8_t* lo, const uint16_t* scales, int groups, const Tile& tile, float* y,
                          int64_t stride) {
    const int8_t* codes = tile.codes;
    const float* token_scales = tile.scales;
    const int32_t* correction = tile.correction;
    Lanes total[T];
    for (int t = 0; t < T; ++t) total[t] = set1(0);
    for (int g = 0; g < groups; ++g, hi += kGroupBytes, lo += kGroupBytes, scales += kBlockRows, codes += T * kGroup,
             token_scales += T, correction += T) {
        Lanes scale = load_half(scales);
        for (int t = 0; t < T; ++t) {
            const int8_t* x = codes + t * kGroup;
            int32_t sum[16];
            for (int n = 0; n < 16; ++n) sum[n] = correction[t];
            for (int j = 0; j < 4; ++j)
                for (int n = 0; n < 16; ++n)
                    for (int i = 0; i < 4; ++i) {
                        int at = 64 * j + 4 * n + i, first = (hi[at] & 15) << 4, second = hi[at] & 0xF0;
                        if constexpr (Full) {
                            first |= lo[at] & 15;
                            second |= lo[at] >> 4;
                        }
                        sum[n] += first * x[4 * j + i] + second * x[16 + 4 * j + i];
                    }
            for (int n = 0; n < 16; ++n) {
                float term = static_cast<float>(sum[n]) * (scale.v[n] * token_scales[t]);
                total[t].v[n] = total[t].v[n] + term;
            }
        }
    }
    for (int t = 0; t < T; ++t) store(y + t * stride, total[t]);
}

uint64_t read(const uint8_t* data, int64_t size) {
    uint64_t total = 0;
    int64_t i = 0;
    for (; i + 8 <= size; i += 8) {
        uint64_t word;
        __builtin_memcpy(&word, data + i, 8);
        total += word;
    }
    for (; i < size; ++i) total += data[i];
    return total;
}
