// Attention over the paged fp16 cache.
//
// For a token with residual stream x: h = rms_norm(x); (q, k, v) = projection * h + bias, a nested matmul whose integers
// kernels.inl bounds; q and k are normed per head (or over all heads) and rotated; k and v are rounded to fp16, nearest even, and
// written to the cache. Then per query head, over the positions p = 0 (or the first of the window) .. the token's own:
//     s[p] = (sum over i ascending of q[i] * k[p][i]) * scale                  one fp32 chain; 1 / sqrt(head_dim), or the model's
//     e[p] = exp(s[p] - max s),  z = sum of e[p] as 16 lane sums (p mod 16) and the fixed tree
//     o[i] = (sum over p ascending of e[p] * v[p][i]) / z                      one fp32 chain, one division
// where a sink is a further score in max s, and in z after the tree; and x = x + (output * o + bias). No sum depends on what else is in the batch. All but the two projections is fp32.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "attention.hpp"

namespace elmoe {

namespace {

// Half-split rotation of the first 2 * half dimensions; each product is rounded before the sum (no contraction).
void rotate(float* x, int half, const float* cosine, const float* sine) {
    for (int i = 0; i < half; ++i) {
        const float first = x[i], second = x[half + i];
        x[i] = first * cosine[i] - second * sine[i];
        x[half + i] = second * cosine[i] + first * sine[i];
    }
}

// One call: `projected` (tokens, stride) holds the heads of q, then k, then v.
struct Call {
    const AttentionLayer& layer;
    const Places& places;
    const Cache& cache;
    int layer_index;
    float* projected;
    int64_t stride;

