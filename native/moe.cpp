// The experts of a layer. Their weights are read once per call, whatever the number of tokens (expert-major).
//
// For a token with normed input h and experts e of weight w[e]:
//     y[e] = down[e] * (silu(gate[e] * h) * (up[e] * h)),    x = x + (((0 + w[e1] y[e1]) + w[e2] y[e2]) + ...),  e1 < e2 < ...
// or, with terms, a bias behind each of the three products and a clamped SwiGLU.
// Each product has integer dots of groups of 32 inputs, joined by one fp32 chain over ascending groups (see kernels.inl and
// formats.inl, which bound the integers). The sum over experts is one fp32 chain in ascending id from zero, multiply then add,
// and is added to x at the end; `chain` continues it instead, so that a layer may be computed in stretches of experts.
#include <algorithm>
#include <atomic>

#include "operations.hpp"

namespace elmoe {

namespace {
struct Pair {
    int token;
    float weight;
};

// The (token, weight) pairs of a call by ascending expert, then by token; those of expert e are start[e] to start[e + 1].
struct Pairs {
    std::vector<int> start;
    std::vector<Pair> all;
};

// An expert with tokens: its id, its matrices, which pairs are its own, and its inputs and inner activations in tiles.
struct Active {
    int id;
    Matrix gate, up, down;
    int first, count;
    std::vector<Tile> inputs, inner;
};

Pairs pairs_by_expert(const ExpertCall& call) {
    const int experts = call.experts, tokens = call.tokens, k = call.k;
    const int32_t* id = call.ids;
    const float* weight = call.weights;
    Pairs pairs;
    std::vector<int>& start = pairs.start;
    start.assign(experts + 1, 0);
    for (int64_t i = 0; i < static_cast<int64_t>(tokens) * k; ++i)
        if (id[i] >= 0) ++start[id[i] + 1];
    for (int e = 0; e < experts; ++e) start[e + 1] += start[e];
    pairs.all.resize(start[experts]);
    std::vector<int> next(start.begin(), start.end() - 1);
    for (int t = 0; t < tokens; ++t)
        for (int i = 0; i < k; ++i, ++id, ++weight)
            if (*id >= 0) pairs.all[next[*id]++] = {t, *weight};
    return pairs;
}

std::vector<Active> active_experts(const ExpertCall& call, const std::vector<int>& start) {
    const ExpertShape shape = call.shape;
    const bool draft = call.draft, missing_allowed = draft || !shape.two_slices();
    std::vector<Active> active;
    for (int e = 0; e < call.experts; ++e) {
        const int count = start[e + 1] - start[e];
        if (!count) continue;
        const auto* msb = reinterpret_cast<const uint8_t*>(call.addresses[2 * e]);
        const auto* lsb = reinterpret_cast<const uint8_t*>(call.addresses[2 * e + 1]);
        if (!msb || (!missing_allowed && !lsb))
            throw NumericsFailure("expert " + std::to_string(e) + ": the " + (msb ? "LSB" : "MSB") + " slice is not resident");
        auto matrix = [&](int rows, int columns, const Projection& at) {
            const uint8_t* lo = draft || !shape_of(at.format).lo ? nullptr : lsb + at.lo;
            return Matrix{rows, columns, msb + at.hi, lo, reinterpret_cast<const uint16_t*>(msb + at.scales), at.format,
                          reinterpret_cast<const uint16_t*>(msb + at.minima), msb + at.steps};
        };
        active.push_back({e, matrix(shape.width, shape.hidden, shape.gate), matrix(shape.width, shape.hidden, shape.up),
                          matrix(shape.hidden, shape.width, shape.down), start[e], count, {},
                          allocate_tiles(count, ceil_div(shape.width, kGroup), shape.down.packed())});
    }
    return active;
}

// Every token is quantised once, then copied into the tiles of its experts.
void gather_inputs(const ExpertCall& call, const Pairs& pairs, std::vector<Active>& active) {
    const int groups = ceil_div(call.shape.hidden, kGroup);
    const bool extra = call.shape.gate.packed() || call.shape.up.packed();
    const std::vector<Tile> rows =
        quantize_rows(call.hidden, call.tokens, call.shape.hidden, correction_factors(call.draft, call.offset), extra, 1);
    for (Active& expert : active) {
        const Pair* pair = &pairs.all[expert.first];
        if (expert.count == 1) {
            expert.inputs = {rows[pair->token]};
            continue;
        }
        expert.inputs = allocate_tiles(expert.count, groups, extra);
        for (const Tile& tile : expert.inputs)
            for (int t = 0; t < tile.tokens; ++t, ++pair) {
                const Tile& row = rows[pair->token];
                for (int g = 0; g < groups; ++g) {
                    const int64_t at = static_cast<int64_t>(g) * tile.tokens + t;
                    std::memcpy(tile.codes + at * kGroup, row.codes + static_cast<int64_t>(g) * kGroup, kGroup);
                    tile.scales[at] = row.scales[g];
                    tile.correction[at] = row.correction[g];
                    if (extra) tile.extra[at] = row.extra[g];
                }
            }
    }
}

// Gate and up of a stretch of inner units per task; whoever finishes an expert quantises its inner activations.
void gate_and_up(const ExpertCall& call, const std::vector<Active>& active, size_t pairs) {
    const Kernels& k = kernels();
    Pool& pool = Pool::instance();
    const bool draft = call.draft;
    const int width = call.shape.width, blocks = ceil_div(width, kBlockRows), count = static_cast<int>(active.size());
    const Factors factors = correction_factors(draft, call.offset);
    const int64_t stride = static_cast<int64_t>(blocks) * kBlockRows;
    auto* gate = scratch().get<float>(pairs * stride);
    auto* up = scratch().get<float>(pairs * stride);
    const int64_t block_bytes = active[0].gate.block_bytes() + active[0].up.block_bytes();
    const int wanted = ceil_div(4 * pool.threads(), count);
    const int per_task =
        std::min(blocks, static_cast<int>(std::max<int64_t>(ceil_div(blocks, wanted), (32 << 10) / block_bytes + 1)));
    const int per_expert = ceil_div(blocks, per_task);
    std::vector<std::atomic<int>> left(count);
    for (auto& one : left) one = per_expert;
    std::atomic<bool> finite{true};
    pool.run(per_expert * count, [&](int task, int) {
        const Active& expert = active[task / per_expert];
        const int first = task % per_expert * per_task, last = std::min(blocks, first + per_task);
        const int64_t at = expert.first * stride;
        const int tiles = static_cast<int>(expert.inputs.size());
        k.matmul(expert.gate, draft, first, last, expert.inputs.data(), tiles, gate + at, stride);
        k.matmul(expert.up, draft, first, last, expert.inputs.data(), tiles, up + at, stride);
        for (int i = 0; i < expert.count; ++i) {
            const int64_t row = at + i * stride + first * kBlockRows;
            if (call.terms) {
                const int64_t bias = static_cast<int64_t>(expert.id) * width + first * kBlockRows;
                k.clamped_swiglu(gate + row, up + row, call.terms->gate + bias, call.terms->up + bias, call.terms->alpha,
                                 call.terms->limit, std::min(width, last * kBlockRows) - first * kBlockRows);
            } else {
                k.swiglu(gate + row, up + row, gate + row, (last - first) * kBlockRows);
            }
        }
        if (left[task / per_expert].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
        const float* row = gate + at;
        for (const Tile& tile : expert.inner)
            for (int t = 0; t < tile.tokens; ++t, row += stride)
                if (!k.quantize(row, width, tile, t, factors)) finite = false;
    });
    if (!finite) throw NumericsFailure("activations hold NaN or infinite values");
}

// A stretch of outputs per task, over all experts in ascending order, so that the combination needs no further pass.
void down_and_combine(const ExpertCall& call, const Pairs& pairs, const std::vector<Active>& active, float* x) {
    const Kernels& k = kernels();
    Pool& pool = Pool::instance();
    const bool draft = call.draft, chain = call.chain;
    const int hidden = call.shape.hidden, tokens = call.tokens, blocks = ceil_div(hidden, kBlockRows);
    const int64_t strip = active[0].down.block_bytes() * static_cast<int64_t>(active.size());
    const int per_task = std::min(
        blocks, static_cast<int>(std::max<int64_t>(ceil_div(blocks, 4 * pool.threads()), (16 << 10) / strip + 1)));
    const size_t width = static_cast<size_t>(per_task) * kBlockRows;
    int most = 0;
    for (const Active& expert : active) most = std::max(most, expert.count);
    auto* totals = scratch().get<float>(pool.threads() * tokens * width);
    auto* downs = scratch().get<float>(pool.threads() * most * width);
    pool.run(ceil_div(blocks, per_task), [&](int task, int thread) {
        const int first = task * per_task, last = std::min(blocks, first + per_task);
        const int size = std::min<int64_t>(hidden, static_cast<int64_t>(last) * kBlockRows) - first * kBlockRows;
        float* total = totals + thread * tokens * width;
        float* down = downs + thread * most * width;
        for (int t = 0; t < tokens; ++t) {
            const float* row = x + static_cast<int64_t>(t) * hidden + first * kBlockRows;
            if (chain)
                std::copy(row, row + size, total + t * width);
            else
                std::fill(total + t * width, total + t * width + size, 0.0f);
        }
        for (const Active& expert : active) {
            k.matmul(expert.down, draft, first, last, expert.inner.data(), static_cast<int>(expert.inner.size()),
                     down - first * kBlockRows, static_cast<int64_t>(width));
            for (int i = 0; i < expert.count; ++i) {
                const Pair& pair = pairs.all[expert.first + i];
                if (call.terms)
                    k.add(down + i * width, call.terms->down + static_cast<int64_t>(expert.id) * hidden + first * kBlockRows, size);
                k.multiply_add(total + pair.token * width, pair.weight, down + i * width, size);
            }
        }
        for (int t = 0; t < tokens; ++t) {
            float* row = x + static_cast<int64_t>(t) * hidden + first * kBlockRows;
            const float* sum = total + t * width;
            if (chain)
                std::copy(sum, sum + size, row);
            else
                for (int i = 0; i < size; ++i) row[i] = row[i] + sum[i];
        }
    });
}
}  // namespace

void expert_ffn(const ExpertCall& call, float* x) {
    const Pairs pairs = pairs_by_expert(call);
    if (pairs.all.empty()) return;
    std::vector<Active> active = active_experts(call, pairs.start);
    gather_inputs(call, pairs, active);
    gate_and_up(call, active, pairs.all.size());
    down_and_combine(call, pairs, active, x);
}

}  // namespace elmoe
