// Weights as Python objects: shapes are checked once, in 64 bits, and their arrays are kept alive.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "operations.hpp"

namespace elmoe {

namespace nb = nanobind;

template <class T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <class T, int N>
using Input = Array<const T, N>;

inline void require(bool condition, const char* what) {
    if (!condition) throw nb::value_error(what);
}

// A side of an array as a signed number: comparisons and products are made in 64 bits.
template <class A>
int64_t side(const A& array, int axis) {
    return static_cast<int64_t>(array.shape(axis));
}

// For the int fields of the operations.
inline int narrow(int64_t value, const char* what) {
    require(value >= 0 && value <= INT_MAX, what);
    return static_cast<int>(value);
}
constexpr const char* kTooLarge = "a size does not fit 31 bits";

// (blocks, groups) of a matrix, 64 bits.
inline int64_t groups_of(int64_t length, int64_t group) { return (length + group - 1) / group; }

struct MatrixHolder {
    using Bytes = std::optional<Input<uint8_t, 3>>;
    using Halves = std::optional<Input<uint16_t, 3>>;
    Matrix matrix;
    Input<uint8_t, 3> hi;
    Bytes lo, steps;
    Halves scales, minima;

    MatrixHolder(int64_t rows, int64_t columns, Input<uint8_t, 3> hi_, std::optional<Input<uint8_t, 3>> lo_,
                 Input<uint16_t, 3> scales_)
        : MatrixHolder(rows, columns, "nested8", hi_, lo_, scales_, {}, {}) {}

    MatrixHolder(int64_t rows, int64_t columns, const std::string& format, Input<uint8_t, 3> hi_, Bytes lo_, Halves scales_,
                 Halves minima_, Bytes steps_)
        : hi(hi_), lo(lo_), steps(steps_), scales(scales_), minima(minima_) {
        require(rows > 0 && columns > 0, "a matrix has rows and columns");
        auto data = [](const auto& array) { return array ? array->data() : nullptr; };
        const Format found = format_named(format);
        const FormatShape& shape = shape_of(found);
        matrix = {narrow(rows, kTooLarge), narrow(columns, kTooLarge), hi.data(), data(lo), data(scales), found, data(minima),
                  data(steps)};
        const int64_t blocks = groups_of(rows, kBlockRows), groups = groups_of(columns, kGroup);
        auto fits = [&](const auto& a, int64_t cells, int64_t last) {
            return side(a, 0) == blocks && side(a, 1) == cells && side(a, 2) == last;
        };
        auto section = [&](const auto& a, int64_t span, int64_t last) {
            return span ? a && fits(*a, groups_of(groups, span), last) : !a;
        };
        require(fits(hi, groups, kGroupBytes) && (!lo || fits(*lo, groups, shape.lo)) && section(scales, shape.scales, kBlockRows) &&
                    section(minima, shape.minima, kBlockRows) && section(steps, shape.steps ? 1 : 0, shape.steps),
                "planes do not fit");
    }
};

// A matrix, or a list of matrices one below the other.
inline Stack stack_of(const nb::object& object) {
    std::vector<Matrix> parts;
    if (nb::isinstance<MatrixHolder>(object))
        parts.push_back(nb::cast<MatrixHolder&>(object).matrix);
    else
        for (nb::handle part : nb::cast<nb::list>(object)) parts.push_back(nb::cast<MatrixHolder&>(part).matrix);
    require(!parts.empty(), "projections do not fit heads");
    for (size_t i = 0; i < parts.size(); ++i)
        require(parts[i].columns == parts[0].columns && (i + 1 == parts.size() || parts[i].rows % kBlockRows == 0),
                "projections do not fit each other");
    return Stack(std::move(parts));
}

struct AttentionHolder {
    AttentionLayer layer;
    std::vector<nb::object> keep;

    using Floats = std::optional<Input<float, 1>>;

