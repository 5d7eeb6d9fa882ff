// The mechanism of an enforced fast tier: where every expert slice lies, which reads are under way, and which stretch of a
// layer's experts can be computed next. What stays resident is decided elsewhere (elmoe.policy) and handed in.
//
// Every (row, expert, kind) slice is in one of four states: absent, in flight, staged (readable until its layer is computed)
// or resident. One thread at a time.
#pragma once

#include <cstdint>
#include <deque>
#include <stdexcept>
#include <string>
#include <vector>

#include "read_pool.hpp"

namespace elmoe {

enum SliceKind { kMsb = 0, kLsb = 1 };

// Page-aligned slots of two sizes under one limit of bytes. Addresses are reserved for every slot, memory is there only while
// a slot is used or kept warm for the next one: what the slots hold, warm ones included, never exceeds the capacity, so the
// kinds trade memory with each other and with whoever resizes the arena.
class ExpertArena {
  public:
    ExpertArena(int64_t msb_bytes, int64_t lsb_bytes, int slots, int64_t capacity);  // `slots` of each kind
    ~ExpertArena();
    ExpertArena(const ExpertArena&) = delete;
    ExpertArena& operator=(const ExpertArena&) = delete;

    int64_t size(int kind) const { return sizes_[kind]; }
    int64_t capacity() const { return capacity_; }
    int64_t used() const { return used_; }
    int64_t held() const;  // bytes of memory behind used and warm slots
    bool has_room(int kind, int64_t reserve = 0) const { return used_ + sizes_[kind] + reserve <= capacity_; }
    int take(int kind);             // only while there is room
    void give(int kind, int slot);  // its memory stays warm
    void resize(int64_t capacity);  // warm memory beyond it goes back to the system; used slots must fit
    int64_t address(int kind, int slot) const { return reinterpret_cast<int64_t>(memory_) + start_[kind] + slot * sizes_[kind]; }

  private:
    void cool(int64_t limit);  // gives warm memory back until at most `limit` bytes are held

    int64_t sizes_[2], start_[2], reserved_, capacity_, used_ = 0;
    char* memory_;
    std::vector<int> cold_[2], warm_[2];
};

// Becomes elmoe.errors.StoreError.
struct SliceReadFailure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct SliceWait {  // compute waited for an expert, seconds on the steady clock
    int expert;
    double began, ended;
};

class ExpertSlices {
  public:
    // `names` and `files` by row, `offsets` (rows, experts) of MSB records with the LSB records behind them; `addresses` by row, (experts,
    // 2), kept up to date: 0 where a slice is not readable. `reserve`: bytes that planned reads leave free, so that demands
    // never wait for a planned slice to be used.
    ExpertSlices(ReadPool& pool, int64_t msb_bytes, int64_t lsb_bytes, int experts, std::vector<std::string> names,
                 std::vector<int> files, std::vector<uint64_t> offsets, std::vector<int64_t*> addresses, int64_t reserve);
    ~ExpertSlices() { finish(); }  // reads in flight fill the arena

    ExpertArena arena;

    // Plan reads of what a later pass will need of a row.
    void foresee(int row, const std::vector<int>& experts);
    void pump();  // start planned reads, earliest row first, while there is room
    // A target pass begins to compute a row with these experts, ascending: what is missing is demanded.
    void begin(int row, const std::vector<int>& active);
    // What stays of a row; residents that do not, and are not about to be computed, go at once.
    void keep(int row, const uint8_t* msb, const uint8_t* lsb);
    // The next stretch of the row's experts, ascending, once readable; those of the stretch before are let go of. Empty: the
    // row is done. Throws SliceReadFailure.
    const std::vector<int>& next();
    void forget_plans();
    void finish();  // waits for all reads in flight

    double waited = 0;          // seconds, in all
    int64_t reads = 0;          // slices asked for, in all
    int64_t foreseen_hits = 0;  // needed slices that had been planned, in all
    bool recording = false;     // of waits
    std::vector<SliceWait> waits;

  private:
    struct Slice {
        int slot = -1;
        uint64_t ticket = 0;  // 0: not in flight
        bool resident = false, planned = false;
    };
    struct Key {
        int expert, kind;
    };

    Slice& slice(int row, int expert, int kind) { return slices_[(static_cast<size_t>(row) * experts_ + expert) * 2 + kind]; }
    bool is_active(int row, int expert) const { return row == row_ && active_[expert]; }
    void read(int row, Key key, int64_t priority);
    void issue();  // start demanded reads while there is room
    void make_room(int expert);
    bool readable(int expert);
    void arrive(int row, int expert);
    void release(int row, int expert, int kind);
    void let_go(int row, int expert);

    ReadPool& pool_;
    int rows_, experts_;
    std::vector<std::string> names_;
    std::vector<int> files_;
    std::vector<uint64_t> offsets_;
    std::vector<int64_t*> addresses_;
    int64_t reserve_;
    std::vector<Slice> slices_;
    std::vector<std::deque<Key>> plans_;
    int planned_ = 0;  // slices with a plan since the plans were forgotten
    int row_ = -1;     // being computed
    std::vector<uint8_t> active_;
    std::deque<int> waiting_;
    std::deque<Key> demands_;
    std::vector<int> ready_;
};

// elmoe.policy.residency.refill of one layer, in place on `msb` and `lsb` (experts); `streamed` marks what the step reads.
struct RefillRule {
    double hysteresis;
    int64_t swap_cap;
};
void refill(uint8_t* msb, uint8_t* lsb, const double* hotness, const uint8_t* streamed, int experts, int msb_slots, int lsb_slots,
            const RefillRule& rule);

}  // namespace elmoe
