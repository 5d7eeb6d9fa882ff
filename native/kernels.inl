// The kernels, written once on 16 lanes; included by each instruction set after its `Lanes` and `block_product`.
//
// Nested matmul of a row with scales s and a token with scales sx, over groups g of 32 inputs:
//     y = ((0 + t[0]) + t[1]) + ...,  t[g] = float(d[g]) * (s[g] * sx[g])        one fp32 chain, multiply then add
//     d[g] = sum of q * x, exact in int32, whatever the order
// `block_product` reads unsigned bytes u instead of the signed weights q: u = q + 128 (16 * hi + lo), or 16 * hi in a draft,
// whose weight is 16 * (hi - 8) + offset. So d = dot(u, x) + c, where c = -128 * sum(x), or (offset - 128) * sum(x) in a draft,
// is computed once per token and group, by `quantize`.
// Bound: u <= 255, |x| <= 127, 0 <= offset <= 16. |dot(u, x)| <= 32 * 255 * 127 = 1,036,320 and |c| <= 32 * 128 * 127 = 520,192,
// so every partial sum is below 2^21: int32 does not overflow, and float(d) is exact.
// Sums of fp32 (norms, dot products of routers, softmax): lane i % 16 adds in ascending i, then the tree of `tree_sum`. Scores
// are chains over ascending dimensions, outputs of attention chains over ascending positions.

// exp of elmoe.bitslice.arithmetic: Cody-Waite reduction, Cephes polynomial, 0 below -87.
inline Lanes exp(Lanes x) {
    const Lanes low = set1(-87.0f);
    Lanes bounded = minimum(maximum(x, low), set1(88.0f));
    Lanes n = rint(bounded * set1(1.44269504f));
    Lanes r = bounded - n * set1(0.693359375f);
    r = r - n * set1(-2.12194440e-4f);
    Lanes p = set1(1.9875691500e-4f);
    p = p * r + set1(1.3981999507e-3f);
    p = p * r + set1(8.3334519073e-3f);
    p = p * r + set1(4.1665795894e-2f);
    p = p * r + set1(1.6666665459e-1f);
    p = p * r + set1(5.0000001201e-1f);
    p = (p * (r * r) + r) + set1(1.0f);
    return zero_where_less(x, low, p * power_of_two(n));
}

inline float tree_sum(Lanes a) {
    float lane[16];
    store(lane, a);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] = lane[i] + lane[i + half];
    return lane[0];
}

inline float largest(Lanes a) {
    float lane[16], best;
    store(lane, a);
    best = lane[0];
    for (float value : lane) best = value > best ? value : best;
    return best;
}

// The last, partial group of 16 of an array, filled up.
inline Lanes load_tail(const float* p, int count, float fill) {
    float lane[16];
    for (int i = 0; i < 16; ++i) lane[i] = i < count ? p[i] : fill;
    return load(lane);
}
inline Lanes load_some(const float* p, int count, float fill) { return count >= 16 ? load(p) : load_tail(p, count, fill); }
inline void store_some(float* p, Lanes a, int count) {
    if (count >= 16) return store(p, a);
    float lane[16];
    store(lane, a);
    for (int i = 0; i < count; ++i) p[i] = lane[i];
}