    AttentionHolder(Input<float, 1> norm, nb::object query_key_value, Floats query_norm, Floats key_norm, nb::object output,
                    int64_t heads, int64_t kv_heads, int64_t head_dim, float epsilon, Floats projection_bias, Floats output_bias,
                    Floats sinks, int64_t window, std::optional<float> scale) {
        const Stack in = stack_of(query_key_value);
        const Matrix& out = nb::cast<MatrixHolder&>(output).matrix;
        require(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, "heads must be a multiple of kv_heads");
        require(heads <= INT_MAX && head_dim > 0 && head_dim % 16 == 0 && head_dim <= 1024,
                "head_dim must be a multiple of 16, at most 1024");
        require(in.rows == (heads + 2 * kv_heads) * head_dim && out.columns == heads * head_dim, "projections do not fit heads");
        require(in.whole() && out.whole() && side(norm, 0) == in.columns && out.rows == in.columns, "hidden sizes differ");
        require(query_norm.has_value() == key_norm.has_value(), "give both head norms or none");
        const bool full = query_norm && side(*query_norm, 0) != head_dim;
        require(!query_norm || (side(*query_norm, 0) == (full ? heads : 1) * head_dim &&
                                side(*key_norm, 0) == (full ? kv_heads : 1) * head_dim),
                "norms of queries and keys fit neither head_dim nor all heads");
        auto fits = [](const Floats& array, int64_t size) { return !array || side(*array, 0) == size; };
        require(fits(projection_bias, in.rows) && fits(output_bias, out.rows) && fits(sinks, heads), "biases or sinks do not fit");
        auto data = [](const Floats& array) { return array ? array->data() : nullptr; };
        layer = {norm.data(), data(query_norm), data(key_norm), in, out, narrow(heads, kTooLarge), narrow(kv_heads, kTooLarge),
                 narrow(head_dim, kTooLarge), epsilon, scale ? *scale : 1.0f / std::sqrt(static_cast<float>(head_dim)),
                 data(projection_bias), data(output_bias), data(sinks), narrow(window, "a window is a number of positions"), full};
        keep = {nb::cast(norm), query_key_value, output};
        for (const Floats& array : {query_norm, key_norm, projection_bias, output_bias, sinks})
            if (array) keep.push_back(nb::cast(*array));
    }
};

struct LatentHolder {
    LatentLayer layer;
    std::vector<nb::object> keep;

    LatentHolder(Input<float, 1> norm, nb::object query_latent, std::optional<Input<float, 1>> query_norm, nb::object query_up,
                 Input<float, 1> latent_norm, nb::object key_up, nb::object value_up, nb::object output, int64_t heads, int64_t plain,
                 int64_t rotary, float epsilon, float latent_epsilon, float scale, bool interleaved) {
        auto matrix = [](const nb::object& object) { return nb::cast<MatrixHolder&>(object).matrix; };
        const Stack in = stack_of(query_latent);
        const Matrix key = matrix(key_up), value = matrix(value_up), out = matrix(output);
        const int64_t rank = side(latent_norm, 0);
        require(heads > 0 && heads <= 1 << 16 && plain > 0 && plain <= 1 << 16 && rank > 0 && rank % 16 == 0 && rotary > 0 &&
                    rotary % 16 == 0 && rotary <= 1 << 16 && rank + rotary <= 1 << 16,
                "rank and rotary dimensions must be multiples of 16");
        require(key.columns == plain && key.rows == heads * rank && value.columns == rank && value.rows % (16 * heads) == 0 &&
                    out.columns == value.rows,
                "projections do not fit heads");
        require(query_up.is_none() == !query_norm, "give both a norm and a second matrix of queries, or neither");
        const Matrix up = query_norm ? matrix(query_up) : Matrix{};
        const int64_t queries = heads * (plain + rotary), first = query_norm ? side(*query_norm, 0) : queries;
        require(in.rows == first + rank + rotary && (!query_norm || (up.rows == queries && up.columns == first && up.whole())),
                "projections do not fit heads");
        require(in.whole() && key.whole() && value.whole() && out.whole() && side(norm, 0) == in.columns && out.rows == in.columns,
                "hidden sizes differ");
        layer = {norm.data(), query_norm ? query_norm->data() : nullptr, latent_norm.data(), in, up, key, value, out,
                 narrow(heads, kTooLarge), narrow(rank, kTooLarge), narrow(plain, kTooLarge), narrow(rotary, kTooLarge),
                 narrow(value.rows / heads, kTooLarge), epsilon, latent_epsilon, scale, interleaved};
        keep = {nb::cast(norm), query_latent, query_up, nb::cast(latent_norm), key_up, value_up, output};
        if (query_norm) keep.push_back(nb::cast(*query_norm));
    }
};

struct RouterHolder {
    RouterLayer layer;
    Input<float, 1> norm;
    Input<float, 2> router;
    std::optional<Input<float, 1>> bias, selection_bias;

