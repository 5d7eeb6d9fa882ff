// The Python module: shapes are checked, pointers are taken, the GIL is let go. No maths.
//
// Weights become objects once (they keep their arrays alive); a call on the decode path then passes few arrays.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "holders.hpp"

using namespace elmoe;

namespace elmoe {
void check_attention(const AttentionShape& a, const Cache& c, int64_t first_layer, int64_t layers, const Array<float, 2>& x,
                     const Input<int32_t, 1>& slots, const Input<int32_t, 1>& positions, const Input<float, 2>& cosine,
                     const Input<float, 2>& sine) {
    const int tokens = narrow(side(x, 0), kTooLarge);
    require(side(x, 1) == a.hidden && slots.shape(0) == x.shape(0) &&
                positions.shape(0) == x.shape(0),
            "x, slots or positions do not fit");
    require(c.key_dim == a.key_dim && c.value_dim == a.value_dim && c.kv_heads == a.kv_heads && first_layer >= 0 && first_layer + layers <= c.model_layers,
            "the cache does not fit");
    require(side(cosine, 1) <= a.rotated / 2 && sine.shape(1) == cosine.shape(1) && cosine.shape(0) == sine.shape(0),
            "rotary tables do not fit");
    const int group = c.group(first_layer);
    for (int t = 0; t < tokens; ++t) {
        const int slot = slots.data()[t], position = positions.data()[t];
        require(slot >= 0 && slot < c.slots && position >= 0 && position < side(cosine, 0) &&
                    position / c.page_positions < c.slot_pages,
                "a slot or position is out of range");
        const int32_t* pages = c.table + static_cast<int64_t>(slot) * c.slot_pages * c.groups;
        const int last = position / c.page_positions;
        for (int64_t page = a.first_seen(position) / c.page_positions * c.groups; page < (last + 1) * int64_t{c.groups}; ++page) {
            if (c.places && page % c.groups != group) continue;
            require(pages[page] >= 0 && pages[page] < c.pages, "a position has no cache page");
        }
    }
}

void check_choice(const RouterLayer& r, const uint8_t* allowed, int64_t size, int64_t ranks) {
    int usable = r.top_k;
    if (allowed) {
        usable = 0;
        for (int e = 0; e < r.experts; ++e) usable += allowed[e] != 0;
    }
    require(size > 0 && size <= r.top_k && size <= usable && (allowed || size == r.top_k) && ranks >= 0 && ranks <= r.experts,
            "too many experts asked for");
}

}  // namespace elmoe