bool quantize(const float* x, int columns, const Tile& tile, int t, Factors factors) {
    const int groups = ceil_div(columns, kGroup);
    for (int g = 0; g < groups; ++g) {
        const int at = g * tile.tokens + t;
        int8_t* codes = tile.codes + at * kGroup;
        float padded[kGroup];
        const float* p = x + g * kGroup;
        if (columns - g * kGroup < kGroup) {
            for (int i = 0; i < kGroup; ++i) padded[i] = g * kGroup + i < columns ? p[i] : 0.0f;
            p = padded;
        }
        uint32_t low = largest_magnitude(p), high = largest_magnitude(p + 16), bits = low > high ? low : high;
        if (bits >= 0x7F800000u) return false;
        float absmax;
        __builtin_memcpy(&absmax, &bits, 4);
        float scale = absmax / 127.0f;
        tile.scales[at] = scale;
        int first = 0, second = 0;  // sums of a half's codes; no array, which would go through memory in every group
        if (scale == 0.0f) {
            for (int i = 0; i < kGroup; ++i) codes[i] = 0;
        } else {
            const Lanes s = set1(scale), bound = set1(127.0f), lower = set1(-127.0f);
            first = store_codes(codes, minimum(maximum(rint(load(p) / s), lower), bound));
            second = store_codes(codes + 16, minimum(maximum(rint(load(p + 16) / s), lower), bound));
        }
        const int sum = first + second;
        tile.correction[at] = factors.nested * sum;
        if (tile.extra)
            tile.extra[at] = {-128 * sum, -8 * sum, factors.planes * first, factors.planes * second,
                              scale * static_cast<float>(sum)};
    }
    return true;
}

template <int T>
inline void tile_product(const Matrix& m, bool draft, int block, const Tile& tile, float* y, int64_t stride) {
    if constexpr (T < kTile)
        if (tile.tokens > T) return tile_product<T + 1>(m, draft, block, tile, y, stride);
    const int64_t groups = m.groups(), at = block * groups;
    const uint8_t *hi = m.hi + at * kGroupBytes, *lo = draft ? hi : m.lo + at * kGroupBytes;
    const uint16_t* scales = m.scales + at * kBlockRows;
    if (draft)
        block_product<T, false>(hi, lo, scales, static_cast<int>(groups), tile, y, stride);
    else
        block_product<T, true>(hi, lo, scales, static_cast<int>(groups), tile, y, stride);
}

void matmul(const Matrix& m, bool draft, int first, int last, const Tile* tiles, int count, float* y, int64_t stride) {
    if (m.packed()) return packed_matmul(m, draft, first, last, tiles, count, y, stride);
    for (int block = first; block < last; ++block) {
        float* row = y + static_cast<int64_t>(block) * kBlockRows;
        for (int i = 0; i < count; row += tiles[i].tokens * stride, ++i)
            tile_product<1>(m, draft, block, tiles[i], row, stride);
    }
}

void rms_norm(const float* x, const float* weight, float* y, int size, float epsilon) {
    Lanes squares = set1(0);
    for (int i = 0; i < size; i += 16) {
        Lanes a = load_some(x + i, size - i, 0);
        squares = squares + a * a;
    }
    float mean = tree_sum(squares) / static_cast<float>(size);
    float root;
    root = __builtin_sqrtf(mean + epsilon);
    const Lanes inverse = set1(1.0f / root);
    for (int i = 0; i < size; i += 16)
        store_some(y + i, load_some(x + i, size - i, 0) * inverse * load_some(weight + i, size - i, 0), size - i);
}

void dots(const float* x, const float* rows, int count, int size, float* out) {
    for (int row = 0; row < count; ++row, rows += size) {
        Lanes sum = set1(0);
        for (int i = 0; i < size; i += 16) sum = sum + load_some(x + i, size - i, 0) * load_some(rows + i, size - i, 0);
        out[row] = tree_sum(sum);
    }
}

inline float maximum_of(const float* x, int size) {
    Lanes best = load_some(x, size, x[0]);
    for (int i = 16; i < size; i += 16) best = maximum(best, load_some(x + i, size - i, x[0]));
    return largest(best);
}

void exp_shifted(const float* x, float shift, float* y, int size) {
    const Lanes s = set1(shift);
    for (int i = 0; i < size; i += 16) store_some(y + i, exp(load_some(x + i, size - i, shift) - s), size - i);
}

float softmax_numerators(float* x, int size) {
    const Lanes s = set1(maximum_of(x, size));
    Lanes sum = set1(0);
    for (int i = 0; i < size; i += 16) {
        Lanes e = keep_first(exp(load_some(x + i, size - i, 0) - s), size - i < 16 ? size - i : 16, 0.0f);
        store_some(x + i, e, size - i);
        sum = sum + e;
    }
    return tree_sum(sum);
}