    RouterHolder(Input<float, 1> norm_, Input<float, 2> router_, int64_t top_k, float epsilon, bool normalize,
                 std::optional<Input<float, 1>> bias_, bool sigmoid, std::optional<Input<float, 1>> selection_bias_, float scaling,
                 int64_t groups, int64_t kept_groups, bool best_two)
        : norm(norm_), router(router_), bias(bias_), selection_bias(selection_bias_) {
        require(side(norm, 0) == side(router, 1) && top_k > 0 && top_k <= side(router, 0) &&
                    (!bias || side(*bias, 0) == side(router, 0)) &&
                    (!selection_bias || side(*selection_bias, 0) == side(router, 0)),
                "router does not fit");
        require(groups > 0 && side(router, 0) % groups == 0 && kept_groups > 0 && kept_groups <= groups &&
                    side(router, 0) / groups * kept_groups >= top_k && (!best_two || side(router, 0) / groups >= 2),
                "groups of experts do not fit");
        layer = {norm.data(), router.data(), bias ? bias->data() : nullptr,
                 selection_bias ? selection_bias->data() : nullptr, narrow(side(router, 0), kTooLarge), narrow(side(router, 1), kTooLarge),
                 narrow(top_k, kTooLarge), epsilon, normalize, sigmoid, scaling, narrow(groups, kTooLarge),
                 narrow(kept_groups, kTooLarge), best_two};
    }
};

// The norm of a dense feed-forward layer.
struct NormHolder {
    Input<float, 1> norm;
    float epsilon;
};

struct CacheHolder {
    Cache cache;
    Array<uint16_t, 6> keys;
    Array<uint16_t, 5> values;
    Input<int32_t, 2> table;
    std::optional<Input<int32_t, 2>> places;

    CacheHolder(Array<uint16_t, 6> keys_, Array<uint16_t, 5> values_, Input<int32_t, 2> table_,
                std::optional<Input<int32_t, 2>> places_)
        : keys(keys_), values(values_), table(table_), places(places_) {
        auto of = [](const auto& array, int axis) { return narrow(side(array, axis), kTooLarge); };
        cache = {keys.data(), values.data(), table.data(), of(values, 0), of(values, 1), of(values, 2),
                 of(keys, 4), of(values, 4), of(values, 3), of(table, 0), of(table, 1), nullptr, of(values, 1), 1};
        require(keys.shape(0) == values.shape(0) && keys.shape(1) == values.shape(1) && keys.shape(2) == values.shape(2) &&
                    keys.shape(3) * 16 == values.shape(3) && keys.shape(5) == 16 &&
                    values.shape(3) > 0,
                "keys and values do not fit");
        if (!places) return;
        require(places->shape(0) > 0 && places->shape(1) == 2, "places are (layers, 2)");
        cache.places = places->data();
        cache.model_layers = of(*places, 0);
        for (int layer = 0; layer < cache.model_layers; ++layer) {
            const int group = cache.group(layer), place = cache.place(layer);
            require(group >= 0 && group < cache.model_layers && place >= 0 && place < cache.layers, "a layer's place is out of range");
            cache.groups = std::max(cache.groups, group + 1);
        }
        require(cache.slot_pages % cache.groups == 0, "a stretch has a page for every group");
        cache.slot_pages /= cache.groups;
    }
};

// See ExpertTerms.
struct TermsHolder {
    ExpertTerms terms;
    Input<float, 2> gate, up, down;

