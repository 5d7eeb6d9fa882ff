// The operations of elmoe.bitslice on validated pointers: phases over the thread pool, kernels from the chosen table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.hpp"
#include "pool.hpp"

namespace elmoe {

// Becomes elmoe.errors.NumericsError.
struct NumericsFailure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

const Kernels& kernels();                       // the table in use
bool set_variant(const std::string& name);      // "" chooses the best; false if this processor lacks it
std::vector<std::string> available_variants();  // best first

// Round to nearest, no flushing of subnormals, for the time of an operation; restores the caller's control word. Also
// holds the pool: one operation runs at a time.
class Operation {
  public:
    Operation();
    ~Operation();

  private:
    std::unique_lock<std::mutex> lock_;
    unsigned control_ = 0;
};

// Scratch memory that lives until the next operation; grows, never shrinks. Alignment 64.
class Scratch {
  public:
    template <class T>
    T* get(size_t count) {
        return static_cast<T*>(bytes(count * sizeof(T)));
    }
    void reset();

  private:
    void* bytes(size_t size);
    struct Free {
        void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{64}); }
    };
    struct Chunk {
        std::unique_ptr<std::byte[], Free> data;
        size_t size;
    };
    std::vector<Chunk> chunks_;
    size_t chunk_ = 0, used_ = 0;
};
Scratch& scratch();

// Tiles for `count` tokens in scratch memory, their contents not yet set; `largest` 0 is the kernels' largest. `extra`: whether
// a matrix that is not nested8 takes them.
std::vector<Tile> allocate_tiles(int count, int groups, bool extra, int largest = 0);
// Quantised rows of x (count, columns). Throws NumericsFailure on NaN or infinity.
std::vector<Tile> quantize_rows(const float* x, int count, int columns, Factors factors, bool extra, int largest = 0);
// A draft puts `offset` below the upper 4 of 8 bits, and a quarter of it below those of 6.
inline Factors correction_factors(bool draft, int offset) { return draft ? Factors{offset - 128, offset / 4 - 32} : kFull; }

// y (count, stride) for all blocks of a matrix, over the pool.
void matmul_all(const Matrix& matrix, bool draft, const std::vector<Tile>& tiles, float* y, int64_t stride);
// y (count, rows) without padding.
void matmul_exact(const Matrix& matrix, bool draft, int offset, const float* x, int count, float* y);

// Matrices of several formats one below the other; all but the last fill whole blocks.
struct Stack {
    std::vector<Matrix> parts;
    int rows = 0, columns = 0;
    explicit Stack(std::vector<Matrix> all = {});
    int blocks() const { return ceil_div(rows, kBlockRows); }
    bool packed() const;
    bool whole() const;
};
void matmul_all(const Stack& stack, const std::vector<Tile>& tiles, float* y, int64_t stride);

// What decides whether a call's places, tables and cache fit an attention. `key_dim`, `value_dim`: values of a position and head
// in the cache's two arrays; `rotated`: dimensions that the tables may turn at most. A window of 0 is none.
struct AttentionShape {
    int hidden, kv_heads, key_dim, value_dim, rotated, window;
    int first_seen(int position) const { return window && position >= window ? position + 1 - window : 0; }
    bool same_cache(const AttentionShape& other) const {
        return kv_heads == other.kv_heads && key_dim == other.key_dim && value_dim == other.value_dim;
    }
};

// `query_norm`, `key_norm` may be null, as the biases and sinks; `full_norms`: over all heads together. `scale`: of the scores.
struct AttentionLayer {
    const float *norm, *query_norm, *key_norm;
    Stack query_key_value;
    Matrix output;
    int heads, kv_heads, head_dim;
    float epsilon, scale;
    const float *projection_bias, *output_bias, *sinks;
    int window;
    bool full_norms;
    AttentionShape shape() const { return {query_key_value.columns, kv_heads, head_dim, head_dim, head_dim, window}; }
};

// See elmoe.bitslice.LatentWeights; `query_norm` is null, and `query_up` has no rows, where queries are one matrix.
struct LatentLayer {
    const float *norm, *query_norm, *latent_norm;
    Stack query_latent;
    Matrix query_up, key_up, value_up, output;
    int heads, rank, plain, rotary, value_dim;
    float epsilon, latent_epsilon, scale;
    bool interleaved;
    int key_dim() const { return rank + rotary; }
    AttentionShape shape() const { return {query_latent.columns, 1, 0, key_dim(), rotary, 0}; }
};

// `slot_pages`: stretches of a slot, each with a page for every group. `places` (model_layers, 2): the group of a layer and its
// place in a page; null: one group, a layer is in its own place.
struct Cache {
    uint16_t *keys, *values;  // (pages, layers, kv_heads, page_positions * key_dim), and with value_dim
    const int32_t* table;     // (slots, slot_pages, groups)
    int pages, layers, kv_heads, key_dim, value_dim, page_positions, slots, slot_pages;
    const int32_t* places;
    int model_layers, groups;
    int group(int64_t layer) const { return places ? places[2 * layer] : 0; }
    int place(int64_t layer) const { return places ? places[2 * layer + 1] : static_cast<int>(layer); }
    // In which (page, layer, kv head) the cells of a stretch of a slot are, counted through the arrays.
    int64_t block(int slot, int stretch, int64_t layer, int head) const {
        const int64_t page = table[(static_cast<int64_t>(slot) * slot_pages + stretch) * groups + group(layer)];
        return (page * layers + place(layer)) * kv_heads + head;
    }
};