void swiglu(const float* gate, const float* up, float* out, int size) {
    for (int i = 0; i < size; i += 16) {
        Lanes g = load_some(gate + i, size - i, 0), u = load_some(up + i, size - i, 0);
        store_some(out + i, g / (set1(1.0f) + exp(g * set1(-1.0f))) * u, size - i);
    }
}

// The bound is the first operand: where an operand is NaN, the second one is the result in all variants.
void clamped_swiglu(float* gate, const float* up, const float* gate_bias, const float* up_bias, float alpha, float limit, int size) {
    const Lanes most = set1(limit), least = set1(-limit), one = set1(1.0f), factor = set1(-alpha);
    for (int i = 0; i < size; i += 16) {
        Lanes g = load_some(gate + i, size - i, 0) + load_some(gate_bias + i, size - i, 0);
        Lanes u = load_some(up + i, size - i, 0) + load_some(up_bias + i, size - i, 0);
        g = minimum(most, g);
        u = maximum(least, minimum(most, u));
        store_some(gate + i, g / (one + exp(g * factor)) * (u + one), size - i);
    }
}

inline Lanes load_wide(const uint16_t* p) { return load_half(p); }
inline Lanes load_wide(const float* p) { return load(p); }

// -infinity in the first lanes.
inline Lanes drop_first(Lanes x, int count) {
    float lane[16];
    store(lane, x);
    for (int i = 0; i < 16 && i < count; ++i) lane[i] = -__builtin_inff();
    return load(lane);
}

// Scores of Q queries at P blocks of 16 positions from `position` on; -infinity at positions that a query does not see.
template <int Q, int P, typename T>
inline void score_blocks(const Query* queries, const T* keys, int head_dim, float scale, int position, float* scores,
                         int64_t stride, Lanes* best) {
    Lanes sum[Q][P];
    const int64_t block = 16 * head_dim;
    for (int q = 0; q < Q; ++q)
        for (int p = 0; p < P; ++p) sum[q][p] = set1(0);
    for (int i = 0; i < head_dim; ++i) {
        Lanes key[P];
        for (int p = 0; p < P; ++p) key[p] = load_wide(keys + p * block + 16 * i);
        for (int q = 0; q < Q; ++q) {
            const Lanes element = set1(queries[q].vector[i]);
            for (int p = 0; p < P; ++p) sum[q][p] = sum[q][p] + element * key[p];
        }
    }
    for (int q = 0; q < Q; ++q)
        for (int p = 0; p < P; ++p) {
            const int start = position + 16 * p, seen = queries[q].length - start;
            Lanes score = sum[q][p] * set1(scale);
            if (seen < 16) score = keep_first(score, seen > 0 ? seen : 0, -__builtin_inff());
            if (start < queries[q].first) score = drop_first(score, queries[q].first - start);
            store(scores + q * stride + start, score);
            best[q] = maximum(best[q], score);
        }
}

// Adds the values of `count` positions to the sums of Q queries at C chunks of 16 dimensions.
template <int Q, int C, typename T>
inline void add_values(const Query* queries, const T* values, int count, int head_dim, int chunk, const float* weights,
                       int64_t stride) {
    Lanes total[Q][C];
    for (int q = 0; q < Q; ++q)
        for (int c = 0; c < C; ++c) total[q][c] = load(queries[q].out + (chunk + c) * 16);
    values += chunk * 16;
    for (int position = 0; position < count; ++position, values += head_dim) {
        Lanes value[C];
        for (int c = 0; c < C; ++c) value[c] = load_wide(values + 16 * c);
        for (int q = 0; q < Q; ++q) {
            const Lanes weight = set1(weights[q * stride + position]);
            for (int c = 0; c < C; ++c) total[q][c] = total[q][c] + weight * value[c];
        }
    }
    for (int q = 0; q < Q; ++q)
        for (int c = 0; c < C; ++c) store(queries[q].out + (chunk + c) * 16, total[q][c]);
}

