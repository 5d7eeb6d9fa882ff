// The Python module: shapes are checked, pointers are taken, the GIL is let go. No maths.
//
// Weights become objects once (they keep their arrays alive); a call on the decode path then passes few arrays.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "operations.hpp"
#include "slices_holder.hpp"

namespace nb = nanobind;
using namespace elmoe;

namespace {

template <class T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <class T, int N>
using Input = Array<const T, N>;

void require(bool condition, const char* what) {
    if (!condition) throw nb::value_error(what);
}

// Arrays that a weights object keeps alive.
struct MatrixHolder {
    Matrix matrix;
    Input<uint8_t, 3> hi;
    std::optional<Input<uint8_t, 3>> lo;
    Input<uint16_t, 3> scales;

    MatrixHolder(int rows, int columns, Input<uint8_t, 3> hi_, std::optional<Input<uint8_t, 3>> lo_, Input<uint16_t, 3> scales_)
        : matrix{rows, columns, hi_.data(), lo_ ? lo_->data() : nullptr, scales_.data()}, hi(hi_), lo(lo_), scales(scales_) {
        require(rows > 0 && columns > 0, "a matrix has rows and columns");
        const size_t blocks = matrix.blocks(), groups = matrix.groups();
        auto plane = [&](const auto& a, size_t last) { return a.shape(0) == blocks && a.shape(1) == groups && a.shape(2) == last; };
        require(plane(hi, kGroupBytes) && (!lo || plane(*lo, kGroupBytes)) && plane(scales, kBlockRows), "planes do not fit");
    }
};

struct AttentionHolder {
    AttentionLayer layer;
    std::vector<nb::object> keep;

    AttentionHolder(Input<float, 1> norm, nb::object query_key_value, std::optional<Input<float, 1>> query_norm,
                    std::optional<Input<float, 1>> key_norm, nb::object output, int heads, int kv_heads, int head_dim,
                    float epsilon) {
        const Matrix& in = nb::cast<MatrixHolder&>(query_key_value).matrix;
        const Matrix& out = nb::cast<MatrixHolder&>(output).matrix;
        require(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, "heads must be a multiple of kv_heads");
        require(head_dim > 0 && head_dim % 16 == 0 && head_dim <= 1024, "head_dim must be a multiple of 16, at most 1024");
        require(in.rows == (heads + 2 * kv_heads) * head_dim && out.columns == heads * head_dim, "projections do not fit heads");
        require(in.lo && out.lo && static_cast<int>(norm.shape(0)) == in.columns && out.rows == in.columns, "hidden sizes differ");
        const size_t size = static_cast<size_t>(head_dim);
        require(query_norm.has_value() == key_norm.has_value(), "give both head norms or none");
        require(!query_norm || (query_norm->shape(0) == size && key_norm->shape(0) == size), "head norms do not fit head_dim");
        layer = {norm.data(), query_norm ? query_norm->data() : nullptr, key_norm ? key_norm->data() : nullptr, in, out,
                 heads, kv_heads, head_dim, epsilon};
        keep = {nb::cast(norm), query_key_value, output};
        if (query_norm) keep.insert(keep.end(), {nb::cast(*query_norm), nb::cast(*key_norm)});
    }
};

struct RouterHolder {
    RouterLayer layer;
    Input<float, 1> norm;
    Input<float, 2> router;

    RouterHolder(Input<float, 1> norm_, Input<float, 2> router_, int top_k, float epsilon, bool normalize)
        : norm(norm_), router(router_) {
        layer = {norm.data(), router.data(), static_cast<int>(router.shape(0)), static_cast<int>(router.shape(1)), top_k,
                 epsilon, normalize};
        require(norm.shape(0) == router.shape(1) && top_k > 0 && top_k <= layer.experts, "router does not fit");
    }
};

struct CacheHolder {
    Cache cache;
    Array<uint16_t, 6> keys;
    Array<uint16_t, 5> values;
    Input<int32_t, 2> table;

