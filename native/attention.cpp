// Attention over the paged fp16 cache: norm, projections, q and k norms, rotary embedding, cache write, softmax, output.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "operations.hpp"

namespace elmoe {

namespace {

// Half-split rotation; each product is rounded before the sum (no contraction).
void rotate(float* x, int head_dim, const float* cosine, const float* sine) {
    const int half = head_dim / 2;
    for (int i = 0; i < half; ++i) {
        const float first = x[i], second = x[half + i];
        x[i] = first * cosine[i] - second * sine[i];
        x[half + i] = second * cosine[i] + first * sine[i];
    }
}

}  // namespace

void attention_block(const AttentionLayer& layer, float* x, int tokens, const Cache& cache, int layer_index,
                     const int32_t* slots, const int32_t* positions, const float* cosine, const float* sine) {
    const Kernels& k = kernels();
    Pool& pool = Pool::instance();
    const int hidden = layer.query_key_value.columns, head_dim = layer.head_dim, heads = layer.heads;
    const int kv_heads = layer.kv_heads, repeat = heads / kv_heads, inner = heads * head_dim;
    const int64_t stride = static_cast<int64_t>(layer.query_key_value.blocks()) * kBlockRows;
    const int64_t per_head = static_cast<int64_t>(cache.page_positions) * head_dim;
    auto* normed = scratch().get<float>(static_cast<size_t>(tokens) * hidden);
    for (int t = 0; t < tokens; ++t)
        k.rms_norm(x + static_cast<int64_t>(t) * hidden, layer.norm, normed + static_cast<int64_t>(t) * hidden, hidden,
                   layer.epsilon);
    auto* projected = scratch().get<float>(tokens * stride);
    matmul_all(layer.query_key_value, false, quantize_rows(normed, tokens, hidden, -128), projected, stride);

    // Element (layer, kv head) of a page, in halves.
    auto page_at = [&](int slot, int page, int head) {
        const int64_t index = cache.table[static_cast<int64_t>(slot) * cache.slot_pages + page];
        return ((index * cache.layers + layer_index) * cache.kv_heads + head) * per_head;
    };
    std::atomic<bool> finite{true};
    auto prepare = [&](int t, int) {
        float* row = projected + t * stride;
        const int64_t table = static_cast<int64_t>(positions[t]) * (head_dim / 2);
        for (int h = 0; h < heads + kv_heads; ++h) {
            float* head = row + h * head_dim;
            const float* norm = h < heads ? layer.query_norm : layer.key_norm;
            if (norm) k.rms_norm(head, norm, head, head_dim, layer.epsilon);
            rotate(head, head_dim, cosine + table, sine + table);
        }
        uint16_t key[1024], value[1024];
        const int page = positions[t] / cache.page_positions, within = positions[t] % cache.page_positions;
        for (int h = 0; h < kv_heads; ++h) {
            bool good = k.to_half(row + (heads + h) * head_dim, key, head_dim);
            good &= k.to_half(row + (heads + kv_heads + h) * head_dim, value, head_dim);
            if (!good) finite = false;
            const int64_t at = page_at(slots[t], page, h);
            uint16_t* keys = cache.keys + at + static_cast<int64_t>(within / 16) * 16 * head_dim + within % 16;
            for (int i = 0; i < head_dim; ++i) keys[16 * i] = key[i];
            std::memcpy(cache.values + at + static_cast<int64_t>(within) * head_dim, value, 2 * head_dim);
        }
    };
    if (tokens < 4)
        for (int t = 0; t < tokens; ++t) prepare(t, 0);
    else
        pool.run(tokens, prepare);
    if (!finite) throw NumericsFailure("layer " + std::to_string(layer_index) + ": a key or value is not finite in fp16");

    int longest = 0;
    for (int t = 0; t < tokens; ++t) longest = std::max(longest, positions[t] + 1);
    const size_t padded = static_cast<size_t>(ceil_div(longest, 16)) * 16, pages = ceil_div(longest, cache.page_positions);
    auto* scores = scratch().get<float>(pool.threads() * kQueries * padded);
    auto* pointers = scratch().get<const uint16_t*>(pool.threads() * 2 * pages);
    auto* all_queries = scratch().get<Query>(static_cast<size_t>(pool.threads()) * kQueries * repeat);
    auto* attended = scratch().get<float>(static_cast<size_t>(tokens) * inner);
    const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    // Neighbours of one sequence and the query heads of one key head read the same pages.
    std::vector<int> runs{0};
    for (int t = 1; t < tokens; ++t)
        if (slots[t] != slots[t - 1] || t - runs.back() == kQueries) runs.push_back(t);
    const int count = static_cast<int>(runs.size());
    runs.push_back(tokens);
    auto attend = [&](int task, int thread) {
        const int run = task / kv_heads, kv = task % kv_heads;
        Query* queries = all_queries + static_cast<size_t>(thread) * kQueries * repeat;
        int length = 0, many = 0;
        for (int t = runs[run]; t < runs[run + 1]; ++t) {
            length = std::max(length, positions[t] + 1);
            for (int h = kv * repeat; h < (kv + 1) * repeat; ++h)
                queries[many++] = {projected + t * stride + h * head_dim,
                                   attended + static_cast<int64_t>(t) * inner + h * head_dim, positions[t] + 1};
        }
        const uint16_t** keys = pointers + thread * 2 * pages;
        const uint16_t** values = keys + pages;
        for (int page = 0; page * cache.page_positions < length; ++page) {
            const int64_t at = page_at(slots[runs[run]], page, kv);
            keys[page] = cache.keys + at;
            values[page] = cache.values + at;
        }
        k.attend(queries, many, {keys, values, cache.page_positions}, head_dim, scale, scores + thread * kQueries * padded,
                 static_cast<int64_t>(padded));
    };
    const int64_t work = static_cast<int64_t>(tokens) * heads * head_dim * longest;
    if (work < 40000)  // below some 10 us a fork costs more than it saves
        for (int task = 0; task < count * kv_heads; ++task) attend(task, 0);
    else
        pool.run(count * kv_heads, attend);

    const int64_t out_stride = static_cast<int64_t>(layer.output.blocks()) * kBlockRows;
    auto* out = scratch().get<float>(tokens * out_stride);
    matmul_all(layer.output, false, quantize_rows(attended, tokens, inner, -128), out, out_stride);
    for (int t = 0; t < tokens; ++t)
        for (int i = 0; i < hidden; ++i) x[static_cast<int64_t>(t) * hidden + i] += out[t * out_stride + i];
}

}  // namespace elmoe
