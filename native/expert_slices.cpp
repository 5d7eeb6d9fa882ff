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

int64_t align(int64_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
}  // namespace

ExpertArena::ExpertArena(int64_t msb_bytes, int64_t lsb_bytes, int slots) {
    const int64_t end = align(msb_bytes * slots);  // of the MSB slots; no huge page holds slots of both kinds
    reserved_ = end + align(lsb_bytes * slots) + kHugePage;
    memory_ = mmap(nullptr, reserved_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    madvise(memory_, reserved_, MADV_HUGEPAGE);
    const int64_t start = align(reinterpret_cast<int64_t>(memory_));
    kinds_[kMsb] = {msb_bytes, start, 0, std::vector<uint8_t>(slots), {}};
    kinds_[kLsb] = {lsb_bytes, start + end, 0, std::vector<uint8_t>(slots), {}};
}

ExpertArena::~ExpertArena() { munmap(memory_, reserved_); }

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

void ExpertArena::resize(int kind, int slots) {
    Kind& one = kinds_[kind];
    slots = std::min(slots, static_cast<int>(one.used.size()));
    if (std::count(one.used.begin() + slots, one.used.end(), 1)) throw std::logic_error("used slots do not fit the new limit");
    if (slots < one.limit)
        madvise(reinterpret_cast<void*>(address(kind, slots)), (one.limit - slots) * one.bytes, MADV_DONTNEED);
    one.limit = slots;
    one.free.clear();
    for (int slot = slots - 1; slot >= 0; --slot)
        if (!one.used[slot]) one.free.push_back(slot);
}

ExpertSlices::ExpertSlices(ReadPool& pool, int64_t msb_bytes, int64_t lsb_bytes, int experts, std::vector<std::string> names,
                           std::vector<int> files, std::vector<uint64_t> offsets, std::vector<int64_t*> addresses,
                           int reserve)
    : arena(msb_bytes, lsb_bytes, static_cast<int>(files.size()) * experts), pool_(pool), rows_(static_cast<int>(files.size())),
      experts_(experts), names_(std::move(names)), files_(std::move(files)), offsets_(std::move(offsets)),
      addresses_(std::move(addresses)), reserve_(reserve), slices_(static_cast<size_t>(rows_) * experts * 2), plans_(2 * static_cast<size_t>(rows_)),
      active_(experts) {}

void ExpertSlices::resize(int msb, int lsb) {
    const int slots[] = {msb, lsb};
    for (int row = 0; row < rows_; ++row)
        for (int expert = 0; expert < experts_; ++expert) {
            arrive(row, expert);
            let_go(row, expert);
        }
    for (int kind : {kMsb, kLsb}) {
        std::vector<int> homes;  // of slices whose slots go, lowest last
        for (int slot = std::min(slots[kind], arena.limit(kind)) - 1; slot >= 0; --slot)
            if (!arena.is_used(kind, slot)) homes.push_back(slot);
        for (int row = 0; row < rows_; ++row)
            for (int expert = 0; expert < experts_; ++expert) {
                Slice& one = slice(row, expert, kind);
                if (one.slot < slots[kind]) continue;
                if (homes.empty()) throw std::logic_error("residents do not fit the new limit");
                arena.move(kind, one.slot, homes.back());
                one.slot = homes.back();
                addresses_[row][2 * expert + kind] = arena.address(kind, one.slot);
                homes.pop_back();
            }
        arena.resize(kind, slots[kind]);
    }
}

void ExpertSlices::foresee(int row, const std::vector<int>& experts) {
    for (int expert : experts)
        for (int kind : {kMsb, kLsb}) {
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
        for (int kind : {kMsb, kLsb}) {
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
        for (int kind : {kMsb, kLsb}) {
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
    one.slot = arena.take(key.kind);
    const uint64_t offset = offsets_[static_cast<size_t>(row) * experts_ + key.expert] + (key.kind == kLsb ? arena.size(kMsb) : 0);
    one.ticket = pool_.submit(files_[row], offset, arena.size(key.kind), arena.address(key.kind, one.slot), priority);
    ++reads;
}

void ExpertSlices::issue() {
    for (; !demands_.empty() && arena.has_room(demands_.front().kind); demands_.pop_front())
        if (slice(row_, demands_.front().expert, demands_.front().kind).slot < 0) read(row_, demands_.front(), kDemand);
}

void ExpertSlices::pump() {
    bool full[] = {false, false};
    for (int row = 0; row < rows_ && !(full[kMsb] && full[kLsb]); ++row)
        for (int kind : {kMsb, kLsb})
            for (auto& plan = plans_[2 * row + kind]; !plan.empty(); plan.pop_front()) {
                full[kind] = !arena.has_room(kind, reserve_);
                if (full[kind]) break;
                read(row, {plan.front(), kind}, kPlanned);
            }
}

// Drops the staged slice of a kind that is needed last, not of the wanted expert; if this row needs it, it is read again in turn.
void ExpertSlices::make_room(Key wanted) {
    const int kind = wanted.kind;
    for (int row = rows_ - 1; row >= 0; --row)
        for (int other = experts_ - 1; other >= 0; --other) {
            const Slice& one = slice(row, other, kind);
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
    for (int kind : {kMsb, kLsb}) {
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
        if (failures.empty()) addresses_[row][2 * expert + kind] = arena.address(kind, one.slot);
    }
    if (!failures.empty())
        throw SliceReadFailure("'" + names_[row] + "': expert " + std::to_string(expert) + " cannot be read: " +
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
    arena.give(kind, one.slot);
    one.slot = -1;
    addresses_[row][2 * expert + kind] = 0;
}

namespace {
// The hottest `slots` of residents (favoured by the hysteresis) and the best few candidates; ties go to the lower expert.
void keep_hottest(uint8_t* resident, const double* hotness, const std::vector<uint8_t>& candidates, int slots,
                  const RefillRule& rule) {
    const int experts = static_cast<int>(candidates.size());
    std::vector<int> order;
    int held = 0;
    for (int e = 0; e < experts; ++e) {
        held += resident[e];
        if (candidates[e]) order.push_back(e);
    }
    if (order.empty() || slots == 0) return;
    std::vector<double> score(experts, -1.0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return hotness[a] > hotness[b]; });
    if (held + static_cast<int>(order.size()) > slots) {
        const int64_t newcomers = std::min<int64_t>(slots - held + rule.swap_cap, slots);
        if (static_cast<int64_t>(order.size()) > newcomers) order.resize(std::max<int64_t>(newcomers, 0));
    }
    for (int e : order) score[e] = hotness[e];
    for (int e = 0; e < experts; ++e)
        if (resident[e]) {
            score[e] = hotness[e] * (1 + rule.hysteresis);
            order.push_back(e);
        }
    std::sort(order.begin(), order.end());
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return score[a] > score[b]; });
    if (static_cast<int>(order.size()) > slots) order.resize(slots);
    std::fill(resident, resident + experts, 0);
    for (int e : order) resident[e] = 1;
}
}  // namespace

void refill(uint8_t* msb, uint8_t* lsb, const double* hotness, const uint8_t* streamed, int experts, int msb_slots, int lsb_slots,
            const RefillRule& rule) {
    std::vector<uint8_t> candidates(experts);
    for (int e = 0; e < experts; ++e) candidates[e] = streamed[e] && !msb[e];
    keep_hottest(msb, hotness, candidates, msb_slots, rule);
    for (int e = 0; e < experts; ++e) {
        lsb[e] = lsb[e] && msb[e];
        candidates[e] = streamed[e] && msb[e] && !lsb[e];
    }
    keep_hottest(lsb, hotness, candidates, lsb_slots, rule);
}

}  // namespace elmoe