    CacheHolder(Array<uint16_t, 6> keys_, Array<uint16_t, 5> values_, Input<int32_t, 2> table_)
        : keys(keys_), values(values_), table(table_) {
        auto side = [](size_t n) { return static_cast<int>(n); };
        cache = {keys.data(), values.data(), table.data(), side(values.shape(0)), side(values.shape(1)), side(values.shape(2)),
                 side(values.shape(4)), side(values.shape(3)), side(table.shape(0)), side(table.shape(1))};
        require(keys.shape(0) == values.shape(0) && keys.shape(1) == values.shape(1) && keys.shape(2) == values.shape(2) &&
                    keys.shape(3) * 16 == values.shape(3) && keys.shape(4) == values.shape(4) && keys.shape(5) == 16,
                "keys and values do not fit");
    }
};

struct ExpertHolder {
    ExpertShape shape;
    ExpertHolder(int hidden, int width, std::vector<int64_t> msb, std::vector<int64_t> lsb) {
        require(hidden > 0 && width > 0 && msb.size() == 6 && lsb.size() == 3, "an expert has 6 MSB and 3 LSB sections");
        shape = {hidden, width, msb[0], msb[1], msb[2], msb[3], msb[4], msb[5], lsb[0], lsb[1], lsb[2]};
    }
};

// Consecutive layers whose experts all lie in memory; `addresses` are read anew in every call.
struct StackHolder {
    std::vector<Layer> layers;
    std::vector<nb::object> keep;

