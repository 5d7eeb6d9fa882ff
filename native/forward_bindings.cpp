// Binding of the pass over all layers. Who takes part from Python: a hook and a feed that begin a row, or nobody.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include "holders.hpp"
#include "slices_holder.hpp"

using namespace elmoe;

namespace {

// See SharedExpert.
struct SharedHolder {
    SharedExpert shared;
    nb::object expert;
    Input<int64_t, 2> addresses;
    std::optional<Input<float, 1>> gate;

    SharedHolder(nb::object expert_, Input<int64_t, 2> addresses_, std::optional<Input<float, 1>> gate_)
        : expert(expert_), addresses(addresses_), gate(gate_) {
        shared = {nb::cast<ExpertHolder&>(expert).shape, addresses.data(), gate ? gate->data() : nullptr};
        require(addresses.shape(0) == 1 && addresses.shape(1) == 2 && (!gate || side(*gate, 0) == shared.expert.hidden),
                "the shared expert does not fit");
    }
};

struct LayerHolder {
    Layer layer;
    Input<int64_t, 2> addresses;
    std::vector<nb::object> keep;

    // `router` or `norm` is given; `terms` and `shared` may be none.
    LayerHolder(nb::object attention, nb::object router, nb::object norm, nb::object expert, Input<int64_t, 2> addresses_,
                nb::object terms, nb::object shared)
        : addresses(addresses_), keep{attention, router, norm, expert, terms, shared} {
        const bool latent = nb::isinstance<LatentHolder>(attention);
        const LatentLayer* absorbed = latent ? &nb::cast<LatentHolder&>(attention).layer : nullptr;
        const AttentionLayer block = latent ? AttentionLayer{} : nb::cast<AttentionHolder&>(attention).layer;
        const AttentionShape attended = latent ? absorbed->shape() : block.shape();
        const ExpertShape& shape = nb::cast<ExpertHolder&>(expert).shape;
        const bool dense = router.is_none();
        RouterLayer input{};
        if (dense) {
            const NormHolder& only = nb::cast<NormHolder&>(norm);
            require(side(only.norm, 0) == shape.hidden, "the norm does not fit the feed-forward");
            input.norm = only.norm.data(), input.hidden = shape.hidden, input.epsilon = only.epsilon;
        } else {
            input = nb::cast<RouterHolder&>(router).layer;
        }
        layer = {block, absorbed, attended, input, dense, shape, addresses.data(), nullptr, nullptr};
        if (!terms.is_none()) {
            const TermsHolder& found = nb::cast<TermsHolder&>(terms);
            require(!dense && found.fit(shape, layer.experts()), "biases do not fit the experts");
            layer.terms = &found.terms;
        }
        if (!shared.is_none()) {
            layer.shared = &nb::cast<SharedHolder&>(shared).shared;
            require(!dense && layer.shared->expert.hidden == shape.hidden, "the shared expert does not fit");
        }
        require(input.hidden == shape.hidden && attended.hidden == shape.hidden, "attention, router and experts do not fit");
        require(side(addresses, 0) == layer.experts() && side(addresses, 1) == 2, "addresses are (experts, 2)");
    }
};

struct StackHolder {
    std::vector<Layer> layers;
    std::vector<nb::object> keep;
    const RouterLayer* router = nullptr;  // of the first row
    size_t rows = 0;
    bool windows = false;  // whether a layer has one

