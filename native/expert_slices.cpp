#include "expert_slices.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <string>
#include <sys/mman.h>
#include <utility>

namespace elmoe {

namespace {
constexpr int64_t kDemand = 0, kPlanned = 1;  // what a row waits for goes before what a later one will need

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kAddresses = int64_t{1} << 46;  // bytes that a process can reserve

int64_t align(int64_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
}  // namespace

ExpertArena::ExpertArena(const std::vector<int64_t>& bytes, const std::vector<int64_t>& slots) : reserved_(kHugePage) {
    for (size_t kind = 0; kind < bytes.size(); ++kind) {
        int64_t all;
        if (slots[kind] > INT32_MAX || __builtin_mul_overflow(bytes[kind], slots[kind], &all) || all > kAddresses - reserved_)
            throw std::length_error("the slots do not fit the address space");
        kinds_.push_back({bytes[kind], reserved_ - kHugePage, 0, std::vector<uint8_t>(slots[kind]), {}});
        reserved_ += align(all);  // no huge page holds slots of two kinds
    }
    memory_ = mmap(nullptr, reserved_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    madvise(memory_, reserved_, MADV_HUGEPAGE);
    const int64_t start = align(reinterpret_cast<int64_t>(memory_));
    for (Kind& kind : kinds_) kind.start += start;
}

ExpertArena::~ExpertArena() { munmap(memory_, reserved_); }

int64_t ExpertArena::capacity() const {
    int64_t bytes = 0;
    for (const auto& kind : kinds_) bytes += kind.bytes * kind.limit;
    return bytes;
}

int64_t ExpertArena::used() const {
    int64_t bytes = 0;
    for (const auto& kind : kinds_) bytes += kind.bytes * std::count(kind.used.begin(), kind.used.end(), 1);
    return bytes;
}

int ExpertArena::take(int kind) {
    if (!has_room(kind)) throw std::logic_error("the arena is full");
    const int slot = kinds_[kind].free.back();
    kinds_[kind].free.pop_back();
    kinds_[kind].used[slot] = 1;
    return slot;
}

void ExpertArena::give(int kind, int slot) {
    kinds_[kind].used[slot] = 0;
    kinds_[kind].free.push_back(slot);
}

void ExpertArena::move(int kind, int from, int to) {
    std::memcpy(reinterpret_cast<void*>(address(kind, to)), reinterpret_cast<void*>(address(kind, from)), size(kind));
    kinds_[kind].used[from] = 0;
    kinds_[kind].used[to] = 1;
}

void ExpertArena::resize(int kind, int64_t wanted) {
    Kind& one = kinds_[kind];
    const int slots = static_cast<int>(std::min<int64_t>(wanted, one.used.size()));
    if (std::count(one.used.begin() + slots, one.used.end(), 1)) throw std::logic_error("used slots do not fit the new limit");
    if (slots < one.limit)
        madvise(reinterpret_cast<void*>(address(kind, slots)), (one.limit - slots) * one.bytes, MADV_DONTNEED);
    one.limit = slots;
    one.free.clear();
    for (int slot = slots - 1; slot >= 0; --slot)
        if (!one.used[slot]) one.free.push_back(slot);
}

namespace {
ExpertArena arena_of(const std::vector<SizeClass>& classes, int experts, const std::vector<SliceRow>& rows) {
    std::vector<int64_t> bytes, slots;
    for (size_t index = 0; index < classes.size(); ++index) {
        const auto of_class = [&](const SliceRow& row) { return row.size_class == static_cast<int>(index); };
        const int64_t most = std::count_if(rows.begin(), rows.end(), of_class) * experts;
        for (int64_t size : classes[index].bytes) {
            bytes.push_back(size);
            slots.push_back(size > 0 ? most : 0);
        }
    }
    return {bytes, slots};
}
}  // namespace

ExpertSlices::ExpertSlices(ReadPool& pool, std::vector<SizeClass> classes, int experts, std::vector<SliceRow> rows, int reserve)
    : arena(arena_of(classes, experts, rows)), pool_(pool), table_(std::move(rows)), rows_(static_cast<int>(table_.size())),
      experts_(experts), reserve_(reserve), slices_(static_cast<size_t>(rows_) * experts * 2),
      plans_(2 * static_cast<size_t>(rows_)), active_(experts) {}

void ExpertSlices::resize(const std::vector<int64_t>& slots) {
    for (int row = 0; row < rows_; ++row)
        for (int expert = 0; expert < experts_; ++expert) {
            arrive(row, expert);
            let_go(row, expert);
        }
    std::vector<std::vector<int>> homes(arena.kinds());  // of slices whose slots go, lowest last
    for (int kind = 0; kind < arena.kinds(); ++kind)
        for (int slot = static_cast<int>(std::min<int64_t>(slots[kind], arena.limit(kind))) - 1; slot >= 0; --slot)
            if (!arena.is_used(kind, slot)) homes[kind].push_back(slot);
    for (int row = 0; row < rows_; ++row)
        for (int expert = 0; expert < experts_; ++expert)
            for (int kind = 0; kind < kinds(row); ++kind) {
                Slice& one = slice(row, expert, kind);
                const int place = slots_of(row, kind);
                if (one.slot < slots[place]) continue;
                if (homes[place].empty()) throw std::logic_error("residents do not fit the new limit");
                arena.move(place, one.slot, homes[place].back());
                one.slot = homes[place].back();
                table_[row].addresses[2 * expert + kind] = arena.address(place, one.slot);
                homes[place].pop_back();
            }
    for (int kind = 0; kind < arena.kinds(); ++kind) arena.resize(kind, slots[kind]);
}

void ExpertSlices::foresee(int row, const std::vector<int>& experts) {
    for (int expert : experts)
        for (int kind = 0; kind < kinds(row); ++kind) {
            Slice& one = slice(row, expert, kind);
            if (one.slot >= 0 || one.planned) continue;
            one.planned = true;
            ++planned_;
            plans_[2 * row + kind].push_back(expert);
        }
}

void ExpertSlices::begin(int row, const std::vector<int>& active) {
    row_ = row;
    std::fill(active_.begin(), active_.end(), 0);
    for (int kind : {kMsb, kLsb}) plans_[2 * row + kind].clear();  // what is not on its way by now is demanded
    demands_.clear();
    ready_.clear();
    waiting_.assign(active.begin(), active.end());
    std::vector<uint64_t> late;
    for (int expert : active) {
        active_[expert] = 1;
        for (int kind = 0; kind < kinds(row); ++kind) {
            const Slice& one = slice(row, expert, kind);
            if (one.slot < 0) demands_.push_back({expert, kind});
            if (one.ticket) late.push_back(one.ticket);
            foreseen_hits += one.planned;
        }
    }
    if (!late.empty()) pool_.hasten(late, kDemand);
}

void ExpertSlices::keep(int row, const uint8_t* msb, const uint8_t* lsb) {
    for (int expert = 0; expert < experts_; ++expert)
        for (int kind = 0; kind < kinds(row); ++kind) {
            Slice& one = slice(row, expert, kind);
            const bool stays = kind == kMsb ? msb[expert] : lsb[expert], goes = one.resident && !stays;
            one.resident = stays;
            if (goes && !is_active(row, expert)) release(row, expert, kind);
        }
}

const std::vector<int>& ExpertSlices::next() {
    if (row_ < 0) throw std::logic_error("no row was begun");
    for (int expert : ready_) let_go(row_, expert);
    if (!ready_.empty()) {
        issue();
        pump();
    }
    ready_.clear();
    if (waiting_.empty()) {
        if (planned_)  // read ahead in vain
            for (int expert = 0; expert < experts_; ++expert)
                if (!active_[expert]) {
                    arrive(row_, expert);
                    let_go(row_, expert);
                }
        row_ = -1;
        return ready_;
    }
    issue();
    while (!demands_.empty() && demands_.front().expert == waiting_.front()) {
        make_room(demands_.front());
        issue();
    }
    arrive(row_, waiting_.front());
    do {
        ready_.push_back(waiting_.front());
        waiting_.pop_front();
    } while (!waiting_.empty() && readable(waiting_.front()));
    return ready_;
}

void ExpertSlices::forget_plans() {
    if (!planned_) return;
    planned_ = 0;
    for (auto& plan : plans_) plan.clear();
    for (auto& one : slices_) one.planned = false;
}

void ExpertSlices::finish() {
    std::vector<uint64_t> tickets;
    for (auto& one : slices_)
        if (one.ticket) tickets.push_back(std::exchange(one.ticket, 0));
    pool_.wait(tickets);
}

void ExpertSlices::read(int row, Key key, int64_t priority) {
    Slice& one = slice(row, key.expert, key.kind);
    const int place = slots_of(row, key.kind);
    one.slot = arena.take(place);
    const uint64_t offset = table_[row].offsets[key.expert] + (key.kind == kLsb ? arena.size(slots_of(row, kMsb)) : 0);
    one.ticket = pool_.submit(table_[row].file, offset, arena.size(place), arena.address(place, one.slot), priority);
    ++reads;
}

void ExpertSlices::issue() {
    for (; !demands_.empty() && arena.has_room(slots_of(row_, demands_.front().kind)); demands_.pop_front())
        if (slice(row_, demands_.front().expert, demands_.front().kind).slot < 0) read(row_, demands_.front(), kDemand);
}

void ExpertSlices::pump() {
    int open = 0;  // kinds of slots with room
    for (int kind = 0; kind < arena.kinds(); ++kind) open += arena.has_room(kind, reserve_);
    for (int row = 0; row < rows_ && open > 0; ++row)
        for (int kind = 0; kind < kinds(row); ++kind) {
            const int place = slots_of(row, kind);
            auto& plan = plans_[2 * row + kind];
            if (plan.empty() || !arena.has_room(place, reserve_)) continue;
            for (; !plan.empty() && arena.has_room(place, reserve_); plan.pop_front()) read(row, {plan.front(), kind}, kPlanned);
            open -= !arena.has_room(place, reserve_);
        }
}

// Drops the staged slice of a kind that is needed last, not of the wanted expert; if this row needs it, it is read again in turn.
void ExpertSlices::make_room(Key wanted) {
    const int kind = wanted.kind, place = slots_of(row_, kind);
    for (int row = rows_ - 1; row >= 0; --row)
        for (int other = experts_ - 1; other >= 0; --other) {
            const Slice& one = slice(row, other, kind);
            if (slots_of(row, kind) != place) break;
            if (one.slot < 0 || one.resident || (row == row_ && other == wanted.expert)) continue;
            arrive(row, other);
            release(row, other, kind);
            if (is_active(row, other)) {
                auto before = [](const Key& a, const Key& b) { return a.expert != b.expert ? a.expert < b.expert : a.kind < b.kind; };
                const Key key{other, kind};
                demands_.insert(std::lower_bound(demands_.begin(), demands_.end(), key, before), key);
            }
            return;
        }
    throw std::logic_error("no staged slice can go: the budget is below the minimum");
}

bool ExpertSlices::readable(int expert) {
    for (int kind = 0; kind < kinds(row_); ++kind) {
        const Slice& one = slice(row_, expert, kind);
        if (one.slot < 0 || (one.ticket && !pool_.done(one.ticket))) return false;
    }
    arrive(row_, expert);
    return true;
}

void ExpertSlices::arrive(int row, int expert) {
    std::vector<uint64_t> tickets;
    for (int kind : {kMsb, kLsb})
        if (uint64_t ticket = slice(row, expert, kind).ticket) tickets.push_back(ticket);
    if (tickets.empty()) return;
    const double began = now();
    const std::vector<ReadFailure> failures = pool_.wait(tickets);
    const double ended = now();
    waited += ended - began;
    if (recording) waits.push_back({expert, began, ended});
    for (int kind : {kMsb, kLsb}) {
        Slice& one = slice(row, expert, kind);
        if (!one.ticket) continue;
        one.ticket = 0;
        if (failures.empty()) table_[row].addresses[2 * expert + kind] = arena.address(slots_of(row, kind), one.slot);
    }
    if (!failures.empty())
        throw SliceReadFailure("'" + table_[row].name + "': expert " + std::to_string(expert) + " cannot be read: " +
                               std::strerror(failures.front().error));
}

void ExpertSlices::let_go(int row, int expert) {
    for (int kind : {kMsb, kLsb}) {
        const Slice& one = slice(row, expert, kind);
        if (one.slot >= 0 && !one.resident) release(row, expert, kind);
    }
}

void ExpertSlices::release(int row, int expert, int kind) {
    Slice& one = slice(row, expert, kind);
    arena.give(slots_of(row, kind), one.slot);
    one.slot = -1;
    table_[row].addresses[2 * expert + kind] = 0;
}

}  // namespace elmoe
