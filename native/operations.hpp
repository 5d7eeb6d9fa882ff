// The operations of elmoe.bitslice on validated pointers: phases over the thread pool, kernels from the chosen table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
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

// Tiles for `count` tokens in scratch memory, their contents not yet set; `largest` 0 is the kernels' largest.
std::vector<Tile> allocate_tiles(int count, int groups, int largest = 0);
// Quantised rows of x (count, columns). Throws NumericsFailure on NaN or infinity.
std::vector<Tile> quantize_rows(const float* x, int count, int columns, int factor, int largest = 0);
inline int correction_factor(bool draft, int offset) { return draft ? offset - 128 : -128; }

// y (count, stride) for all blocks of a matrix, over the pool.
void matmul_all(const Matrix& matrix, bool draft, const std::vector<Tile>& tiles, float* y, int64_t stride);
// y (count, rows) without padding.
void matmul_exact(const Matrix& matrix, bool draft, int offset, const float* x, int count, float* y);

struct AttentionLayer {
    const float *norm, *query_norm, *key_norm;  // query_norm, key_norm may be null
    Matrix query_key_value, output;
    int heads, kv_heads, head_dim;
    float epsilon;
};

struct Cache {
    uint16_t *keys, *values;  // (pages, layers, kv_heads, page_positions * head_dim)
    const int32_t* table;     // (slots, slot_pages)
    int pages, layers, kv_heads, head_dim, page_positions, slots, slot_pages;
};

void attention_block(const AttentionLayer& layer, float* x, int tokens, const Cache& cache, int layer_index,
                     const int32_t* slots, const int32_t* positions, const float* cosine, const float* sine);

struct RouterLayer {
    const float *norm, *router;
    int experts, hidden, top_k;
    float epsilon;
    bool normalize;
};

struct RoutingOut {
    float* hidden;
    int32_t* ranked;
    float* scores;
    int ranks;
    int32_t* experts;
    float* weights;
    int size;
};

void route(const RouterLayer& layer, const float* x, int tokens, const uint8_t* allowed, bool rescale, const RoutingOut& out);

struct ExpertShape {
    int hidden, width;
    int64_t gate_hi, up_hi, down_hi, gate_scales, up_scales, down_scales;  // offsets in the MSB record
    int64_t gate_lo, up_lo, down_lo;                                      // offsets in the LSB record
};

void expert_ffn(const ExpertShape& shape, const int64_t* addresses, int experts, const float* hidden, const int32_t* ids,
                const float* weights, int tokens, int k, float* x, bool draft, int offset, bool chain);

// A layer whose experts lie at `addresses`.
struct Layer {
    AttentionLayer attention;
    RouterLayer router;
    ExpertShape expert;
    const int64_t* addresses;  // (router.experts, 2)
};

// Where experts come from that do not all lie in memory: told that a layer is routed, then asked for one stretch of experts
// after the other, until there is none.
struct ExpertFeed {
    virtual void routed(int layer) = 0;
    virtual const std::vector<int>& next() = 0;

  protected:
    ~ExpertFeed() = default;
};

// Attention, routing and experts of consecutive layers: what the three operations do one after the other. `allowed` (layers,
// experts) may be null; the arrays of `out` have a leading axis of layers, its `hidden` is not used. `feed` is null where all
// experts lie in memory.
void forward(const std::vector<Layer>& layers, float* x, int tokens, const Cache& cache, int first_layer, const int32_t* slots,
             const int32_t* positions, const float* cosine, const float* sine, const uint8_t* allowed, bool rescale, bool draft,
             int offset, const RoutingOut& out, ExpertFeed* feed);

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
Sampled sample(const float* logits, int vocabulary, const SamplingParameters& parameters, int64_t position);

uint64_t stream_read(const uint8_t* data, int64_t size);

}  // namespace elmoe
