// The mechanism of an enforced fast tier: where every expert slice lies, which reads are under way, and which stretch of a
// layer's experts can be computed next. What stays resident is decided elsewhere (elmoe.policy) and handed in.
//
// Every (row, expert, kind) slice is in one of four states: absent, in flight, staged (readable until its layer is computed)
// or resident. A row is a layer with routed experts. Its experts have one slice or two (MSB and LSB), whose bytes are those of
// its size class. One thread at a time.
#pragma once

#include <cstdint>
#include <deque>
#include <stdexcept>
#include <string>
#include <vector>

#include "read_pool.hpp"

namespace elmoe {

enum SliceKind { kMsb = 0, kLsb = 1 };

// Page-aligned slots of several kinds, each of its own size. Addresses are reserved for every slot; those below a kind's limit
// may be used, and keep their memory when they are given back. Memory goes back to the system only at the end of a kind's slots: what lies in huge pages
// stays in them, into which a disk reads 1.3 to 1.5 times as fast as into small ones (bench/reads.py).
class ExpertArena {
  public:
    // Bytes of a slot and number of slots, by kind; none may be used yet. Throws std::length_error where addresses overflow.
    ExpertArena(const std::vector<int64_t>& bytes, const std::vector<int64_t>& slots);
    ~ExpertArena();
    ExpertArena(const ExpertArena&) = delete;
    ExpertArena& operator=(const ExpertArena&) = delete;

    int kinds() const { return static_cast<int>(kinds_.size()); }
    int64_t size(int kind) const { return kinds_[kind].bytes; }
    int limit(int kind) const { return kinds_[kind].limit; }
    int slots(int kind) const { return static_cast<int>(kinds_[kind].used.size()); }
    int64_t capacity() const;
    int64_t used() const;
    bool has_room(int kind, int reserve = 0) const { return static_cast<int>(kinds_[kind].free.size()) > reserve; }
    bool is_used(int kind, int slot) const { return kinds_[kind].used[slot]; }
    int take(int kind);  // only while there is room
    void give(int kind, int slot);
    void move(int kind, int from, int to);  // to an unused slot
    void resize(int kind, int64_t slots);   // used slots must lie below
    int64_t address(int kind, int slot) const { return kinds_[kind].start + slot * kinds_[kind].bytes; }

  private:
    struct Kind {
        int64_t bytes, start = 0;
        int limit = 0;
        std::vector<uint8_t> used;
        std::vector<int> free;  // below the limit
    };

    std::vector<Kind> kinds_;
    void* memory_;
    int64_t reserved_;
};

// Becomes elmoe.errors.StoreError.
struct SliceReadFailure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct SliceWait {  // compute waited for an expert, seconds on the steady clock
    int expert;
    double began, ended;
};

struct SizeClass {
    int64_t bytes[2];  // of an MSB and an LSB slice; 0: experts are one slice
};

// Where the slices of a row's experts lie in the store and in memory.
struct SliceRow {
    int size_class;
    std::string name;  // of the file, for errors
    int file;
    std::vector<uint64_t> offsets;  // of MSB records; an LSB record lies behind its MSB record
    int64_t* addresses;             // (experts, 2), kept up to date: 0 where a slice is not readable
};

class ExpertSlices {
  public:
    // `reserve`: slots of each kind that planned reads leave free, so that demands never wait for a planned slice to be used.
    // The arena's kind of slots 2 * size class + kind holds slices of that class and kind.
    ExpertSlices(ReadPool& pool, std::vector<SizeClass> classes, int experts, std::vector<SliceRow> rows, int reserve);
    ~ExpertSlices() { finish(); }  // reads in flight fill the arena

    ExpertArena arena;

    // Between passes: how many slices may be held, by kind of slots. Residents move to slots that stay; all others go.
    void resize(const std::vector<int64_t>& slots);
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
    int kinds(int row) const { return arena.size(slots_of(row, kLsb)) > 0 ? 2 : 1; }
    int slots_of(int row, int kind) const { return 2 * table_[row].size_class + kind; }
    bool is_active(int row, int expert) const { return row == row_ && active_[expert]; }
    void read(int row, Key key, int64_t priority);
    void issue();  // start demanded reads while there is room
    void make_room(Key wanted);
    bool readable(int expert);
    void arrive(int row, int expert);
    void release(int row, int expert, int kind);
    void let_go(int row, int expert);

    ReadPool& pool_;
    std::vector<SliceRow> table_;
    int rows_, experts_, reserve_;
    std::vector<Slice> slices_;
    std::vector<std::deque<int>> plans_;  // experts, by row and kind
    int planned_ = 0;  // slices with a plan since the plans were forgotten
    int row_ = -1;     // being computed
    std::vector<uint8_t> active_;
    std::deque<int> waiting_;
    std::deque<Key> demands_;
    std::vector<int> ready_;
};

}  // namespace elmoe
