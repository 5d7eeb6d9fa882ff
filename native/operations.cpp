// What all operations share: the choice of kernels, rounding mode, scratch, quantised rows, matmul over the pool.
//
// Work is split over rows of a matrix, never over its groups, so that a chain of kernels.inl is one thread's.
#include "operations.hpp"

#include <algorithm>
#include <atomic>
#include <new>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace elmoe {

int prefetch_ahead = 2048;

namespace {
std::vector<const Kernels*> all_kernels() {
    std::vector<const Kernels*> found;
    for (const Kernels* one : {amx_kernels(), avx512_kernels(), avx2_kernels(), portable_kernels()})
        if (one) found.push_back(one);
    return found;
}
std::atomic<const Kernels*> chosen{nullptr};
}  // namespace

const Kernels& kernels() {
    const Kernels* one = chosen.load(std::memory_order_acquire);
    if (!one) {
        one = all_kernels().front();
        chosen.store(one, std::memory_order_release);
    }
    return *one;
}

bool set_variant(const std::string& name) {
    for (const Kernels* one : all_kernels())
        if (name.empty() || name == one->name) {
            chosen.store(one, std::memory_order_release);
            return true;
        }
    return false;
}

std::vector<std::string> available_variants() {
    std::vector<std::string> names;
    for (const Kernels* one : all_kernels()) names.emplace_back(one->name);
    return names;
}

// Workers start with the default control word; only the caller's may have been changed.
Operation::Operation() : lock_(Pool::instance().lock()) {
#if defined(__x86_64__)
    control_ = _mm_getcsr();
    _mm_setcsr(0x1F80);
#endif
    scratch().reset();
}

Operation::~Operation() {
#if defined(__x86_64__)
    _mm_setcsr(control_);
#endif
}

Scratch& scratch() {
    static Scratch instance;
    return instance;
}

void Scratch::reset() {
    if (chunks_.size() > 1) {  // join the chunks, so that the next operation of this size takes one
        size_t total = 0;
        for (auto& chunk : chunks_) total += chunk.size;
        chunks_.clear();
        chunk_ = used_ = 0;
        bytes(total);
    }
    chunk_ = used_ = 0;
}

void* Scratch::bytes(size_t size) {
    size = (size + 63) & ~size_t{63};
    while (chunk_ < chunks_.size() && used_ + size > chunks_[chunk_].size) {
        ++chunk_;
        used_ = 0;
    }
    if (chunk_ == chunks_.size()) {
        const size_t least = size_t{1} << 20, capacity = size > least ? size : least;
        auto* data = static_cast<std::byte*>(::operator new[](capacity, std::align_val_t{64}));
        chunks_.push_back({std::unique_ptr<std::byte[], Free>(data), capacity});
    }
    void* result = chunks_[chunk_].data.get() + used_;
    used_ += size;
    return result;
}

std::vector<Tile> allocate_tiles(int count, int groups, bool extra, int largest) {
    if (!largest) largest = kernels().tile;
    auto* codes = scratch().get<int8_t>(static_cast<size_t>(count) * groups * kGroup);
    auto* scales = scratch().get<float>(static_cast<size_t>(count) * groups);
    auto* correction = scratch().get<int32_t>(static_cast<size_t>(count) * groups);
    auto* more = extra ? scratch().get<Extra>(static_cast<size_t>(count) * groups) : nullptr;
    if (count > largest) largest = ceil_div(count, ceil_div(count, largest));  // 17 tokens: 9 and 8, not 16 and 1
    std::vector<Tile> tiles;
    for (int first = 0; first < count; first += largest) {
        const int64_t at = static_cast<int64_t>(first) * groups;
        tiles.push_back({std::min(largest, count - first), codes + at * kGroup, scales + at, correction + at,
                         more ? more + at : nullptr});
    }
    return tiles;
}

std::vector<Tile> quantize_rows(const float* x, int count, int columns, Factors factors, bool extra, int largest) {
    std::vector<Tile> tiles = allocate_tiles(count, ceil_div(columns, kGroup), extra, largest);
    const int size = tiles.empty() ? 1 : tiles[0].tokens;
    std::atomic<bool> finite{true};
    const Kernels& k = kernels();
    auto one = [&](int i, int) {
        if (!k.quantize(x + static_cast<int64_t>(i) * columns, columns, tiles[i / size], i % size, factors)) finite = false;
    };
    if (count < 8)
        for (int i = 0; i < count; ++i) one(i, 0);
    else
        Pool::instance().run(count, one);
    if (!finite) throw NumericsFailure("activations hold NaN or infinite values");
    return tiles;
}

void matmul_all(const Matrix& matrix, bool draft, const std::vector<Tile>& tiles, float* y, int64_t stride) {
    const Kernels& k = kernels();
    const int blocks = matrix.blocks(), count = static_cast<int>(tiles.size());
    const int64_t block_bytes = matrix.block_bytes();
    // A task reads at least 32 KiB, so that claiming is cheap; there are several per thread, so that they balance.
    const int pieces = 4 * Pool::instance().threads();
    const int per_task = static_cast<int>(std::max<int64_t>(ceil_div(blocks, pieces), (32 << 10) / block_bytes + 1));
    Pool::instance().run(ceil_div(blocks, per_task), [&](int task, int) {
        const int first = task * per_task;
        k.matmul(matrix, draft, first, std::min(blocks, first + per_task), tiles.data(), count, y, stride);
    });
}

void matmul_exact(const Matrix& matrix, bool draft, int offset, const float* x, int count, float* y) {
    auto rows = quantize_rows(x, count, matrix.columns, correction_factors(draft, offset), matrix.packed());
    if (matrix.rows % kBlockRows == 0) return matmul_all(matrix, draft, rows, y, matrix.rows);
    const int64_t stride = static_cast<int64_t>(matrix.blocks()) * kBlockRows;
    auto* padded = scratch().get<float>(count * stride);
    matmul_all(matrix, draft, rows, padded, stride);
    for (int i = 0; i < count; ++i) std::memcpy(y + static_cast<int64_t>(i) * matrix.rows, padded + i * stride, 4 * matrix.rows);
}

Stack::Stack(std::vector<Matrix> all) : parts(std::move(all)) {
    for (const Matrix& part : parts) rows += part.rows, columns = part.columns;
}

bool Stack::packed() const {
    return std::any_of(parts.begin(), parts.end(), [](const Matrix& part) { return part.packed(); });
}

bool Stack::whole() const {
    return std::all_of(parts.begin(), parts.end(), [](const Matrix& part) { return part.whole(); });
}

void matmul_all(const Stack& stack, const std::vector<Tile>& tiles, float* y, int64_t stride) {
    for (const Matrix& part : stack.parts) {
        matmul_all(part, false, tiles, y, stride);
        y += part.rows;
    }
}

void embed(const Matrix& matrix, const int32_t* tokens, int count, float* out) {
    for (int64_t i = 0; i < count; ++i) dequantize_row(matrix, tokens[i], out + i * matrix.columns);
}

uint64_t stream_read(const uint8_t* data, int64_t size) {
    // Large contiguous pieces, enough of them to balance.
    const int pieces = 16 * Pool::instance().threads();
    const int64_t each = (size / pieces + 4096) & ~int64_t{4095};
    std::atomic<uint64_t> total{0};
    const Kernels& k = kernels();
    Pool::instance().run(pieces, [&](int piece, int) {
        const int64_t first = piece * each;
        if (first < size) total += k.read(data + first, std::min(each, size - first));
    });
    return total;
}

}  // namespace elmoe
