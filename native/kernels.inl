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

bool quantize(const float* x, int columns, const Tile& tile, int t, int factor) {
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
        int sum = 0;
        if (scale == 0.0f) {
            for (int i = 0; i < kGroup; ++i) codes[i] = 0;
        } else {
            const Lanes s = set1(scale), bound = set1(127.0f), lower = set1(-127.0f);
            for (int half = 0; half < kGroup; half += 16) {
                Lanes code = minimum(maximum(rint(load(p + half) / s), lower), bound);
                sum += store_codes(codes + half, code);
            }
        }
        tile.correction[at] = factor * sum;
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

// Q queries over C chunks of 16 dimensions: positions that all of them see together, then each one's own rest, so that every
// sum ascends from position 0.
template <int Q, int C>
inline void weigh_values(const HeadPages& pages, const Query* queries, int head_dim, int chunk, const float* weights,
                         int64_t stride, const Lanes* divisors) {
    Lanes total[Q][C];
    int common = queries[0].length;
    for (int q = 0; q < Q; ++q) {
        common = queries[q].length < common ? queries[q].length : common;
        for (int c = 0; c < C; ++c) total[q][c] = set1(0);
    }
    const int size = pages.page_positions;
    for (int page = 0, position = 0; position < common; ++page) {
        const uint16_t* values = pages.values[page] + chunk * 16;
        const int end = common - position < size ? common : position + size;
        for (; position < end; ++position, values += head_dim)
            for (int c = 0; c < C; ++c) {
                const Lanes value = load_half(values + 16 * c);
                for (int q = 0; q < Q; ++q) total[q][c] = total[q][c] + set1(weights[q * stride + position]) * value;
            }
    }
    for (int q = 0; q < Q; ++q) {
        for (int position = common; position < queries[q].length; ++position) {
            const uint16_t* values = pages.values[position / size] + static_cast<int64_t>(position % size) * head_dim + chunk * 16;
            const Lanes weight = set1(weights[q * stride + position]);
            for (int c = 0; c < C; ++c) total[q][c] = total[q][c] + weight * load_half(values + 16 * c);
        }
        for (int c = 0; c < C; ++c) store(queries[q].out + (chunk + c) * 16, total[q][c] / divisors[q]);
    }
}

template <int Q>
inline void attend_together(const Query* queries, const HeadPages& pages, int head_dim, float scale, float* scores,
                            int64_t stride) {
    const float least = -__builtin_inff();
    int longest = 0;
    Lanes best[Q], divisors[Q];
    for (int q = 0; q < Q; ++q) {
        best[q] = set1(least);
        longest = queries[q].length > longest ? queries[q].length : longest;
    }
    for (int start = 0; start < longest; start += 16) {
        const uint16_t* keys = pages.keys[start / pages.page_positions];
        keys += static_cast<int64_t>(start % pages.page_positions) * head_dim;
        Lanes sum[Q];
        for (int q = 0; q < Q; ++q) sum[q] = set1(0);
        for (int i = 0; i < head_dim; ++i) {
            const Lanes key = load_half(keys + 16 * i);
            for (int q = 0; q < Q; ++q) sum[q] = sum[q] + set1(queries[q].vector[i]) * key;
        }
        for (int q = 0; q < Q; ++q) {
            const int left = queries[q].length - start;
            if (left <= 0) continue;
            Lanes score = sum[q] * set1(scale);
            if (left < 16) score = keep_first(score, left, least);
            store(scores + q * stride + start, score);
            best[q] = maximum(best[q], score);
        }
    }
    for (int q = 0; q < Q; ++q) {
        float* weights = scores + q * stride;
        const Lanes shift = set1(largest(best[q]));
        Lanes sum = set1(0);
        for (int start = 0; start < queries[q].length; start += 16) {
            Lanes e = exp(load(weights + start) - shift);  // positions beyond the length hold -infinity: weight 0
            store(weights + start, e);
            sum = sum + e;
        }
        divisors[q] = set1(tree_sum(sum));
    }
    constexpr int C = kValueChunks<Q>;
    int chunk = 0;
    for (; chunk + C <= head_dim / 16; chunk += C)
        weigh_values<Q, C>(pages, queries, head_dim, chunk, scores, stride, divisors);
    for (; chunk + 2 <= head_dim / 16; chunk += 2)
        weigh_values<Q, 2>(pages, queries, head_dim, chunk, scores, stride, divisors);
    for (; chunk < head_dim / 16; ++chunk) weigh_values<Q, 1>(pages, queries, head_dim, chunk, scores, stride, divisors);
}

void attend(const Query* queries, int count, const HeadPages& pages, int head_dim, float scale, float* scores, int64_t stride) {
    for (; count >= 4; count -= 4, queries += 4) attend_together<4>(queries, pages, head_dim, scale, scores, stride);
    for (; count >= 2; count -= 2, queries += 2) attend_together<2>(queries, pages, head_dim, scale, scores, stride);
    if (count) attend_together<1>(queries, pages, head_dim, scale, scores, stride);
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

const Kernels* table() {
    static const Kernels kernels = {kName,       kTile,  quantize, matmul,  rms_norm,     dots, softmax_numerators,
                                    exp_shifted, swiglu, attend,   to_half, multiply_add, read};
    return &kernels;
}