    TermsHolder(Input<float, 2> gate_, Input<float, 2> up_, Input<float, 2> down_, float alpha, float limit)
        : gate(gate_), up(up_), down(down_) {
        require(gate.shape(0) == up.shape(0) && gate.shape(1) == up.shape(1) && gate.shape(0) == down.shape(0), "biases do not fit");
        terms = {gate.data(), up.data(), down.data(), alpha, limit};
    }
    bool fit(const ExpertShape& shape, int64_t experts) const {
        return side(gate, 0) == experts && side(gate, 1) == shape.width && side(down, 1) == shape.hidden;
    }
};

// `msb`, `lsb`: offsets of the sections in the records of so many bytes.
struct ExpertHolder {
    ExpertShape shape;
    ExpertHolder(int64_t hidden, int64_t width, std::vector<int64_t> msb, std::vector<int64_t> lsb, int64_t msb_bytes,
                 int64_t lsb_bytes) {
        require(hidden > 0 && width > 0 && msb.size() == 6 && lsb.size() == 3, "an expert has 6 MSB and 3 LSB sections");
        auto nested = [&](int i) { return Projection{Format::nested8, msb[i], lsb[i], msb[3 + i], 0, 0}; };
        shape = {narrow(hidden, kTooLarge), narrow(width, kTooLarge), nested(0), nested(1), nested(2)};
        check(msb_bytes, lsb_bytes);
    }

    // `offsets`: of hi, lo, scales, minima, steps of gate, up and down projection, 0 where a format has none.
    ExpertHolder(int64_t hidden, int64_t width, const std::vector<std::string>& formats,
                 const std::vector<std::vector<int64_t>>& offsets, int64_t msb_bytes, int64_t lsb_bytes) {
        require(hidden > 0 && width > 0 && formats.size() == 3 && offsets.size() == 3, "an expert has three projections");
        auto one = [&](int i) {
            require(offsets[i].size() == 5, "a projection has five sections at most");
            return Projection{format_named(formats[i]), offsets[i][0], offsets[i][1], offsets[i][2], offsets[i][3], offsets[i][4]};
        };
        shape = {narrow(hidden, kTooLarge), narrow(width, kTooLarge), one(0), one(1), one(2)};
        check(msb_bytes, lsb_bytes);
    }

  private:
    void check(int64_t msb_bytes, int64_t lsb_bytes) const {
        auto lies = [](int64_t at, int64_t bytes, int64_t end) { return at >= 0 && bytes <= end && at <= end - bytes; };
        auto fits = [&](const Projection& one, int64_t rows, int64_t columns) {
            const FormatShape& format = shape_of(one.format);
            const int64_t blocks = groups_of(rows, kBlockRows), groups = groups_of(columns, kGroup);
            auto halves = [&](int span) { return span ? blocks * groups_of(groups, span) * 2 * kBlockRows : 0; };
            return lies(one.hi, blocks * groups * kGroupBytes, msb_bytes) && lies(one.lo, blocks * groups * format.lo, lsb_bytes) &&
                   lies(one.scales, halves(format.scales), msb_bytes) && lies(one.minima, halves(format.minima), msb_bytes) &&
                   lies(one.steps, blocks * groups * format.steps, msb_bytes);
        };
        require(fits(shape.gate, shape.width, shape.hidden) && fits(shape.up, shape.width, shape.hidden) &&
                    fits(shape.down, shape.hidden, shape.width),
                "a section of an expert lies outside its record");
    }
};

inline int integral_offset(double offset) {
    require(offset >= 0 && offset <= 16 && offset == static_cast<int>(offset),
            "native kernels draft with an integral offset within 0..16; use the reference backend");
    return static_cast<int>(offset);
}

// Throws where a call's places or cache do not fit `layers` layers from `first_layer` of the cache.
void check_attention(const AttentionShape& a, const Cache& c, int64_t first_layer, int64_t layers, const Array<float, 2>& x,
                     const Input<int32_t, 1>& slots, const Input<int32_t, 1>& positions, const Input<float, 2>& cosine,
                     const Input<float, 2>& sine);

// Whether `size` experts per token can be chosen of those that a router ranks; `allowed` may be null.
void check_choice(const RouterLayer& r, const uint8_t* allowed, int64_t size, int64_t ranks);

}  // namespace elmoe