// Calls step(integral constant Q, first) for the queries first .. first + Q - 1, until all had their turn.
template <int Q = kTogether, typename Step>
inline void by_group(int first, int count, const Step& step) {
    for (; first + Q <= count; first += Q) step(std::integral_constant<int, Q>(), first);
    if constexpr (Q > 1) by_group<Q / 2>(first, count, step);
}

// At most kTilePositions consecutive positions of one page: their keys or values, and where those of the next tile lie.
struct PositionTile {
    int position, count;
    const uint16_t *start, *next;
    int64_t next_size;

    // Asks for the next tile's share of queries first .. first + taken - 1 of `all`: their arithmetic hides the wait. A single
    // query has too little of it, and is faster with the processor's own prefetching.
    void prefetch(int first, int taken, int all) const {
        if (all == 1) return;
        const int64_t end = next_size * (first + taken) / all;
        for (int64_t i = next_size * first / all; i < end; i += 32) __builtin_prefetch(next + i, 0, 2);
    }
};

// Calls step(tile) for the tiles of positions first .. positions - 1, in ascending order; `first` begins a block of 16.
template <typename Step>
inline void by_tile(int begin, int positions, const uint16_t* const* data, int page_positions, int head_dim, const Step& step) {
    auto at = [&](int position) {
        if (position >= positions) return PositionTile{position, 0, nullptr, nullptr, 0};
        const int within = position % page_positions, left = page_positions - within, rest = positions - position;
        const int count = left < rest ? left : rest;
        return PositionTile{position, count < kTilePositions ? count : kTilePositions,
                       data[position / page_positions] + static_cast<int64_t>(within) * head_dim, nullptr, 0};
    };
    PositionTile current = at(begin);
    while (current.count > 0) {
        PositionTile next = at(current.position + current.count);
        current.next = next.start;
        current.next_size = static_cast<int64_t>(next.count) * head_dim;
        step(current);
        current = next;
    }
}

template <typename T>
inline void score_tile(const Query* queries, int count, const PositionTile& tile, const T* keys, int head_dim, float scale,
                       float* scores, int64_t stride, Lanes* best) {
    const int blocks = ceil_div(tile.count, 16), position = tile.position;
    by_group(0, count, [&](auto q, int first) {
        tile.prefetch(first, q(), count);
        constexpr int Q = q(), P = kKeyBlocks<Q>;
        int block = 0;
        auto step = [&](auto p) {
            for (; block + p() <= blocks; block += p())
                score_blocks<Q, p()>(queries + first, keys + static_cast<int64_t>(16 * block) * head_dim, head_dim, scale,
                                     position + 16 * block, scores + first * stride, stride, best + first);
        };
        step(std::integral_constant<int, P>());
        step(std::integral_constant<int, 1>());
    });
}

template <typename T>
inline void value_tile(const Query* queries, int count, const PositionTile& tile, const T* values, int head_dim,
                       const float* weights, int64_t stride) {
    by_group(0, count, [&](auto q, int first) {
        tile.prefetch(first, q(), count);
        constexpr int Q = q(), C = kValueChunks<Q>;
        int chunk = 0;
        auto step = [&](auto c) {
            for (; chunk + c() <= head_dim / 16; chunk += c())
                add_values<Q, c()>(queries + first, values, tile.count, head_dim, chunk,
                                   weights + first * stride + tile.position, stride);
        };
        step(std::integral_constant<int, C>());
        step(std::integral_constant<int, 1>());
    });
}

inline const float* widen(const uint16_t* from, float* to, int64_t size) {
    for (int64_t i = 0; i < size; i += 16) store(to + i, load_half(from + i));
    return to;
}

