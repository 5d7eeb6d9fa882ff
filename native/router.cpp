// The router of a layer: which experts a token runs, and their weights.
//
// h = rms_norm(x); l[e] = sum over i of h[i] * router[e][i] as 16 lane sums (i mod 16) and the fixed tree, and perhaps a bias;
// p = 1 / (1 + exp(-l)), or p = softmax(l), the exact maximum first, then 16 lane sums. Ranking: by p (plus a bias of the
// selection) descending, ties to the lower id; where there are groups, experts of the kept groups before all others. A group is
// worth its best choice, or the sum of its best two, ties to the lower group. Sums of chosen probabilities are one
// fp32 chain in ascending id. All sums are fp32: there is no integer accumulator.
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

// preferred[e] = 1 for the experts of the kept groups, else 0; `order` has room for the groups.
void rank_groups(const RouterLayer& layer, const float* choice, int32_t* preferred, int32_t* order) {
    const int size = layer.experts / layer.groups;
    auto worth = [&](int32_t group) {
        const float* first = choice + static_cast<int64_t>(group) * size;
        float best = first[0], second = -HUGE_VALF;
        for (int i = 1; i < size; ++i) {
            second = std::max(second, std::min(best, first[i]));
            best = std::max(best, first[i]);
        }
        return layer.best_two ? best + second : best;
    };
    std::iota(order, order + layer.groups, 0);
    std::sort(order, order + layer.groups, [&](int32_t a, int32_t b) {
        const float one = worth(a), other = worth(b);
        return one != other ? one > other : a < b;
    });
    std::fill(preferred, preferred + layer.experts, 0);
    for (int i = 0; i < layer.kept_groups; ++i) std::fill(preferred + order[i] * size, preferred + (order[i] + 1) * size, 1);
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
    auto* all_logits = scratch().get<float>(static_cast<size_t>(Pool::instance().threads()) * 2 * experts);
    const size_t order_size = 2 * static_cast<size_t>(experts) + 2 * top_k + layer.groups;
    auto* all_orders = scratch().get<int32_t>(static_cast<size_t>(Pool::instance().threads()) * order_size);
    auto one = [&](int t, int thread) {
        float *p = all_logits + static_cast<size_t>(thread) * 2 * experts, *choice = layer.selection_bias ? p + experts : p;
        int32_t* order = all_orders + static_cast<size_t>(thread) * order_size;
        int32_t *natural = order + experts, *chosen = natural + top_k, *preferred = chosen + top_k, *group_order = preferred + experts;
        float* row = out.hidden + static_cast<int64_t>(t) * hidden;
        k.rms_norm(x + static_cast<int64_t>(t) * hidden, layer.norm, row, hidden, layer.epsilon);
        dots(row, p);
        if (layer.bias) k.add(p, layer.bias, experts);
        for (int e = 0; e < experts; ++e)
            if (!std::isfinite(p[e])) finite = false;
        if (!finite) return;
        if (layer.sigmoid) {
            for (int e = 0; e < experts; ++e) p[e] = -p[e];
            k.exp_shifted(p, 0.0f, p, experts);
            for (int e = 0; e < experts; ++e) p[e] = 1.0f / (1.0f + p[e]);
        } else {
            const float sum = k.softmax_numerators(p, experts);
            for (int e = 0; e < experts; ++e) p[e] = p[e] / sum;
        }
        if (layer.selection_bias)
            for (int e = 0; e < experts; ++e) choice[e] = p[e] + layer.selection_bias[e];
        if (layer.groups > 1) rank_groups(layer, choice, preferred, group_order);
        auto better = [choice, preferred, grouped = layer.groups > 1](int32_t a, int32_t b) {
            if (grouped && preferred[a] != preferred[b]) return preferred[a] > preferred[b];
            return choice[a] != choice[b] ? choice[a] > choice[b] : a < b;
        };
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
        int32_t* ids = out.experts + static_cast<int64_t>(t) * out.stride;
        float* weights = out.weights + static_cast<int64_t>(t) * out.stride;
        std::copy(chosen, chosen + out.size, ids);
        std::fill(ids + out.size, ids + out.stride, -1);
        std::fill(weights + out.size, weights + out.stride, 0.0f);
        for (int i = 0; i < out.size; ++i) weights[i] = p[ids[i]];
        if (allowed && rescale) {
            const float target = layer.normalize ? 1.0f : natural_sum, chosen_sum = ascending_sum(p, ids, out.size);
            const float even = target / static_cast<float>(out.size), factor = chosen_sum == 0 ? 0 : target / chosen_sum;
            for (int i = 0; i < out.size; ++i) weights[i] = chosen_sum == 0 ? even : weights[i] * factor;
        } else if (layer.normalize) {
            for (int i = 0; i < out.size; ++i) weights[i] = weights[i] / natural_sum;
        }
        if (layer.scaling != 1)
            for (int i = 0; i < out.size; ++i) weights[i] = weights[i] * layer.scaling;
    };
    if (!large || split)
        for (int t = 0; t < tokens; ++t) one(t, 0);
    else
        Pool::instance().run(tokens, one);
    if (!finite) throw NumericsFailure("a router logit is NaN or infinite");
}

}  // namespace elmoe