namespace {

void bind_nested_matmul(const MatrixHolder& matrix, Input<float, 2> x, Array<float, 2> y, bool draft, double offset) {
    const int whole = integral_offset(offset), tokens = narrow(side(x, 0), kTooLarge);
    require(side(x, 1) == matrix.matrix.columns && side(y, 1) == matrix.matrix.rows &&
                x.shape(0) == y.shape(0),
            "x or y does not fit the matrix");
    require(draft || matrix.matrix.whole(), "the LSB slice is not at hand");
    nb::gil_scoped_release release;
    Operation operation;
    matmul_exact(matrix.matrix, draft, whole, x.data(), tokens, y.data());
}

void bind_rms_norm(Input<float, 2> x, Input<float, 1> weight, Array<float, 2> y, float epsilon) {
    require(x.shape(1) == weight.shape(0) && y.shape(0) == x.shape(0) && y.shape(1) == x.shape(1), "shapes differ");
    const int size = narrow(side(x, 1), kTooLarge);
    nb::gil_scoped_release release;
    Operation operation;
    for (size_t i = 0; i < x.shape(0); ++i)
        kernels().rms_norm(x.data() + i * size, weight.data(), y.data() + i * size, size, epsilon);
}

void bind_attention(const AttentionHolder& holder, Array<float, 2> x, const CacheHolder& cache, int64_t layer,
                    Input<int32_t, 1> slots, Input<int32_t, 1> positions, Input<float, 2> cosine, Input<float, 2> sine) {
    check_attention(holder.layer.shape(), cache.cache, layer, 1, x, slots, positions, cosine, sine);
    nb::gil_scoped_release release;
    Operation operation;
    const Places places{static_cast<int>(x.shape(0)), slots.data(), positions.data(), cosine.data(), sine.data(),
                        static_cast<int>(cosine.shape(1))};
    attention_block(holder.layer, x.data(), places, cache.cache, static_cast<int>(layer));
}

void bind_latent(const LatentHolder& holder, Array<float, 2> x, const CacheHolder& cache, int64_t layer,
                 Input<int32_t, 1> slots, Input<int32_t, 1> positions, Input<float, 2> cosine, Input<float, 2> sine) {
    check_attention(holder.layer.shape(), cache.cache, layer, 1, x, slots, positions, cosine, sine);
    require(2 * side(cosine, 1) == holder.layer.rotary, "rotary tables do not fit");
    nb::gil_scoped_release release;
    Operation operation;
    const Places places{static_cast<int>(x.shape(0)), slots.data(), positions.data(), cosine.data(), sine.data(),
                        static_cast<int>(cosine.shape(1))};
    latent_block(holder.layer, x.data(), places, cache.cache, static_cast<int>(layer));
}

void bind_route(const RouterHolder& holder, Input<float, 2> x, std::optional<Input<uint8_t, 1>> allowed, bool rescale,
                Array<float, 2> hidden, Array<int32_t, 2> ranked, Array<float, 2> scores, Array<int32_t, 2> experts,
                Array<float, 2> weights) {
    const RouterLayer& r = holder.layer;
    const size_t tokens = x.shape(0);
    require(side(x, 1) == r.hidden && side(x, 0) <= INT_MAX && hidden.shape(0) == tokens && hidden.shape(1) == x.shape(1) &&
                ranked.shape(0) == tokens && scores.shape(0) == tokens && experts.shape(0) == tokens &&
                weights.shape(0) == tokens && ranked.shape(1) == scores.shape(1) && experts.shape(1) == weights.shape(1),
            "routing arrays do not fit");
    require(!allowed || side(*allowed, 0) == r.experts, "the mask does not fit");
    check_choice(r, allowed ? allowed->data() : nullptr, side(experts, 1), side(ranked, 1));
    const int size = static_cast<int>(experts.shape(1));
    nb::gil_scoped_release release;
    Operation operation;
    route(r, x.data(), static_cast<int>(tokens), allowed ? allowed->data() : nullptr, rescale,
          {hidden.data(), ranked.data(), scores.data(), static_cast<int>(ranked.shape(1)), experts.data(), weights.data(), size,
           size});
}

void bind_expert_ffn(const ExpertHolder& holder, Input<int64_t, 2> addresses, Input<float, 2> hidden, Input<int32_t, 2> experts,
                     Input<float, 2> weights, Array<float, 2> x, bool draft, double offset, bool chain, nb::object terms) {
    const int whole = integral_offset(offset), count = narrow(side(addresses, 0), kTooLarge);
    const int rows = narrow(side(x, 0), kTooLarge), k = narrow(side(experts, 1), kTooLarge);
    const size_t tokens = x.shape(0), size = static_cast<size_t>(holder.shape.hidden);
    require(addresses.shape(1) == 2 && hidden.shape(0) == tokens && hidden.shape(1) == size && x.shape(1) == size &&
                experts.shape(0) == tokens && weights.shape(0) == tokens && experts.shape(1) == weights.shape(1),
            "expert arrays do not fit");
    for (size_t i = 0; i < experts.size(); ++i)
        require(experts.data()[i] >= -1 && experts.data()[i] < count, "an expert id is out of range");
    const TermsHolder* more = terms.is_none() ? nullptr : &nb::cast<TermsHolder&>(terms);
    require(!more || more->fit(holder.shape, count), "biases do not fit the experts");
    if (experts.size() == 0) return;
    nb::gil_scoped_release release;
    Operation operation;
    expert_ffn({holder.shape, addresses.data(), count, hidden.data(), experts.data(), weights.data(), rows, k, draft, whole, chain,
                more ? &more->terms : nullptr},
               x.data());
}

void bind_embed(const MatrixHolder& matrix, Input<int32_t, 1> tokens, Array<float, 2> out) {
    const int count = narrow(side(tokens, 0), kTooLarge);
    require(out.shape(0) == tokens.shape(0) && side(out, 1) == matrix.matrix.columns && matrix.matrix.whole(),
            "embedding arrays do not fit");
    for (size_t i = 0; i < tokens.shape(0); ++i)
        if (tokens.data()[i] < 0 || tokens.data()[i] >= matrix.matrix.rows)
            throw NumericsFailure("token id outside 0.." + std::to_string(matrix.matrix.rows - 1));
    nb::gil_scoped_release release;
    Operation operation;
    embed(matrix.matrix, tokens.data(), count, out.data());
}

void bind_logits(Input<float, 1> norm, float epsilon, const MatrixHolder& head, Input<float, 2> x, Array<float, 2> out) {
    const Matrix& m = head.matrix;
    const int tokens = narrow(side(x, 0), kTooLarge);
    require(side(x, 1) == m.columns && norm.shape(0) == x.shape(1) && out.shape(0) == x.shape(0) &&
                side(out, 1) == m.rows && m.whole(),
            "vocabulary projection does not fit");
    nb::gil_scoped_release release;
    Operation operation;
    const int64_t size = m.columns;
    auto* normed = scratch().get<float>(tokens * size);
    for (int64_t t = 0; t < tokens; ++t)
        kernels().rms_norm(x.data() + t * size, norm.data(), normed + t * size, m.columns, epsilon);
    matmul_exact(m, false, 0, normed, tokens, out.data());
    uint32_t largest = 0;
    for (size_t i = 0; i < out.size(); ++i) {
        uint32_t bits;
        std::memcpy(&bits, out.data() + i, 4);
        largest = std::max(largest, bits & 0x7FFFFFFFu);
    }
    if (largest >= 0x7F800000u) throw NumericsFailure("a logit is NaN or infinite");
}

nb::tuple bind_sample(Input<float, 1> logits, double temperature, int64_t top_k, double top_p, double min_p, uint64_t seed,
                      uint64_t choice, int64_t position, std::optional<Input<float, 1>> adjusted) {
    require(logits.shape(0) > 0, "there are no logits");
    const int vocabulary = narrow(side(logits, 0), kTooLarge);
    require(!adjusted || adjusted->shape(0) == logits.shape(0), "there are more or fewer adjusted logits than logits");
    Sampled result;
    {
        nb::gil_scoped_release release;
        Operation operation;
        result = sample(logits.data(), vocabulary, {temperature, top_p, min_p, top_k, seed, choice},
                        position, adjusted ? adjusted->data() : nullptr);
    }
    return nb::make_tuple(result.token, result.confidence, result.logprob);
}

uint64_t bind_stream_read(Input<uint8_t, 1> data) {
    nb::gil_scoped_release release;
    Operation operation;
    return stream_read(data.data(), static_cast<int64_t>(data.shape(0)));
}

}  // namespace

