// Attention of many queries to one latent key of a position, written once on 16 lanes; included by kernels.inl.
//
// A lane is a query, so that a load of a position serves all heads: a score is one chain over the dimensions of the key, as in
// `score_blocks`, and an output one chain over positions, as in `add_values`. All sums are fp32.

// Scores of 16 queries, columns (key_dim, 16), at P positions, rows (P, key_dim).
template <int P>
inline void latent_lanes(const float* columns, const float* rows, int key_dim, Lanes* sum) {
    for (int p = 0; p < P; ++p) sum[p] = set1(0);
    for (int i = 0; i < key_dim; ++i) {
        const Lanes element = load(columns + 16 * i);
        for (int p = 0; p < P; ++p) sum[p] = sum[p] + element * set1(rows[p * key_dim + i]);
    }
}

void latent_scores(const float* columns, int count, const LatentPages& pages, int first, int last, float scale, float* scores,
                   int64_t stride, float* widened) {
    constexpr int P = kLatentPositions;
    const int64_t key_dim = pages.key_dim;
    for (int position = first; position < last; position += P) {
        widen(pages.at(position), widened, P * key_dim);
        const int taken = last - position < P ? last - position : P;
        for (int query = 0; query < count; query += 16) {
            Lanes sum[P];
            latent_lanes<P>(columns + query * key_dim, widened, pages.key_dim, sum);
            const int lanes = count - query < 16 ? count - query : 16;
            for (int p = 0; p < taken; ++p) {
                float lane[16];
                store(lane, sum[p] * set1(scale));
                for (int l = 0; l < lanes; ++l) scores[(query + l) * stride + position + p] = lane[l];
            }
        }
    }
}

void latent_values(const Query* queries, int count, const LatentPages& pages, int first_dim, int dims, const float* weights,
                   int64_t stride, const float* divisors, float* widened) {
    int longest = 0;
    for (int q = 0; q < count; ++q) {
        longest = queries[q].length > longest ? queries[q].length : longest;
        for (int i = 0; i < dims; i += 16) store(queries[q].out + i, set1(0));
    }
    by_tile(0, longest, pages.rows, pages.page_positions, pages.key_dim, [&](const PositionTile& tile) {
        for (int64_t p = 0; p < tile.count; ++p) widen(tile.start + p * pages.key_dim + first_dim, widened + p * dims, dims);
        value_tile(queries, count, {tile.position, tile.count, nullptr, nullptr, 0}, widened, dims, weights, stride);
    });
    for (int q = 0; q < count; ++q)
        for (int i = 0; i < dims; i += 16) store(queries[q].out + i, load(queries[q].out + i) / set1(divisors[q]));
}