// Where the tokens of a call are, and the rotary tables (positions, pairs): 2 * pairs dimensions of a head are rotated. A chain: a token is in the cell of its
// position, and sees the cells before it.
struct Places {
    int tokens;
    const int32_t *slots, *positions;
    const float *cosine, *sine;
    int pairs;
};

// `layer_index` is the layer of the cache.
void latent_block(const LatentLayer& layer, float* x, const Places& places, const Cache& cache, int layer_index);
void attention_block(const AttentionLayer& layer, float* x, const Places& places, const Cache& cache, int layer_index);

struct RouterLayer {
    const float *norm, *router, *bias, *selection_bias;  // the biases may be null
    int experts, hidden, top_k;
    float epsilon;
    bool normalize, sigmoid;
    float scaling;
    int groups, kept_groups;  // experts are chosen from the best groups; 1 and 1: from all
    bool best_two;            // a group is worth its best two experts, not its best one
};

// `size` experts are chosen for a token; there is room for `stride` of them, the rest is set to -1 and weight 0.
struct RoutingOut {
    float* hidden;
    int32_t* ranked;
    float* scores;
    int ranks;
    int32_t* experts;
    float* weights;
    int size, stride;
};

void route(const RouterLayer& layer, const float* x, int tokens, const uint8_t* allowed, bool rescale, const RoutingOut& out);

// Where the sections of a projection lie: `lo` in the LSB record, all others in the MSB record.
struct Projection {
    Format format;
    int64_t hi, lo, scales, minima, steps;
    bool packed() const { return format != Format::nested8; }
};

struct ExpertShape {
    int hidden, width;
    Projection gate, up, down;
    bool two_slices() const { return shape_of(gate.format).lo || shape_of(up.format).lo || shape_of(down.format).lo; }
};

// Biases of all experts, gate and up (experts, width), down (experts, hidden), and the constants of the clamped SwiGLU.
struct ExpertTerms {
    const float *gate, *up, *down;
    float alpha, limit;
};

// Which experts run on which tokens.
struct ExpertCall {
    const ExpertShape& shape;
    const int64_t* addresses;  // (experts, 2): MSB and LSB records
    int experts;
    const float* hidden;     // (tokens, shape.hidden)
    const int32_t* ids;      // (tokens, k), -1 is none
    const float* weights;    // (tokens, k)
    int tokens, k;
    bool draft;
    int offset;
    bool chain;  // x is the sum over lower ids so far, and is continued
    const ExpertTerms* terms = nullptr;  // null: no biases, plain SwiGLU
};
void expert_ffn(const ExpertCall& call, float* x);

// An expert that every token uses, at full precision; its weight is the sigmoid of a product with `gate`, or 1 without.
struct SharedExpert {
    ExpertShape expert;
    const int64_t* addresses;
    const float* gate;
};

// A layer whose experts lie at `addresses` (experts, 2), which are read anew in every call. A dense layer has one expert and no
// router but for the norm, the hidden size and epsilon.
struct Layer {
    AttentionLayer attention;
    const LatentLayer* latent;  // in place of `attention`, if not null
    AttentionShape shape;
    RouterLayer router;
    bool dense;
    ExpertShape expert;
    const int64_t* addresses;
    const ExpertTerms* terms;
    const SharedExpert* shared;
    int experts() const { return dense ? 1 : router.experts; }
};

// Experts that come and go: asked for one stretch of a row's experts after the other, until there is none.
struct ExpertFeed {
    virtual const std::vector<int>& next() = 0;

  protected:
    ~ExpertFeed() = default;
};

// What a draft changes: `allowed` (rows, experts) is null in a target pass; `coarse` reads MSB slices only.
struct DraftChoice {
    const uint8_t* allowed;
    bool rescale, coarse;
    int offset;
};

constexpr int kTimes = 5;  // attention begins, routing begins, routing ends, experts begin, experts end

// Who takes part in a pass beside its tokens; all may be null.
struct Company {
    std::function<void(int)> routed;  // told of a row when it is routed; may change its routing
    ExpertFeed* feed;
    double* times;  // (layers, kTimes), seconds on the steady clock
};

// Attention, routing and experts of all layers: what the operations do one after the other. The arrays of `out` have a leading
// axis of rows, the layers with a router; its `hidden` and `size` are not used.
void forward(const std::vector<Layer>& layers, float* x, const Places& places, const Cache& cache, const DraftChoice& draft,
             const RoutingOut& out, const Company& company);

void embed(const Matrix& matrix, const int32_t* tokens, int count, float* out);

struct SamplingParameters {
    double temperature, top_p, min_p;
    int64_t top_k;
    uint64_t seed, choice;
};
struct Sampled {
    int64_t token;
    double confidence, logprob;
};
// `adjusted`, null or as many values, is drawn from in place of the logits; -inf excludes an id, one at least is finite.
Sampled sample(const float* logits, int vocabulary, const SamplingParameters& parameters, int64_t position,
               const float* adjusted = nullptr);

uint64_t stream_read(const uint8_t* data, int64_t size);

}  // namespace elmoe
