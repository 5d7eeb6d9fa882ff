// Multi-head latent attention over the paged fp16 cache, absorbed, as elmoe.bitslice.latent defines it.
//
// For a token with residual stream x: h = rms_norm(x); (q, c, k) = projection * h, where q may pass a norm and a second matmul;
// c is normed, k and the rotary part of each head's q are rotated; c and k are rounded to fp16, nearest even, and written to the
// cache as one row of rank + rotary values. Then per head, over the positions p = 0 .. the token's own, with a = key_up * (plain
// part of q) in front of the rotary part:
//     s[p] = (sum over i ascending of a[i] * row[p][i]) * scale                     one fp32 chain
//     e[p] = exp(s[p] - max s),  z = sum of e[p] as 16 lane sums (p mod 16) and the fixed tree
//     o[i] = (sum over p ascending of e[p] * row[p][i]) / z,  i < rank              one fp32 chain, one division
// and x = x + output * (value_up * o of all heads). The integers of the matmuls are bounded as in kernels.inl; all else is fp32.
// Scores are shared out by positions, softmax by heads, sums by dimensions: a row is read once for all heads of a token.
#include <algorithm>
#include <atomic>

#include "attention.hpp"

namespace elmoe {

namespace {

constexpr int kLatentQueries = 64;  // least queries of a run, if there are as many: they fill the lanes and share loads
constexpr int kDims = 64;           // of the latent, summed in one task
constexpr int64_t kScores = 8 << 20;  // most scores in memory, if they are not those of one run

// Calls one(task) for all tasks, on the pool unless they are small.
template <typename One>
void share(bool serial, int tasks, const One& one) {
    if (serial)
        for (int task = 0; task < tasks; ++task) one(task, 0);
    else
        Pool::instance().run(tasks, one);
}

// The rotation of 2 * pairs dimensions; each product is rounded before the sum (no contraction).
void turn(const float* x, float* y, int pairs, const float* cosine, const float* sine, bool interleaved) {
    const int step = interleaved ? 2 : 1, other = interleaved ? 1 : pairs;
    for (int i = 0; i < pairs; ++i) {
        const float first = x[step * i], second = x[step * i + other];
        y[step * i] = first * cosine[i] - second * sine[i];
        y[step * i + other] = second * cosine[i] + first * sine[i];
    }
}

// y[t * stride + h * step + r] = row r of head h's part of the matrix times x[h][t], for x (heads, tokens, columns).
void by_head(const Matrix& matrix, int heads, const float* x, int tokens, float* y, int64_t step, int64_t stride) {
    const int64_t rows = matrix.rows / heads;
    const int blocks = static_cast<int>(rows) / kBlockRows, parts = std::min(blocks, ceil_div(4 * Pool::instance().threads(), heads));
    std::vector<std::vector<Tile>> tiles(heads);
    for (int64_t h = 0; h < heads; ++h)
        tiles[h] = quantize_rows(x + h * tokens * matrix.columns, tokens, matrix.columns, kFull, matrix.packed());
    Pool::instance().run(heads * parts, [&](int task, int) {
        const int h = task / parts, part = task % parts, at = h * blocks;
        kernels().matmul(matrix, false, at + blocks * part / parts, at + blocks * (part + 1) / parts, tiles[h].data(),
                         static_cast<int>(tiles[h].size()), y + h * (step - rows), stride);
    });
}

// One call. `plain` (heads, tokens, plain): what is absorbed. `queries` (tokens, heads, key_dim): absorbed and rotated.
struct Call {
    const LatentLayer& layer;
    const Places& places;
    const Cache& cache;
    int layer_index;
    float *plain, *queries;