    StackHolder(std::vector<nb::object> attention, std::vector<nb::object> routers, nb::object expert,
                std::vector<Input<int64_t, 2>> addresses) {
        require(!attention.empty() && attention.size() == routers.size() && routers.size() == addresses.size(),
                "a stack has layers, each with attention, router and addresses");
        const ExpertShape& shape = nb::cast<ExpertHolder&>(expert).shape;
        for (size_t l = 0; l < attention.size(); ++l) {
            layers.push_back({nb::cast<AttentionHolder&>(attention[l]).layer, nb::cast<RouterHolder&>(routers[l]).layer, shape,
                              addresses[l].data()});
            const Layer& layer = layers.back();
            require(layer.router.hidden == shape.hidden && layer.attention.output.rows == shape.hidden &&
                        static_cast<int>(addresses[l].shape(0)) == layer.router.experts && addresses[l].shape(1) == 2 &&
                        layer.router.experts == layers[0].router.experts && layer.router.top_k == layers[0].router.top_k &&
                        layer.attention.head_dim == layers[0].attention.head_dim &&
                        layer.attention.kv_heads == layers[0].attention.kv_heads,
                    "the layers of a stack do not fit each other");
            keep.insert(keep.end(), {attention[l], routers[l], nb::cast(addresses[l])});
        }
        keep.push_back(expert);
    }
};

int integral_offset(double offset) {
    require(offset == static_cast<int>(offset) && offset >= 0 && offset <= 16,
            "native kernels draft with an integral offset within 0..16; use the reference backend");
    return static_cast<int>(offset);
}

void bind_nested_matmul(const MatrixHolder& matrix, Input<float, 2> x, Array<float, 2> y, bool draft, double offset) {
    const int whole = integral_offset(offset);
    require(static_cast<int>(x.shape(1)) == matrix.matrix.columns && static_cast<int>(y.shape(1)) == matrix.matrix.rows &&
                x.shape(0) == y.shape(0),
            "x or y does not fit the matrix");
    require(draft || matrix.matrix.lo, "the LSB slice is not at hand");
    nb::gil_scoped_release release;
    Operation operation;
    matmul_exact(matrix.matrix, draft, whole, x.data(), static_cast<int>(x.shape(0)), y.data());
}

void bind_rms_norm(Input<float, 2> x, Input<float, 1> weight, Array<float, 2> y, float epsilon) {
    require(x.shape(1) == weight.shape(0) && y.shape(0) == x.shape(0) && y.shape(1) == x.shape(1), "shapes differ");
    nb::gil_scoped_release release;
    Operation operation;
    const size_t size = x.shape(1);
    for (size_t i = 0; i < x.shape(0); ++i)
        kernels().rms_norm(x.data() + i * size, weight.data(), y.data() + i * size, static_cast<int>(size), epsilon);
}

void check_attention(const AttentionLayer& a, const Cache& c, int first_layer, int layers, const Array<float, 2>& x,
                     const Input<int32_t, 1>& slots, const Input<int32_t, 1>& positions, const Input<float, 2>& cosine,
                     const Input<float, 2>& sine) {
    const int tokens = static_cast<int>(x.shape(0)), half = a.head_dim / 2;
    require(static_cast<int>(x.shape(1)) == a.query_key_value.columns && slots.shape(0) == x.shape(0) &&
                positions.shape(0) == x.shape(0),
            "x, slots or positions do not fit");
    require(c.head_dim == a.head_dim && c.kv_heads == a.kv_heads && first_layer >= 0 && first_layer + layers <= c.layers,
            "the cache does not fit");
    require(static_cast<int>(cosine.shape(1)) == half && static_cast<int>(sine.shape(1)) == half &&
                cosine.shape(0) == sine.shape(0),
            "rotary tables do not fit");
    for (int t = 0; t < tokens; ++t) {
        const int slot = slots.data()[t], position = positions.data()[t];
        require(slot >= 0 && slot < c.slots && position >= 0 && position < static_cast<int>(cosine.shape(0)) &&
                    position / c.page_positions < c.slot_pages,
                "a slot or position is out of range");
        for (int page = 0; page <= position / c.page_positions; ++page) {
            const int32_t index = c.table[static_cast<int64_t>(slot) * c.slot_pages + page];
            require(index >= 0 && index < c.pages, "a position has no cache page");
        }
    }
}

void bind_attention(const AttentionHolder& holder, Array<float, 2> x, const CacheHolder& cache, int layer,
                    Input<int32_t, 1> slots, Input<int32_t, 1> positions, Input<float, 2> cosine, Input<float, 2> sine) {
    check_attention(holder.layer, cache.cache, layer, 1, x, slots, positions, cosine, sine);
    nb::gil_scoped_release release;
    Operation operation;
    attention_block(holder.layer, x.data(), static_cast<int>(x.shape(0)), cache.cache, layer, slots.data(), positions.data(),
                    cosine.data(), sine.data());
}

// Whether `size` experts per token can be chosen; `allowed` may be null.
void check_choice(const RouterLayer& r, const uint8_t* allowed, int size, int ranks) {
    int usable = r.top_k;
    if (allowed) {
        usable = 0;
        for (int e = 0; e < r.experts; ++e) usable += allowed[e] != 0;
    }
    require(size > 0 && size <= r.top_k && size <= usable && (allowed || size == r.top_k) && ranks <= r.experts,
            "too many experts asked for");
}

void bind_route(const RouterHolder& holder, Input<float, 2> x, std::optional<Input<uint8_t, 1>> allowed, bool rescale,
                Array<float, 2> hidden, Array<int32_t, 2> ranked, Array<float, 2> scores, Array<int32_t, 2> experts,
                Array<float, 2> weights) {
    const RouterLayer& r = holder.layer;
    const size_t tokens = x.shape(0);
    require(static_cast<int>(x.shape(1)) == r.hidden && hidden.shape(0) == tokens && hidden.shape(1) == x.shape(1) &&
                ranked.shape(0) == tokens && scores.shape(0) == tokens && experts.shape(0) == tokens &&
                weights.shape(0) == tokens && ranked.shape(1) == scores.shape(1) && experts.shape(1) == weights.shape(1),
            "routing arrays do not fit");
    check_choice(r, allowed ? allowed->data() : nullptr, static_cast<int>(experts.shape(1)), static_cast<int>(ranked.shape(1)));
    nb::gil_scoped_release release;
    Operation operation;
    route(r, x.data(), static_cast<int>(tokens), allowed ? allowed->data() : nullptr, rescale,
          {hidden.data(), ranked.data(), scores.data(), static_cast<int>(ranked.shape(1)), experts.data(), weights.data(),
           static_cast<int>(experts.shape(1))});
}

void bind_expert_ffn(const ExpertHolder& holder, Input<int64_t, 2> addresses, Input<float, 2> hidden, Input<int32_t, 2> experts,
                     Input<float, 2> weights, Array<float, 2> x, bool draft, double offset, bool chain) {
    const int whole = integral_offset(offset), count = static_cast<int>(addresses.shape(0));
    const size_t tokens = x.shape(0), size = static_cast<size_t>(holder.shape.hidden);
    require(addresses.shape(1) == 2 && hidden.shape(0) == tokens && hidden.shape(1) == size && x.shape(1) == size &&
                experts.shape(0) == tokens && weights.shape(0) == tokens && experts.shape(1) == weights.shape(1),
            "expert arrays do not fit");
    for (size_t i = 0; i < experts.size(); ++i)
        require(experts.data()[i] >= -1 && experts.data()[i] < count, "an expert id is out of range");
    if (experts.size() == 0) return;
    nb::gil_scoped_release release;
    Operation operation;
    expert_ffn(holder.shape, addresses.data(), count, hidden.data(), experts.data(), weights.data(), static_cast<int>(tokens),
               static_cast<int>(experts.shape(1)), x.data(), draft, whole, chain);
}

// Decisions are Python's: `decide(layer)` begins a layer.
struct Feed final : ExpertFeed {
    Feed(ExpertSlices& slices, nb::callable decide) : slices(slices), decide(std::move(decide)) {}
    void routed(int layer) override {
        nb::gil_scoped_acquire acquire;
        decide(layer);
    }
    const std::vector<int>& next() override { return slices.next(); }