// At most kQueries queries, over tiles of positions that stay in a near cache while all queries use them, widened to fp32 once
// for kWiden queries or more. Every query goes from the earliest first position up to the longest length. Outside its own its
// weights are 0, which changes no sum: the values are finite, and a sum that starts at +0 never becomes -0.
inline void attend_together(const Query* queries, int count, const HeadPages& pages, int head_dim, float scale, float* scores,
                            int64_t stride, float* widened) {
    const bool wide = count >= kWiden;
    int longest = 0, earliest = queries[0].first;
    Lanes best[kQueries];
    for (int q = 0; q < count; ++q) {
        best[q] = set1(queries[q].sink);
        longest = queries[q].length > longest ? queries[q].length : longest;
        earliest = queries[q].first < earliest ? queries[q].first : earliest;
    }
    earliest -= earliest % 16;
    by_tile(earliest, longest, pages.keys, pages.page_positions, head_dim, [&](const PositionTile& keys) {
        if (wide)
            score_tile(queries, count, keys, widen(keys.start, widened, int64_t{16} * ceil_div(keys.count, 16) * head_dim),
                       head_dim, scale, scores, stride, best);
        else
            score_tile(queries, count, keys, keys.start, head_dim, scale, scores, stride, best);
    });
    Lanes divisors[kQueries];
    for (int q = 0; q < count; ++q) {
        float* weights = scores + q * stride;
        const Lanes shift = set1(largest(best[q]));
        Lanes sum = set1(0);
        for (int start = earliest; start < longest; start += 16) {
            Lanes e = exp(load(weights + start) - shift);
            store(weights + start, e);
            sum = sum + e;
        }
        divisors[q] = set1(tree_sum(sum));
        if (queries[q].sink > -__builtin_inff()) divisors[q] = divisors[q] + exp(set1(queries[q].sink) - shift);
        for (int i = 0; i < head_dim; i += 16) store(queries[q].out + i, set1(0));
    }
    by_tile(earliest, longest, pages.values, pages.page_positions, head_dim, [&](const PositionTile& values) {
        if (wide)
            value_tile(queries, count, values, widen(values.start, widened, int64_t{values.count} * head_dim), head_dim, scores,
                       stride);
        else
            value_tile(queries, count, values, values.start, head_dim, scores, stride);
    });
    for (int q = 0; q < count; ++q)
        for (int i = 0; i < head_dim; i += 16) store(queries[q].out + i, load(queries[q].out + i) / divisors[q]);
}

void attend(const Query* queries, int count, const HeadPages& pages, int head_dim, float scale, float* scores, int64_t stride) {
    float* widened = scores + kQueries * stride;
    for (; count > 0; count -= kQueries, queries += kQueries)
        attend_together(queries, count < kQueries ? count : kQueries, pages, head_dim, scale, scores, stride, widened);
}

bool to_half(const float* x, uint16_t* y, int size) {
    bool finite = true;
    for (int i = 0; i < size; i += 16) {
        uint16_t lane[16];
        store_half(lane, load_some(x + i, size - i, 0));
        for (int k = 0; k < 16 && i + k < size; ++k) {
            y[i + k] = lane[k];
            finite &= (lane[k] & 0x7C00) != 0x7C00;
        }
    }
    return finite;
}

void multiply_add(float* total, float weight, const float* y, int size) {
    const Lanes w = set1(weight);
    for (int i = 0; i < size; i += 16)
        store_some(total + i, load_some(total + i, size - i, 0) + w * load_some(y + i, size - i, 0), size - i);
}

void add(float* total, const float* y, int size) {
    for (int i = 0; i < size; i += 16)
        store_some(total + i, load_some(total + i, size - i, 0) + load_some(y + i, size - i, 0), size - i);
}

#include "latent.inl"

const Kernels* table() {
    static const Kernels kernels = {kName,          kTile,  quantize, matmul,       rms_norm, dots, softmax_numerators, exp_shifted, swiglu,
                                    clamped_swiglu, attend, to_half,  multiply_add, add,      read, latent_scores, latent_values};
    return &kernels;
}
