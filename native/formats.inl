// Matmul of the formats other than nested8, written once on 16 lanes; included by each instruction set after its `code_dots` and
// `plane_dots`. A group adds to the one fp32 chain of a row and a token (s, M: the row's scale and minimum in the group; sx: the
// token's scale; nothing is fused):
//     affine4_1, affine4_k    float(dot(u, x)) * (s * sx) - M * (sx * float(sum x)), the difference rounded once
//     affine4_0, table4       float(dot(q, x)) * (s * sx), q the code less 8, or the table's integer
//     planes6                 float(sc0 * dot0 + sc1 * dot1) * (s * sx), dot0 and dot1 over 16 columns each
// Bounds: |dot| <= 32 * 127 * 127 < 2^19, and with the corrections of `Extra` below 2^21; in planes6 every partial sum of
// sc * dot is at most 2 * 128 * 16 * 32 * 127 < 2^24. All integers fit int32, and their floats are exact.

template <Format F>
constexpr Codes kCodes = F == Format::affine4_0 ? Codes::zero8
                         : F == Format::table4_mx ? Codes::e2m1
                         : F == Format::table4_nl || F == Format::table4_xs ? Codes::nonlinear : Codes::plain;

template <Format F, bool Full, int T>
inline void packed_product(const Matrix& m, int64_t block, const Tile& tile, int from, float* y, int64_t stride) {
    constexpr FormatShape shape = shape_of(F);
    constexpr bool by_super = shape.scales == kSuper, minima = shape.minima > 0;
    const int groups = m.groups(), tokens = tile.tokens;
    const int64_t cell = block * groups, super = block * ceil_div(groups, kSuper), ahead = prefetch_ahead;
    const uint8_t *hi = m.hi + cell * kGroupBytes, *lo = shape.lo && Full ? m.lo + cell * shape.lo : nullptr;
    const uint8_t* steps = shape.steps ? m.steps + cell * shape.steps : nullptr;
    const uint16_t* scales = shape.scales ? m.scales + (by_super ? super : cell) * kBlockRows : nullptr;
    const uint16_t* least = minima ? m.minima + (by_super ? super : cell) * kBlockRows : nullptr;
    const int8_t* codes = tile.codes + from * kGroup;
    const float* token_scales = tile.scales + from;
    const Extra* extra = tile.extra + from;
    Lanes total[T], shared = set1(0), shared_minimum = set1(0);
    for (int t = 0; t < T; ++t) total[t] = set1(0);
    for (int g = 0; g < groups; ++g, hi += kGroupBytes, codes += tokens * kGroup, token_scales += tokens, extra += tokens) {
        if (shape.scales && (!by_super || g % kSuper == 0)) {
            shared = load_half(scales);
            scales += kBlockRows;
            if constexpr (minima) {
                shared_minimum = load_half(least);
                least += kBlockRows;
            }
        }
        Lanes dots[T], scale = shared, minimum = shared_minimum;
        if constexpr (F == Format::planes6) {
            plane_dots<T, Full>(hi, lo, steps, codes, extra, ahead, dots);
            if constexpr (Full) lo += shape.lo;
        } else {
            code_dots<T, kCodes<F>>(hi, codes, extra, ahead, dots);
            if constexpr (F == Format::affine4_k) {
                scale = shared * load_unsigned(steps);
                minimum = shared_minimum * load_unsigned(steps + kBlockRows);
            }
            if constexpr (F == Format::table4_xs) scale = shared * load_signed(steps);
            if constexpr (F == Format::table4_mx) scale = load_power(steps);
        }
        steps += shape.steps;
        for (int t = 0; t < T; ++t) {
            Lanes term = dots[t] * (scale * set1(token_scales[t]));
            if constexpr (minima) term = term - minimum * set1(extra[t].sum);
            total[t] = total[t] + term;
        }
    }
    for (int t = 0; t < T; ++t) store(y + t * stride, total[t]);
}

template <Format F, bool Full, int T = 1>
inline void packed_tokens(const Matrix& m, int64_t block, const Tile& tile, int from, int count, float* y, int64_t stride) {
    if constexpr (T < (F == Format::planes6 ? kPlaneTile : kTile))
        if (count > T) return packed_tokens<F, Full, T + 1>(m, block, tile, from, count, y, stride);
    packed_product<F, Full, T>(m, block, tile, from, y, stride);
}

// A tile may have more tokens than the accumulators hold: it is cut into equal parts.
template <Format F, bool Full = true>
void packed_blocks(const Matrix& m, int first, int last, const Tile* tiles, int count, float* y, int64_t stride) {
    constexpr int most = F == Format::planes6 ? kPlaneTile : kTile;
    for (int block = first; block < last; ++block) {
        float* row = y + static_cast<int64_t>(block) * kBlockRows;
        for (int i = 0; i < count; row += tiles[i].tokens * stride, ++i) {
            const int size = ceil_div(tiles[i].tokens, ceil_div(tiles[i].tokens, most));
            for (int from = 0; from < tiles[i].tokens; from += size) {
                const int left = tiles[i].tokens - from;
                packed_tokens<F, Full>(m, block, tiles[i], from, left < size ? left : size, row + from * stride, stride);
            }
        }
    }
}

// Drafts of formats with one slice read the same bits.
void packed_matmul(const Matrix& m, bool draft, int first, int last, const Tile* tiles, int count, float* y, int64_t stride) {
    switch (m.format) {
        case Format::nested8:
            return;
        case Format::affine4_0:
            return packed_blocks<Format::affine4_0>(m, first, last, tiles, count, y, stride);
        case Format::affine4_1:
            return packed_blocks<Format::affine4_1>(m, first, last, tiles, count, y, stride);
        case Format::affine4_k:
            return packed_blocks<Format::affine4_k>(m, first, last, tiles, count, y, stride);
        case Format::table4_nl:
            return packed_blocks<Format::table4_nl>(m, first, last, tiles, count, y, stride);
        case Format::table4_xs:
            return packed_blocks<Format::table4_xs>(m, first, last, tiles, count, y, stride);
        case Format::table4_mx:
            return packed_blocks<Format::table4_mx>(m, first, last, tiles, count, y, stride);
        case Format::planes6:
            if (draft) return packed_blocks<Format::planes6, false>(m, first, last, tiles, count, y, stride);
            return packed_blocks<Format::planes6>(m, first, last, tiles, count, y, stride);
    }
}