    const uint16_t* page(int slot, int stretch) const {
        return cache.values + cache.block(slot, stretch, layer_index, 0) * cache.page_positions * layer.key_dim();
    }
};

// Splits and rotates a token's query, and writes its latent and rotary key; false if one is not finite in fp16. `latent`: they
// are behind it in the same row.
bool prepare_token(const Call& call, int t, const float* query, float* latent) {
    const Kernels& k = kernels();
    const LatentLayer& layer = call.layer;
    const int slot = call.places.slots[t], position = call.places.positions[t], pairs = call.places.pairs;
    const float *cosine = call.places.cosine + static_cast<int64_t>(position) * pairs,
                *sine = call.places.sine + static_cast<int64_t>(position) * pairs;
    k.rms_norm(latent, layer.latent_norm, latent, layer.rank, layer.latent_epsilon);
    turn(latent + layer.rank, latent + layer.rank, pairs, cosine, sine, layer.interleaved);
    const int64_t key_dim = layer.key_dim();
    const int page = position / call.cache.page_positions, within = position % call.cache.page_positions;
    auto* row = const_cast<uint16_t*>(call.page(slot, page)) + within * key_dim;
    for (int64_t h = 0; h < layer.heads; ++h, query += layer.plain + layer.rotary) {
        std::copy(query, query + layer.plain, call.plain + (h * call.places.tokens + t) * layer.plain);
        turn(query + layer.plain, call.queries + (static_cast<int64_t>(t) * layer.heads + h) * key_dim + layer.rank, pairs, cosine,
             sine, layer.interleaved);
    }
    return k.to_half(latent, row, static_cast<int>(key_dim));
}

// Runs of tokens whose scores are in memory at the same time.
struct Run {
    int first, tokens, longest;
    const uint16_t** rows;
    float *columns, *scores, *divisors;
    Query* queries;  // (tokens * heads)
};

// A run's queries, 16 in a column. Lanes without a query hold 0.
void fill_columns(const Call& call, const Run& run) {
    const int64_t key_dim = call.layer.key_dim(), count = static_cast<int64_t>(run.tokens) * call.layer.heads;
    const float* queries = call.queries + static_cast<int64_t>(run.first) * call.layer.heads * key_dim;
    for (int64_t query = 0; query < ceil_div(static_cast<int>(count), 16) * 16; ++query) {
        float* column = run.columns + query / 16 * 16 * key_dim + query % 16;
        for (int64_t i = 0; i < key_dim; ++i) column[16 * i] = query < count ? queries[query * key_dim + i] : 0.0f;
    }
}

// (heads, tokens, rank): weighted sums of latents.
float* attend(const Call& call) {
    const Kernels& k = kernels();
    const LatentLayer& layer = call.layer;
    const Places& places = call.places;
    const int heads = layer.heads, rank = layer.rank, key_dim = layer.key_dim(), tokens = places.tokens;
    const int threads = Pool::instance().threads(), most_tokens = std::min(tokens, std::max(1, kLatentQueries / heads));
    const int longest = *std::max_element(places.positions, places.positions + tokens) + 1, most = most_tokens * heads;
    const int64_t stride = static_cast<int64_t>(ceil_div(longest, 16)) * 16;
    const std::vector<int> starts = runs_of(places, most_tokens);
    const int all = static_cast<int>(starts.size()) - 1;
    const int together = static_cast<int>(std::clamp<int64_t>(kScores / (most * stride), 1, std::min(all, 2 * threads)));
    const int pages = ceil_div(longest, call.cache.page_positions), chunks = ceil_div(rank, kDims);
    const bool serial = static_cast<int64_t>(tokens) * heads * key_dim * longest < 40000;  // a fork would cost more than it saves
    auto* attended = scratch().get<float>(static_cast<size_t>(tokens) * heads * rank);
    const size_t widened = static_cast<size_t>(std::max(16 * key_dim, kTilePositions * kDims));
    auto* wide = scratch().get<float>(threads * widened);
    std::vector<Run> runs(together);
    for (Run& run : runs)
        run = {0, 0, 0, scratch().get<const uint16_t*>(pages), scratch().get<float>(static_cast<size_t>(most + 15) * key_dim),
               scratch().get<float>(static_cast<size_t>(most) * stride), scratch().get<float>(most), scratch().get<Query>(most)};
    for (int begin = 0; begin < all; begin += together) {
        const int count = std::min(together, all - begin);
        const int parts = serial ? 1 : std::max(1, std::min(ceil_div(2 * threads, count), ceil_div(longest, kTilePositions)));
        share(serial, count, [&](int task, int) {
            Run& run = runs[task];
            run.first = starts[begin + task], run.tokens = starts[begin + task + 1] - run.first, run.longest = 0;
            for (int64_t q = 0; q < run.tokens * heads; ++q) {
                const int64_t t = run.first + q / heads, h = q % heads;
                run.queries[q] = {nullptr, attended + (h * tokens + t) * rank, places.positions[t] + 1, 0, 0};
                run.longest = std::max(run.longest, run.queries[q].length);
            }
            for (int page = 0; page * call.cache.page_positions < run.longest; ++page)
                run.rows[page] = call.page(places.slots[run.first], page);
            fill_columns(call, run);
        });
        share(serial, count * parts, [&](int task, int thread) {
            const Run& run = runs[task / parts];
            const int64_t blocks = ceil_div(run.longest, 16), part = task % parts;
            const int first = static_cast<int>(blocks * part / parts) * 16, end = static_cast<int>(blocks * (part + 1) / parts) * 16;
            k.latent_scores(run.columns, run.tokens * heads, {run.rows, call.cache.page_positions, key_dim}, first,
                            std::min(end, run.longest), layer.scale, run.scores, stride, wide + thread * widened);
        });
        share(serial, count * most, [&](int task, int) {
            const Run& run = runs[task / most];
            const int64_t q = task % most;
            if (q >= run.tokens * heads) return;
            float* scores = run.scores + q * stride;
            run.divisors[q] = k.softmax_numerators(scores, run.queries[q].length);
            std::fill(scores + run.queries[q].length, scores + run.longest, 0.0f);
        });
        share(serial, count * chunks, [&](int task, int thread) {
            const Run& run = runs[task / chunks];
            const int first = task % chunks * kDims, queries = run.tokens * heads;
            std::vector<Query> part(run.queries, run.queries + queries);
            for (Query& query : part) query.out += first;
            k.latent_values(part.data(), queries, {run.rows, call.cache.page_positions, key_dim}, first, std::min(kDims, rank - first),
                            run.scores, stride, run.divisors, wide + thread * widened);
        });
    }
    return attended;
}

}  // namespace

void latent_block(const LatentLayer& layer, float* x, const Places& places, const Cache& cache, int layer_index) {
    const int tokens = places.tokens, heads = layer.heads, key_dim = layer.key_dim();
    const Stack& in = layer.query_latent;
    const int64_t stride = static_cast<int64_t>(in.blocks()) * kBlockRows;
    if (tokens == 0) return;
    float* projected = normed_projection(in, layer.norm, layer.epsilon, x, in.columns, tokens);
    float* queries = projected;
    int64_t step = stride;
    if (layer.query_norm) {
        queries = normed_projection(Stack({layer.query_up}), layer.query_norm, layer.latent_epsilon, projected, stride, tokens);
        step = static_cast<int64_t>(layer.query_up.blocks()) * kBlockRows;
    }
    const Call call{layer, places, cache, layer_index, scratch().get<float>(static_cast<size_t>(tokens) * heads * layer.plain),
                    scratch().get<float>(static_cast<size_t>(tokens) * heads * key_dim)};
    std::atomic<bool> finite{true};
    share(tokens < 4, tokens, [&](int t, int) {
        if (!prepare_token(call, t, queries + t * step, projected + t * stride + in.rows - key_dim)) finite = false;
    });
    if (!finite)
        throw NumericsFailure("layer " + std::to_string(layer_index) + ": a latent or rotary key is not finite in fp16");
    by_head(layer.key_up, heads, call.plain, tokens, call.queries, key_dim, static_cast<int64_t>(heads) * key_dim);
    const float* attended = attend(call);
    auto* values = scratch().get<float>(static_cast<size_t>(tokens) * heads * layer.value_dim);
    by_head(layer.value_up, heads, attended, tokens, values, layer.value_dim, static_cast<int64_t>(heads) * layer.value_dim);
    add_output(layer.output, nullptr, values, tokens, x);
}

}  // namespace elmoe