void bind_expert_slices(nb::module_& m);
void bind_forward(nb::module_& m);
void bind_packing(nb::module_& m);
void bind_read_pool(nb::module_& m);

NB_MODULE(_native, m) {
    nb::exception<NumericsFailure>(m, "NumericsFailure");
    nb::class_<MatrixHolder>(m, "Matrix")
        .def(nb::init<int64_t, int64_t, Input<uint8_t, 3>, std::optional<Input<uint8_t, 3>>, Input<uint16_t, 3>>(), nb::arg("rows"),
             nb::arg("columns"), nb::arg("hi"), nb::arg("lo").none(), nb::arg("scales"))
        .def(nb::init<int64_t, int64_t, const std::string&, Input<uint8_t, 3>, MatrixHolder::Bytes, MatrixHolder::Halves,
                      MatrixHolder::Halves, MatrixHolder::Bytes>(),
             nb::arg("rows"), nb::arg("columns"), nb::arg("format"), nb::arg("hi"), nb::arg("lo").none(), nb::arg("scales").none(),
             nb::arg("minima").none(), nb::arg("steps").none());
    nb::class_<AttentionHolder>(m, "Attention")
        .def(nb::init<Input<float, 1>, nb::object, AttentionHolder::Floats, AttentionHolder::Floats, nb::object, int64_t, int64_t,
                      int64_t, float, AttentionHolder::Floats, AttentionHolder::Floats, AttentionHolder::Floats, int64_t,
                      std::optional<float>>(),
             nb::arg("norm"), nb::arg("query_key_value"), nb::arg("query_norm").none(), nb::arg("key_norm").none(),
             nb::arg("output"), nb::arg("heads"), nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("epsilon"),
             nb::arg("projection_bias").none(), nb::arg("output_bias").none(), nb::arg("sinks").none(), nb::arg("window"),
             nb::arg("scale").none());
    nb::class_<LatentHolder>(m, "Latent")
        .def(nb::init<Input<float, 1>, nb::object, std::optional<Input<float, 1>>, nb::object, Input<float, 1>, nb::object,
                      nb::object, nb::object, int64_t, int64_t, int64_t, float, float, float, bool>(),
             nb::arg("norm"), nb::arg("query_latent"), nb::arg("query_norm").none(), nb::arg("query_up").none(),
             nb::arg("latent_norm"), nb::arg("key_up"), nb::arg("value_up"), nb::arg("output"), nb::arg("heads"),
             nb::arg("plain_dim"), nb::arg("rotary_dim"), nb::arg("epsilon"), nb::arg("latent_epsilon"), nb::arg("scale"),
             nb::arg("interleaved"));
    nb::class_<RouterHolder>(m, "Router")
        .def(nb::init<Input<float, 1>, Input<float, 2>, int64_t, float, bool, std::optional<Input<float, 1>>, bool,
                      std::optional<Input<float, 1>>, float, int64_t, int64_t, bool>(),
             nb::arg("norm"), nb::arg("router"), nb::arg("top_k"), nb::arg("epsilon"), nb::arg("normalize"), nb::arg("bias").none(),
             nb::arg("sigmoid"), nb::arg("selection_bias").none(), nb::arg("scaling"), nb::arg("groups"), nb::arg("kept_groups"),
             nb::arg("best_two"));
    nb::class_<TermsHolder>(m, "Terms").def(nb::init<Input<float, 2>, Input<float, 2>, Input<float, 2>, float, float>());
    nb::class_<CacheHolder>(m, "Cache")
        .def(nb::init<Array<uint16_t, 6>, Array<uint16_t, 5>, Input<int32_t, 2>, std::optional<Input<int32_t, 2>>>(),
             nb::arg("keys"), nb::arg("values"), nb::arg("table"), nb::arg("places").none());
    nb::class_<ExpertHolder>(m, "Expert")
        .def(nb::init<int64_t, int64_t, std::vector<int64_t>, std::vector<int64_t>, int64_t, int64_t>())
        .def(nb::init<int64_t, int64_t, const std::vector<std::string>&, const std::vector<std::vector<int64_t>>&, int64_t,
                      int64_t>());
    m.def("nested_matmul", &bind_nested_matmul);
    m.def("rms_norm", &bind_rms_norm);
    m.def("attention_block", &bind_attention);
    m.def("latent_block", &bind_latent);
    m.def("route", &bind_route, nb::arg("router"), nb::arg("x"), nb::arg("allowed").none(), nb::arg("rescale"), nb::arg("hidden"),
          nb::arg("ranked"), nb::arg("scores"), nb::arg("experts"), nb::arg("weights"));
    m.def("expert_ffn", &bind_expert_ffn, nb::arg("expert"), nb::arg("addresses"), nb::arg("hidden"), nb::arg("experts"),
          nb::arg("weights"), nb::arg("x"), nb::arg("draft"), nb::arg("offset"), nb::arg("chain"), nb::arg("terms").none());
    m.def("embed", &bind_embed);
    m.def("logits", &bind_logits);
    m.def("sample", &bind_sample, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
          nb::arg().none());
    m.def("stream_read", &bind_stream_read);
    bind_packing(m);
    bind_read_pool(m);
    bind_expert_slices(m);
    bind_forward(m);
    m.def("set_threads", [](int threads) {
        require(threads >= 1 && threads <= 64, "threads must be within 1..64");
        nb::gil_scoped_release release;
        Pool::instance().set_threads(threads);
    });
    m.def("threads", [] { return Pool::instance().threads(); });
    m.def("set_prefetch", [](int bytes) {
        require(bytes >= 0 && bytes <= 1 << 16, "a prefetch distance lies within 0..65536");
        nb::gil_scoped_release release;
        Operation operation;
        prefetch_ahead = bytes;
    });
    m.def("prefetch", [] { return prefetch_ahead; });
    m.def("set_variant", &set_variant);
    m.def("variant", [] { return std::string(kernels().name); });
    m.def("variants", &available_variants);
}