    explicit StackHolder(std::vector<nb::object> objects) : keep(std::move(objects)) {
        require(!keep.empty(), "a stack has layers");
        for (const nb::object& object : keep) layers.push_back(nb::cast<LayerHolder&>(object).layer);
        for (const Layer& layer : layers) {
            require(layer.expert.hidden == layers[0].expert.hidden && layer.shape.same_cache(layers[0].shape) &&
                        layer.shape.rotated == layers[0].shape.rotated,
                    "the layers of a stack do not fit each other");
            windows |= layer.shape.window != 0;
            if (layer.dense) continue;
            if (!router) router = &layer.router;
            require(layer.router.experts == router->experts && layer.router.top_k == router->top_k,
                    "the routers of a stack choose alike");
            ++rows;
        }
    }
};

// Whether a layer before this one needs the same pages.
bool seen_before(const StackHolder& stack, const Cache& cache, int64_t layer) {
    for (int64_t other = 0; other < layer; ++other)
        if (stack.layers[other].shape.window == stack.layers[layer].shape.window && cache.group(other) == cache.group(layer))
            return true;
    return false;
}

// A feed that is Python's.
struct CalledFeed final : ExpertFeed {
    CalledFeed(nb::callable ready, int experts) : ready(std::move(ready)), experts(experts) {}
    const std::vector<int>& next() override {
        nb::gil_scoped_acquire acquire;
        stretch = nb::cast<std::vector<int>>(ready());
        for (int expert : stretch) require(expert >= 0 && expert < experts, "a feed's expert is out of range");
        return stretch;
    }
    nb::callable ready;
    int experts;
    std::vector<int> stretch;
};

struct SlicesStretches final : ExpertFeed {
    explicit SlicesStretches(ExpertSlices& slices) : slices(slices) {}
    const std::vector<int>& next() override { return slices.next(); }
    ExpertSlices& slices;
};

void forward_all(const StackHolder& stack, Array<float, 2> x, const CacheHolder& cache, Input<int32_t, 1> slots,
                 Input<int32_t, 1> positions, Input<float, 2> cosine, Input<float, 2> sine,
                 std::optional<Input<uint8_t, 2>> allowed, bool rescale, bool coarse, double offset, Array<int32_t, 3> ranked,
                 Array<float, 3> scores, Array<int32_t, 3> experts, Array<float, 3> weights, std::optional<SlicesHolder*> slices,
                 std::optional<nb::callable> ready, std::optional<nb::callable> routed, std::optional<Array<double, 2>> times) {
    const DraftChoice draft{allowed ? allowed->data() : nullptr, rescale, coarse, integral_offset(offset)};
    const size_t rows = stack.rows, tokens = x.shape(0), layers = stack.layers.size();
    const int64_t different = stack.windows || cache.cache.places ? static_cast<int64_t>(layers) : 1;
    require(static_cast<int64_t>(layers) <= cache.cache.model_layers, "the cache does not fit");
    for (int64_t layer = 0; layer < different; ++layer)
        if (!seen_before(stack, cache.cache, layer))
            check_attention(stack.layers[layer].shape, cache.cache, layer, 1, x, slots, positions, cosine, sine);
    if (stack.layers[0].latent) require(2 * side(cosine, 1) == stack.layers[0].shape.rotated, "rotary tables do not fit");
    auto fits = [&](const auto& a, size_t last) { return a.shape(0) == rows && a.shape(1) == tokens && a.shape(2) == last; };
    const size_t ranks = ranked.shape(2), size = experts.shape(2);
    require(fits(ranked, ranks) && fits(scores, ranks) && fits(experts, size) && fits(weights, size), "routing arrays do not fit");
    const int count = stack.router ? stack.router->experts : 0;
    require(!allowed || (allowed->shape(0) == rows && (rows == 0 || side(*allowed, 1) == count)), "the mask does not fit");
    if (stack.router)
        require(size > 0 && size <= static_cast<size_t>(stack.router->top_k) &&
                    (allowed || size == static_cast<size_t>(stack.router->top_k)) && side(ranked, 2) <= count,
                "too many experts asked for");
    require(!slices || ((*slices)->rows() == rows && (*slices)->experts == count), "slices do not fit");
    require(!(slices && ready) && (!(slices || ready) || routed), "a feed begins rows");
    require(!times || (times->shape(0) == layers && times->shape(1) == kTimes), "times do not fit");
    if (tokens == 0) return;
    std::optional<SlicesStretches> native;
    std::optional<CalledFeed> called;
    Company company{{}, nullptr, times ? times->data() : nullptr};
    if (slices) company.feed = &native.emplace((*slices)->slices);
    if (ready) company.feed = &called.emplace(*ready, count);
    if (routed)
        company.routed = [&routed](int row) {
            nb::gil_scoped_acquire acquire;
            (*routed)(row);
        };
    nb::gil_scoped_release release;
    Operation operation;
    const Places places{static_cast<int>(tokens), slots.data(), positions.data(), cosine.data(), sine.data(),
                        static_cast<int>(cosine.shape(1))};
    const int stride = static_cast<int>(size);
    forward(stack.layers, x.data(), places, cache.cache, draft,
            {nullptr, ranked.data(), scores.data(), static_cast<int>(ranks), experts.data(), weights.data(), stride, stride}, company);
}

}  // namespace

void bind_forward(nb::module_& m) {
    nb::class_<NormHolder>(m, "Norm").def(nb::init<Input<float, 1>, float>());
    nb::class_<LayerHolder>(m, "Layer").def(
        nb::init<nb::object, nb::object, nb::object, nb::object, Input<int64_t, 2>, nb::object, nb::object>(),
        nb::arg("attention"), nb::arg("router").none(), nb::arg("norm").none(), nb::arg("expert"), nb::arg("addresses"),
        nb::arg("terms").none(), nb::arg("shared").none());
    nb::class_<SharedHolder>(m, "Shared")
        .def(nb::init<nb::object, Input<int64_t, 2>, std::optional<Input<float, 1>>>(), nb::arg("expert"), nb::arg("addresses"),
             nb::arg("gate").none());
    nb::class_<StackHolder>(m, "Stack").def(nb::init<std::vector<nb::object>>());
    m.def("forward", &forward_all, nb::arg("stack"), nb::arg("x"), nb::arg("cache"), nb::arg("slots"), nb::arg("positions"),
          nb::arg("cosine"), nb::arg("sine"), nb::arg("allowed").none(), nb::arg("rescale"), nb::arg("coarse"), nb::arg("offset"),
          nb::arg("ranked"), nb::arg("scores"), nb::arg("experts"), nb::arg("weights"), nb::arg("slices").none(),
          nb::arg("ready").none(), nb::arg("routed").none(), nb::arg("times").none());
}