    // Of a page's (layer, kv head), in halves.
    int64_t page_at(int slot, int page, int head) const {
        return cache.block(slot, page, layer_index, head) * cache.page_positions * layer.head_dim;
    }
};

// Norms and rotates the heads of a token, writes its keys and values; false if one is not finite in fp16.
bool prepare_token(const Call& call, int t) {
    const Kernels& k = kernels();
    const AttentionLayer& layer = call.layer;
    const Cache& cache = call.cache;
    const int heads = layer.heads, kv_heads = layer.kv_heads, head_dim = layer.head_dim;
    const int slot = call.places.slots[t], position = call.places.positions[t];
    float* row = call.projected + t * call.stride;
    const int64_t table = static_cast<int64_t>(position) * call.places.pairs;
    if (layer.projection_bias) k.add(row, layer.projection_bias, (heads + 2 * kv_heads) * head_dim);
    if (layer.full_norms) {
        k.rms_norm(row, layer.query_norm, row, heads * head_dim, layer.epsilon);
        k.rms_norm(row + heads * head_dim, layer.key_norm, row + heads * head_dim, kv_heads * head_dim, layer.epsilon);
    }
    for (int h = 0; h < heads + kv_heads; ++h) {
        float* head = row + h * head_dim;
        const float* norm = h < heads ? layer.query_norm : layer.key_norm;
        if (norm && !layer.full_norms) k.rms_norm(head, norm, head, head_dim, layer.epsilon);
        rotate(head, call.places.pairs, call.places.cosine + table, call.places.sine + table);
    }
    uint16_t key[1024], value[1024];
    const int page = position / cache.page_positions, within = position % cache.page_positions;
    bool finite = true;
    for (int h = 0; h < kv_heads; ++h) {
        finite &= k.to_half(row + (heads + h) * head_dim, key, head_dim);
        finite &= k.to_half(row + (heads + kv_heads + h) * head_dim, value, head_dim);
        const int64_t at = call.page_at(slot, page, h);
        uint16_t* keys = cache.keys + at + static_cast<int64_t>(within / 16) * 16 * head_dim + within % 16;
        for (int i = 0; i < head_dim; ++i) keys[16 * i] = key[i];
        std::memcpy(cache.values + at + static_cast<int64_t>(within) * head_dim, value, 2 * head_dim);
    }
    return finite;
}

void prepare(const Call& call) {
    const int tokens = call.places.tokens;
    std::atomic<bool> finite{true};
    auto one = [&](int t, int) {
        if (!prepare_token(call, t)) finite = false;
    };
    if (tokens < 4)
        for (int t = 0; t < tokens; ++t) one(t, 0);
    else
        Pool::instance().run(tokens, one);
    if (!finite) throw NumericsFailure("layer " + std::to_string(call.layer_index) + ": a key or value is not finite in fp16");
}

// (tokens, heads * head_dim) outputs of all heads. The queries of a run's tokens to one kv head read the same pages. They are one
// task, or several if there are more threads than such tasks.
float* attend(const Call& call) {
    const Kernels& k = kernels();
    Pool& pool = Pool::instance();
    const Places& places = call.places;
    const Cache& cache = call.cache;
    const AttentionShape shape = call.layer.shape();
    const int heads = call.layer.heads, kv_heads = call.layer.kv_heads, head_dim = call.layer.head_dim;
    const int repeat = heads / kv_heads, tokens = places.tokens;
    const int64_t inner = static_cast<int64_t>(heads) * head_dim;
    int longest = 0;
    for (int t = 0; t < tokens; ++t) longest = std::max(longest, places.positions[t] + 1);
    const size_t padded = static_cast<size_t>(ceil_div(longest, 16)) * 16, pages = ceil_div(longest, cache.page_positions);
    const size_t per_thread = kQueries * padded + static_cast<size_t>(kTilePositions) * head_dim;
    auto* scores = scratch().get<float>(pool.threads() * per_thread);
    auto* pointers = scratch().get<const uint16_t*>(pool.threads() * 2 * pages);
    const int run_tokens = std::max(1, kQueries / repeat), run_queries = run_tokens * repeat;
    auto* all_queries = scratch().get<Query>(static_cast<size_t>(pool.threads()) * run_queries);
    auto* attended = scratch().get<float>(static_cast<size_t>(tokens) * inner);
    const std::vector<int> runs = runs_of(places, run_tokens);
    const int whole = (static_cast<int>(runs.size()) - 1) * kv_heads;
    const bool serial = tokens * inner * longest < 40000;  // below some 10 us a fork costs more than it saves
    const int parts = serial ? 1 : std::min(ceil_div(pool.threads(), whole), run_queries), tasks = whole * parts;
    auto one = [&](int task, int thread) {
        const int part = task % parts, run = task / parts / kv_heads, kv = task / parts % kv_heads;
        Query* queries = all_queries + static_cast<size_t>(thread) * run_queries;
        int length = 0, earliest = places.positions[runs[run]], many = 0;
        for (int t = runs[run]; t < runs[run + 1]; ++t) {
            const int position = places.positions[t], first_seen = shape.first_seen(position);
            length = std::max(length, position + 1);
            earliest = std::min(earliest, first_seen);
            for (int h = kv * repeat; h < (kv + 1) * repeat; ++h)
                queries[many++] = {call.projected + t * call.stride + h * head_dim, attended + t * inner + h * head_dim,
                                   position + 1, first_seen, call.layer.sinks ? call.layer.sinks[h] : -HUGE_VALF};
        }
        const uint16_t** keys = pointers + thread * 2 * pages;
        const uint16_t** values = keys + pages;
        for (int page = earliest / cache.page_positions; page * cache.page_positions < length; ++page) {
            const int64_t at = call.page_at(places.slots[runs[run]], page, kv);
            keys[page] = cache.keys + at;
            values[page] = cache.values + at;
        }
        const int first = many * part / parts, end = many * (part + 1) / parts;
        k.attend(queries + first, end - first, {keys, values, cache.page_positions}, head_dim, call.layer.scale,
                 scores + thread * per_thread, static_cast<int64_t>(padded));
    };
    if (serial)
        for (int task = 0; task < tasks; ++task) one(task, 0);
    else
        pool.run(tasks, one);
    return attended;
}

}  // namespace

float* normed_projection(const Stack& matrix, const float* norm, float epsilon, const float* x, int64_t step, int tokens) {
    const int64_t columns = matrix.columns, stride = static_cast<int64_t>(matrix.blocks()) * kBlockRows;
    auto* normed = scratch().get<float>(static_cast<size_t>(tokens) * columns);
    for (int64_t t = 0; t < tokens; ++t)
        kernels().rms_norm(x + t * step, norm, normed + t * columns, static_cast<int>(columns), epsilon);
    auto* projected = scratch().get<float>(tokens * stride);
    matmul_all(matrix, quantize_rows(normed, tokens, static_cast<int>(columns), kFull, matrix.packed()), projected, stride);
    return projected;
}

std::vector<int> runs_of(const Places& places, int most) {
    std::vector<int> runs{0};
    for (int t = 1; t < places.tokens; ++t)
        if (places.slots[t] != places.slots[t - 1] || t - runs.back() == most) runs.push_back(t);
    runs.push_back(places.tokens);
    return runs;
}

void add_output(const Matrix& output, const float* bias, const float* attended, int tokens, float* x) {
    const int64_t stride = static_cast<int64_t>(output.blocks()) * kBlockRows, hidden = output.rows;
    auto* out = scratch().get<float>(tokens * stride);
    matmul_all(output, false, quantize_rows(attended, tokens, output.columns, kFull, output.packed()), out, stride);
    for (int64_t t = 0; t < tokens; ++t) {
        if (bias) kernels().add(out + t * stride, bias, static_cast<int>(hidden));
        for (int64_t i = 0; i < hidden; ++i) x[t * hidden + i] += out[t * stride + i];
    }
}

void attention_block(const AttentionLayer& layer, float* x, const Places& places, const Cache& cache, int layer_index) {
    const Stack& in = layer.query_key_value;
    float* projected = normed_projection(in, layer.norm, layer.epsilon, x, in.columns, places.tokens);
    const Call call{layer, places, cache, layer_index, projected, static_cast<int64_t>(in.blocks()) * kBlockRows};
    prepare(call);
    add_output(layer.output, layer.output_bias, attend(call), places.tokens, x);
}

}  // namespace elmoe
