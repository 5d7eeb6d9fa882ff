// Router and experts. The experts' weights are read once per call, whatever the number of tokens (expert-major).
#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>

#include "operations.hpp"

namespace elmoe {

namespace {
float ascending_sum(const float* values, const int32_t* ids, int count) {
    float sum = 0;
    for (int i = 0; i < count; ++i) sum = sum + values[ids[i]];
    return sum;
}
}  // namespace

void route(const RouterLayer& layer, const float* x, int tokens, const uint8_t* allowed, bool rescale, const RoutingOut& out) {
    const Kernels& k = kernels();
    const int experts = layer.experts, hidden = layer.hidden, top_k = layer.top_k;
    std::atomic<bool> finite{true};
    // A single token's logits are shared out: a router is half a megabyte of floats.
    const bool large = static_cast<int64_t>(tokens) * experts * hidden >= 100000, split = large && tokens < Pool::instance().threads();
    auto dots = [&](const float* row, float* p) {
        if (!split) return k.dots(row, layer.router, experts, hidden, p);
        const int each = ceil_div(experts, 4 * Pool::instance().threads());
        Pool::instance().run(ceil_div(experts, each), [&](int piece, int) {
            const int first = piece * each;
            k.dots(row, layer.router + static_cast<int64_t>(first) * hidden, std::min(each, experts - first), hidden, p + first);
        });
    };
    auto* all_logits = scratch().get<float>(static_cast<size_t>(Pool::instance().threads()) * experts);
    auto* all_orders = scratch().get<int32_t>(static_cast<size_t>(Pool::instance().threads()) * (experts + 2 * top_k));
    auto one = [&](int t, int thread) {
        float* p = all_logits + static_cast<size_t>(thread) * experts;
        int32_t* order = all_orders + static_cast<size_t>(thread) * (experts + 2 * top_k);
        int32_t *natural = order + experts, *chosen = natural + top_k;
        float* row = out.hidden + static_cast<int64_t>(t) * hidden;
        k.rms_norm(x + static_cast<int64_t>(t) * hidden, layer.norm, row, hidden, layer.epsilon);
        dots(row, p);
        for (int e = 0; e < experts; ++e)
            if (!std::isfinite(p[e])) finite = false;
        if (!finite) return;
        const float sum = k.softmax_numerators(p, experts);
        for (int e = 0; e < experts; ++e) p[e] = p[e] / sum;
        auto better = [p](int32_t a, int32_t b) { return p[a] != p[b] ? p[a] > p[b] : a < b; };
        std::iota(order, order + experts, 0);
        std::partial_sort(order, order + std::max(out.ranks, top_k), order + experts, better);
        for (int i = 0; i < out.ranks; ++i) {
            out.ranked[static_cast<int64_t>(t) * out.ranks + i] = order[i];
            out.scores[static_cast<int64_t>(t) * out.ranks + i] = p[order[i]];
        }
        std::copy(order, order + top_k, natural);
        std::sort(natural, natural + top_k);
        const float natural_sum = ascending_sum(p, natural, top_k);
        if (allowed) {
            auto* end = std::remove_if(order, order + experts, [&](int32_t e) { return allowed[e] == 0; });
            std::partial_sort(order, order + out.size, end, better);
            std::copy(order, order + out.size, chosen);
            std::sort(chosen, chosen + out.size);
        } else {
            std::copy(natural, natural + top_k, chosen);
        }
        int32_t* ids = out.experts + static_cast<int64_t>(t) * out.size;
        float* weights = out.weights + static_cast<int64_t>(t) * out.size;
        std::copy(chosen, chosen + out.size, ids);
        for (int i = 0; i < out.size; ++i) weights[i] = p[ids[i]];
        if (allowed && rescale) {
            const float target = layer.normalize ? 1.0f : natural_sum, chosen_sum = ascending_sum(p, ids, out.size);
            const float even = target / static_cast<float>(out.size), factor = chosen_sum == 0 ? 0 : target / chosen_sum;
            for (int i = 0; i < out.size; ++i) weights[i] = chosen_sum == 0 ? even : weights[i] * factor;
        } else if (layer.normalize) {
            for (int i = 0; i < out.size; ++i) weights[i] = weights[i] / natural_sum;
        }
    };
    if (!large || split)
        for (int t = 0; t < tokens; ++t) one(t, 0);
    else
        Pool::instance().run(tokens, one);
    if (!finite) throw NumericsFailure("a router logit is NaN or infinite");
}

void expert_ffn(const ExpertShape& shape, const int64_t* addresses, int experts, const float* hidden, const int32_t* ids,
                const float* weights, int tokens, int k_ids, float* x, bool draft, int offset, bool chain) {
    struct Pair {
        int token;
        float weight;
    };
    struct Active {
        Matrix gate, up, down;
        int first, count;  // its pairs
        std::vector<Tile> inputs, inner;
    };
    const Kernels& k = kernels();
    Pool& pool = Pool::instance();
    const int factor = correction_factor(draft, offset);
    const int hidden_groups = ceil_div(shape.hidden, kGroup), inner_groups = ceil_div(shape.width, kGroup);

    // Pairs by ascending expert, then by token.
    std::vector<int> start(experts + 1, 0);
    for (int i = 0; i < tokens * k_ids; ++i)
        if (ids[i] >= 0) ++start[ids[i] + 1];
    for (int e = 0; e < experts; ++e) start[e + 1] += start[e];
    std::vector<Pair> pairs(start[experts]);
    if (pairs.empty()) return;
    {
        std::vector<int> next(start.begin(), start.end() - 1);
        for (int t = 0; t < tokens; ++t)
            for (int i = 0; i < k_ids; ++i) {
                const int64_t at = static_cast<int64_t>(t) * k_ids + i;
                if (ids[at] >= 0) pairs[next[ids[at]]++] = {t, weights[at]};
            }
    }
    std::vector<Active> active;
    for (int e = 0; e < experts; ++e) {
        const int count = start[e + 1] - start[e];
        if (!count) continue;
        const auto* msb = reinterpret_cast<const uint8_t*>(addresses[2 * e]);
        const auto* lsb = reinterpret_cast<const uint8_t*>(addresses[2 * e + 1]);
        if (!msb || (!draft && !lsb))
            throw NumericsFailure("expert " + std::to_string(e) + ": the " + (msb ? "LSB" : "MSB") + " slice is not resident");
        auto matrix = [&](int rows, int columns, int64_t hi, int64_t scales, int64_t lo) {
            return Matrix{rows, columns, msb + hi, draft ? nullptr : lsb + lo, reinterpret_cast<const uint16_t*>(msb + scales)};
        };
        active.push_back({matrix(shape.width, shape.hidden, shape.gate_hi, shape.gate_scales, shape.gate_lo),
                          matrix(shape.width, shape.hidden, shape.up_hi, shape.up_scales, shape.up_lo),
                          matrix(shape.hidden, shape.width, shape.down_hi, shape.down_scales, shape.down_lo), start[e], count,
                          {}, allocate_tiles(count, inner_groups)});
    }
    // Every token is quantised once, then copied into the tiles of its experts.
    const std::vector<Tile> rows = quantize_rows(hidden, tokens, shape.hidden, factor, 1);
    for (Active& expert : active) {
        if (expert.count == 1) {
            expert.inputs = {rows[pairs[expert.first].token]};
            continue;
        }
        expert.inputs = allocate_tiles(expert.count, hidden_groups);
        const Pair* pair = &pairs[expert.first];
        for (const Tile& tile : expert.inputs)
            for (int t = 0; t < tile.tokens; ++t, ++pair) {
                const Tile& row = rows[pair->token];
                for (int g = 0; g < hidden_groups; ++g) {
                    const int at = g * tile.tokens + t;
                    std::memcpy(tile.codes + at * kGroup, row.codes + g * kGroup, kGroup);
                    tile.scales[at] = row.scales[g];
                    tile.correction[at] = row.correction[g];
                }
            }
    }

    // Phase A: gate and up of a stretch of inner units; whoever finishes an expert quantises its inner activations.
    const int width_blocks = ceil_div(shape.width, kBlockRows);
    const int64_t inner_stride = static_cast<int64_t>(width_blocks) * kBlockRows;
    const size_t count = pairs.size();
    auto* gate = scratch().get<float>(count * inner_stride);
    auto* up = scratch().get<float>(count * inner_stride);
    const int pieces = 4 * pool.threads(), wanted = ceil_div(pieces, static_cast<int>(active.size()));
    const int64_t block_bytes = static_cast<int64_t>(hidden_groups) * 2 * (2 * kGroupBytes + 2 * kBlockRows);
    const int per_task =
        std::min(width_blocks, static_cast<int>(std::max<int64_t>(ceil_div(width_blocks, wanted), (32 << 10) / block_bytes + 1)));
    const int per_expert = ceil_div(width_blocks, per_task);
    std::vector<std::atomic<int>> left(active.size());
    for (auto& one : left) one = per_expert;
    std::atomic<bool> finite{true};
    pool.run(per_expert * static_cast<int>(active.size()), [&](int task, int) {
        const Active& expert = active[task / per_expert];
        const int first = task % per_expert * per_task, last = std::min(width_blocks, first + per_task);
        const int64_t at = expert.first * inner_stride;
        const int tiles = static_cast<int>(expert.inputs.size());
        k.matmul(expert.gate, draft, first, last, expert.inputs.data(), tiles, gate + at, inner_stride);
        k.matmul(expert.up, draft, first, last, expert.inputs.data(), tiles, up + at, inner_stride);
        for (int i = 0; i < expert.count; ++i) {
            const int64_t row = at + i * inner_stride + first * kBlockRows;
            k.swiglu(gate + row, up + row, gate + row, (last - first) * kBlockRows);
        }
        if (left[task / per_expert].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
        const float* row = gate + at;
        for (const Tile& tile : expert.inner)
            for (int t = 0; t < tile.tokens; ++t, row += inner_stride)
                if (!k.quantize(row, shape.width, tile, t, factor)) finite = false;
    });
    if (!finite) throw NumericsFailure("activations hold NaN or infinite values");

    // Phase B: a stretch of outputs over all experts in ascending order, so the combination needs no further pass.
    const int out_blocks = ceil_div(shape.hidden, kBlockRows);
    const int64_t strip = static_cast<int64_t>(inner_groups) * (2 * kGroupBytes + 2 * kBlockRows) * active.size();
    const int out_task =
        std::min(out_blocks, static_cast<int>(std::max<int64_t>(ceil_div(out_blocks, pieces), (16 << 10) / strip + 1)));
    const size_t out_width = static_cast<size_t>(out_task) * kBlockRows;
    int most = 0;
    for (const Active& expert : active) most = std::max(most, expert.count);
    auto* totals = scratch().get<float>(pool.threads() * tokens * out_width);
    auto* downs = scratch().get<float>(pool.threads() * most * out_width);
    pool.run(ceil_div(out_blocks, out_task), [&](int task, int thread) {
        const int first = task * out_task, last = std::min(out_blocks, first + out_task);
        const int size = std::min(shape.hidden, last * kBlockRows) - first * kBlockRows;
        float* total = totals + thread * tokens * out_width;
        float* down = downs + thread * most * out_width;
        for (int t = 0; t < tokens; ++t) {
            const float* row = x + static_cast<int64_t>(t) * shape.hidden + first * kBlockRows;
            if (chain)
                std::copy(row, row + size, total + t * out_width);
            else
                std::fill(total + t * out_width, total + t * out_width + size, 0.0f);
        }
        for (const Active& expert : active) {
            k.matmul(expert.down, draft, first, last, expert.inner.data(), static_cast<int>(expert.inner.size()),
                     down - first * kBlockRows, static_cast<int64_t>(out_width));
            for (int i = 0; i < expert.count; ++i) {
                const Pair& pair = pairs[expert.first + i];
                k.multiply_add(total + pair.token * out_width, pair.weight, down + i * out_width, size);
            }
        }
        for (int t = 0; t < tokens; ++t) {
            float* row = x + static_cast<int64_t>(t) * shape.hidden + first * kBlockRows;
            const float* sum = total + t * out_width;
            if (chain)
                std::copy(sum, sum + size, row);
            else
                for (int i = 0; i < size; ++i) row[i] = row[i] + sum[i];
        }
    });
}

namespace {
// The experts of a layer in stretches as they become readable; several are chained from zero in ascending order, as one call
// does.
void fed_experts(const Layer& layer, ExpertFeed& feed, const RoutingOut& routing, int tokens, float* x, bool draft, int offset) {
    static std::vector<int32_t> ids;  // these outlive the resets of the scratch memory
    static std::vector<float> total;
    static std::vector<uint8_t> readable;
    const size_t pairs = static_cast<size_t>(tokens) * routing.size, values = static_cast<size_t>(tokens) * layer.router.hidden;
    bool chained = false;
    for (;;) {
        const std::vector<int>& ready = feed.next();
        if (ready.empty()) break;
        readable.assign(layer.router.experts, 0);
        for (int expert : ready) readable[expert] = 1;
        ids.assign(routing.experts, routing.experts + pairs);
        bool whole = !chained;
        for (int32_t& id : ids)
            if (!readable[id]) id = -1, whole = false;
        if (!whole && !chained) total.assign(values, 0.0f);
        chained = !whole;
        scratch().reset();
        expert_ffn(layer.expert, layer.addresses, layer.router.experts, routing.hidden, ids.data(), routing.weights, tokens,
                   routing.size, chained ? total.data() : x, draft, offset, chained);
    }
    if (chained)
        for (size_t i = 0; i < values; ++i) x[i] = x[i] + total[i];
}
}  // namespace

void forward(const std::vector<Layer>& layers, float* x, int tokens, const Cache& cache, int first_layer, const int32_t* slots,
             const int32_t* positions, const float* cosine, const float* sine, const uint8_t* allowed, bool rescale, bool draft,
             int offset, const RoutingOut& out, ExpertFeed* feed) {
    static std::vector<float> hidden;  // outlives the resets of the scratch memory; an operation runs alone
    hidden.resize(static_cast<size_t>(tokens) * layers[0].router.hidden);
    const int64_t rank_step = static_cast<int64_t>(tokens) * out.ranks, step = static_cast<int64_t>(tokens) * out.size;
    for (size_t l = 0; l < layers.size(); ++l) {
        const Layer& layer = layers[l];
        const int64_t at = static_cast<int64_t>(l);
        scratch().reset();
        attention_block(layer.attention, x, tokens, cache, first_layer + static_cast<int>(l), slots, positions, cosine, sine);
        scratch().reset();
        const RoutingOut routing{hidden.data(), out.ranked + at * rank_step, out.scores + at * rank_step, out.ranks,
                                 out.experts + at * step, out.weights + at * step, out.size};
        route(layer.router, x, tokens, allowed ? allowed + at * layer.router.experts : nullptr, rescale, routing);
        if (feed) {
            feed->routed(static_cast<int>(l));
            fed_experts(layer, *feed, routing, tokens, x, draft, offset);
            continue;
        }
        scratch().reset();
        expert_ffn(layer.expert, layer.addresses, layer.router.experts, hidden.data(), routing.experts, routing.weights, tokens,
                   out.size, x, draft, offset, false);
    }
}

}  // namespace elmoe
