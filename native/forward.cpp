// All layers of a pass in one call: attention, routing, experts, layer after layer, as elmoe.bitslice.forward defines it.
//
// A dense feed-forward layer is one expert of weight 1 at full precision. The experts of a feed are computed in stretches, as
// they become readable; several stretches are chained from zero in ascending id, which is the sum that one call computes.
#include <algorithm>
#include <chrono>

#include "operations.hpp"

namespace elmoe {

namespace {
void note_time(const Company& company, size_t layer, int moment) {
    if (company.times)
        company.times[layer * kTimes + moment] =
            std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void dense_ffn(const Layer& layer, float* x, int tokens, float* hidden) {
    const int size = layer.router.hidden;
    for (int64_t t = 0; t < tokens; ++t)
        kernels().rms_norm(x + t * size, layer.router.norm, hidden + t * size, size, layer.router.epsilon);
    auto* ids = scratch().get<int32_t>(tokens);
    auto* weights = scratch().get<float>(tokens);
    std::fill(ids, ids + tokens, 0);
    std::fill(weights, weights + tokens, 1.0f);
    expert_ffn({layer.expert, layer.addresses, 1, hidden, ids, weights, tokens, 1, false, 0, false}, x);
}

// The shared expert of a layer, on the normed input of its router.
void shared_ffn(const SharedExpert& shared, float* x, int tokens, const float* hidden) {
    const Kernels& k = kernels();
    const int size = shared.expert.hidden;
    auto* ids = scratch().get<int32_t>(tokens);
    auto* weights = scratch().get<float>(tokens);
    std::fill(ids, ids + tokens, 0);
    std::fill(weights, weights + tokens, 1.0f);
    if (shared.gate) {
        for (int64_t t = 0; t < tokens; ++t) {
            k.dots(hidden + t * size, shared.gate, 1, size, weights + t);
            weights[t] = -weights[t];
        }
        k.exp_shifted(weights, 0.0f, weights, tokens);
        for (int t = 0; t < tokens; ++t) weights[t] = 1.0f / (1.0f + weights[t]);
    }
    expert_ffn({shared.expert, shared.addresses, 1, hidden, ids, weights, tokens, 1, false, 0, false}, x);
}

// How many experts a draft finds for each token of a layer.
int draft_size(const uint8_t* allowed, int experts, int wanted) {
    const int usable = static_cast<int>(experts - std::count(allowed, allowed + experts, 0));
    if (usable == 0) throw NumericsFailure("a draft has no expert it may use");
    return std::min(usable, wanted);
}

void fed_experts(const ExpertCall& whole, ExpertFeed& feed, float* x) {
    static std::vector<int32_t> ids;  // these outlive the resets of the scratch memory
    static std::vector<float> total;
    static std::vector<uint8_t> readable;
    const size_t pairs = static_cast<size_t>(whole.tokens) * whole.k;
    const size_t values = static_cast<size_t>(whole.tokens) * whole.shape.hidden;
    bool chained = false;
    for (;;) {
        const std::vector<int>& ready = feed.next();
        if (ready.empty()) break;
        readable.assign(whole.experts, 0);
        for (int expert : ready) readable[expert] = 1;
        ids.assign(whole.ids, whole.ids + pairs);
        bool all = !chained;
        for (int32_t& id : ids)
            if (id >= 0 && !readable[id]) id = -1, all = false;
        if (!all && !chained) total.assign(values, 0.0f);
        chained = !all;
        ExpertCall part = whole;
        part.ids = ids.data();
        part.chain = chained;
        scratch().reset();
        expert_ffn(part, chained ? total.data() : x);
    }
    if (chained)
        for (size_t i = 0; i < values; ++i) x[i] = x[i] + total[i];
}

// A hook is Python's: what it wrote is checked before it is used as an index.
void check_experts(const ExpertCall& call) {
    for (int64_t i = 0; i < static_cast<int64_t>(call.tokens) * call.k; ++i)
        if (call.ids[i] < -1 || call.ids[i] >= call.experts) throw NumericsFailure("a routing names an expert that does not exist");
}
}  // namespace

void forward(const std::vector<Layer>& layers, float* x, const Places& places, const Cache& cache, const DraftChoice& draft,
             const RoutingOut& out, const Company& company) {
    static std::vector<float> hidden;  // outlives the resets of the scratch memory; an operation runs alone
    const int tokens = places.tokens;
    hidden.resize(static_cast<size_t>(tokens) * layers[0].expert.hidden);
    const int64_t rank_step = static_cast<int64_t>(tokens) * out.ranks, step = static_cast<int64_t>(tokens) * out.stride;
    int64_t row = 0;
    for (size_t l = 0; l < layers.size(); ++l) {
        const Layer& layer = layers[l];
        scratch().reset();
        note_time(company, l, 0);
        if (layer.latent)
            latent_block(*layer.latent, x, places, cache, static_cast<int>(l));
        else
            attention_block(layer.attention, x, places, cache, static_cast<int>(l));
        scratch().reset();
        note_time(company, l, 1);
        if (layer.dense) {
            note_time(company, l, 2);
            note_time(company, l, 3);
            dense_ffn(layer, x, tokens, hidden.data());
            note_time(company, l, 4);
            continue;
        }
        const uint8_t* allowed = draft.allowed ? draft.allowed + row * layer.router.experts : nullptr;
        const int size = allowed ? draft_size(allowed, layer.router.experts, out.stride) : out.stride;
        const RoutingOut routing{hidden.data(), out.ranked + row * rank_step, out.scores + row * rank_step, out.ranks,
                                 out.experts + row * step, out.weights + row * step, size, out.stride};
        route(layer.router, x, tokens, allowed, draft.rescale, routing);
        note_time(company, l, 2);
        const ExpertCall call{layer.expert, layer.addresses, layer.router.experts, hidden.data(), routing.experts,
                              routing.weights, tokens, out.stride, draft.coarse, draft.offset, false, layer.terms};
        if (company.routed) {
            company.routed(static_cast<int>(row));
            check_experts(call);
        }
        ++row;
        note_time(company, l, 3);
        scratch().reset();
        if (layer.shared) {
            shared_ffn(*layer.shared, x, tokens, hidden.data());
            scratch().reset();
        }
        if (company.feed)
            fed_experts(call, *company.feed, x);
        else
            expert_ffn(call, x);
        note_time(company, l, 4);
    }
}

}  // namespace elmoe