    ExpertSlices& slices;
    nb::callable decide;
};

void bind_forward(const StackHolder& stack, Array<float, 2> x, const CacheHolder& cache, int first_layer,
                  Input<int32_t, 1> slots, Input<int32_t, 1> positions, Input<float, 2> cosine, Input<float, 2> sine,
                  std::optional<Input<uint8_t, 2>> allowed, bool rescale, bool draft, double offset, Array<int32_t, 3> ranked,
                  Array<float, 3> scores, Array<int32_t, 3> experts, Array<float, 3> weights,
                  std::optional<SlicesHolder*> slices, std::optional<nb::callable> decide) {
    const int whole = integral_offset(offset);
    const size_t layers = stack.layers.size(), tokens = x.shape(0);
    check_attention(stack.layers[0].attention, cache.cache, first_layer, static_cast<int>(layers), x, slots, positions, cosine,
                    sine);
    auto fits = [&](const auto& a, size_t last) { return a.shape(0) == layers && a.shape(1) == tokens && a.shape(2) == last; };
    const size_t ranks = ranked.shape(2), size = experts.shape(2);
    require(fits(ranked, ranks) && fits(scores, ranks) && fits(experts, size) && fits(weights, size), "routing arrays do not fit");
    const size_t count = static_cast<size_t>(stack.layers[0].router.experts);
    require(!allowed || (allowed->shape(0) == layers && allowed->shape(1) == count), "the mask does not fit");
    for (size_t l = 0; l < layers; ++l)
        check_choice(stack.layers[l].router, allowed ? allowed->data() + l * count : nullptr, static_cast<int>(size),
                     static_cast<int>(ranks));
    require(!slices || (decide && (*slices)->tables.size() == layers && (*slices)->experts == count), "slices do not fit");
    if (tokens == 0) return;
    std::optional<Feed> feed;
    if (slices) feed.emplace((*slices)->slices, *decide);
    nb::gil_scoped_release release;
    Operation operation;
    forward(stack.layers, x.data(), static_cast<int>(tokens), cache.cache, first_layer, slots.data(), positions.data(),
            cosine.data(), sine.data(), allowed ? allowed->data() : nullptr, rescale, draft, whole,
            {nullptr, ranked.data(), scores.data(), static_cast<int>(ranks), experts.data(), weights.data(),
             static_cast<int>(size)},
            feed ? &*feed : nullptr);
}

void bind_embed(const MatrixHolder& matrix, Input<int32_t, 1> tokens, Array<float, 2> out) {
    require(out.shape(0) == tokens.shape(0) && static_cast<int>(out.shape(1)) == matrix.matrix.columns && matrix.matrix.lo,
            "embedding arrays do not fit");
    for (size_t i = 0; i < tokens.shape(0); ++i)
        if (tokens.data()[i] < 0 || tokens.data()[i] >= matrix.matrix.rows)
            throw NumericsFailure("token id outside 0.." + std::to_string(matrix.matrix.rows - 1));
    nb::gil_scoped_release release;
    Operation operation;
    embed(matrix.matrix, tokens.data(), static_cast<int>(tokens.shape(0)), out.data());
}

void bind_logits(Input<float, 1> norm, float epsilon, const MatrixHolder& head, Input<float, 2> x, Array<float, 2> out) {
    const Matrix& m = head.matrix;
    require(static_cast<int>(x.shape(1)) == m.columns && norm.shape(0) == x.shape(1) && out.shape(0) == x.shape(0) &&
                static_cast<int>(out.shape(1)) == m.rows && m.lo,
            "vocabulary projection does not fit");
    nb::gil_scoped_release release;
    Operation operation;
    const size_t tokens = x.shape(0), size = x.shape(1);
    auto* normed = scratch().get<float>(tokens * size);
    for (size_t t = 0; t < tokens; ++t)
        kernels().rms_norm(x.data() + t * size, norm.data(), normed + t * size, static_cast<int>(size), epsilon);
    matmul_exact(m, false, 0, normed, static_cast<int>(tokens), out.data());
    uint32_t largest = 0;
    for (size_t i = 0; i < out.size(); ++i) {
        uint32_t bits;
        std::memcpy(&bits, out.data() + i, 4);
        largest = std::max(largest, bits & 0x7FFFFFFFu);
    }
    if (largest >= 0x7F800000u) throw NumericsFailure("a logit is NaN or infinite");
}

nb::tuple bind_sample(Input<float, 1> logits, double temperature, int64_t top_k, double top_p, double min_p, uint64_t seed,
                      uint64_t choice, int64_t position) {
    require(logits.shape(0) > 0, "there are no logits");
    Sampled result;
    {
        nb::gil_scoped_release release;
        Operation operation;
        result = sample(logits.data(), static_cast<int>(logits.shape(0)), {temperature, top_p, min_p, top_k, seed, choice},
                        position);
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
void bind_read_pool(nb::module_& m);

NB_MODULE(_native, m) {
    nb::exception<NumericsFailure>(m, "NumericsFailure");
    nb::class_<MatrixHolder>(m, "Matrix")
        .def(nb::init<int, int, Input<uint8_t, 3>, std::optional<Input<uint8_t, 3>>, Input<uint16_t, 3>>(), nb::arg("rows"),
             nb::arg("columns"), nb::arg("hi"), nb::arg("lo").none(), nb::arg("scales"));
    nb::class_<AttentionHolder>(m, "Attention")
        .def(nb::init<Input<float, 1>, nb::object, std::optional<Input<float, 1>>, std::optional<Input<float, 1>>, nb::object, int,
                      int, int, float>(),
             nb::arg("norm"), nb::arg("query_key_value"), nb::arg("query_norm").none(), nb::arg("key_norm").none(),
             nb::arg("output"), nb::arg("heads"), nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("epsilon"));
    nb::class_<RouterHolder>(m, "Router")
        .def(nb::init<Input<float, 1>, Input<float, 2>, int, float, bool>());
    nb::class_<CacheHolder>(m, "Cache").def(nb::init<Array<uint16_t, 6>, Array<uint16_t, 5>, Input<int32_t, 2>>());
    nb::class_<ExpertHolder>(m, "Expert").def(nb::init<int, int, std::vector<int64_t>, std::vector<int64_t>>());
    m.def("nested_matmul", &bind_nested_matmul);
    nb::class_<StackHolder>(m, "Stack")
        .def(nb::init<std::vector<nb::object>, std::vector<nb::object>, nb::object, std::vector<Input<int64_t, 2>>>());
    m.def("forward", &bind_forward, nb::arg("stack"), nb::arg("x"), nb::arg("cache"), nb::arg("first_layer"), nb::arg("slots"),
          nb::arg("positions"), nb::arg("cosine"), nb::arg("sine"), nb::arg("allowed").none(), nb::arg("rescale"),
          nb::arg("draft"), nb::arg("offset"), nb::arg("ranked"), nb::arg("scores"), nb::arg("experts"), nb::arg("weights"),
          nb::arg("slices").none(), nb::arg("decide").none());
    m.def("rms_norm", &bind_rms_norm);
    m.def("attention_block", &bind_attention);
    m.def("route", &bind_route, nb::arg("router"), nb::arg("x"), nb::arg("allowed").none(), nb::arg("rescale"), nb::arg("hidden"),
          nb::arg("ranked"), nb::arg("scores"), nb::arg("experts"), nb::arg("weights"));
    m.def("expert_ffn", &bind_expert_ffn);
    m.def("embed", &bind_embed);
    m.def("logits", &bind_logits);
    m.def("sample", &bind_sample);
    m.def("stream_read", &bind_stream_read);
    bind_read_pool(m);
    bind_expert_slices(m);
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
