// Bindings of the enforced tier's mechanism: what stays is decided in Python.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <set>
#include <tuple>
#include <utility>

#include "refill.hpp"
#include "slices_holder.hpp"

using namespace elmoe;

namespace {
using Flags = Input<bool, 1>;
using MutableFlags = Array<bool, 1>;
using Experts = Input<int32_t, 2>;  // (tokens, k) of a row
using Ranked = Input<int32_t, 3>;   // (rows, tokens, ranks)
using Scores = Input<double, 1>;

uint8_t* bytes(MutableFlags& flags) { return reinterpret_cast<uint8_t*>(flags.data()); }

// The experts of a row, ascending.
std::vector<int> active(const SlicesHolder& slices, const Experts& experts) {
    std::vector<uint8_t> used(slices.experts);
    for (size_t i = 0; i < experts.size(); ++i) {
        require(experts.data()[i] >= 0 && experts.data()[i] < slices.experts, "an expert is out of range");
        used[experts.data()[i]] = 1;
    }
    std::vector<int> result;
    for (int expert = 0; expert < slices.experts; ++expert)
        if (used[expert]) result.push_back(expert);
    return result;
}

// One call per row of a pass: the row begins, its residents change by what it streams, what does not stay goes.
void begin_and_refill(SlicesHolder& self, int64_t row, const Experts& experts, MutableFlags msb, MutableFlags lsb,
                      const Scores& scores, int64_t msb_slots, int64_t lsb_slots, double hysteresis, int64_t swap_cap) {
    self.check(row);
    require(side(msb, 0) == self.experts && side(lsb, 0) == self.experts && side(scores, 0) == self.experts,
            "an expert has two flags and a score");
    const std::vector<int> needed = active(self, experts);
    self.slices.begin(static_cast<int>(row), needed);
    std::vector<uint8_t> streamed(self.experts);
    for (int expert : needed) streamed[expert] = 1;
    refill(bytes(msb), bytes(lsb), scores.data(), streamed.data(), self.experts, msb_slots, lsb_slots, {hysteresis, swap_cap});
    self.slices.keep(static_cast<int>(row), bytes(msb), bytes(lsb));
}

void foresee(SlicesHolder& self, int64_t first, const Ranked& ranked, size_t top_k) {
    const size_t rows = ranked.shape(0), tokens = ranked.shape(1), ranks = ranked.shape(2);
    if (rows == 0) return;
    self.check(first);
    self.check(first + side(ranked, 0) - 1);
    require(top_k <= ranks, "fewer experts are ranked");
    for (size_t r = 0; r < rows; ++r) {
        std::set<int> experts;
        for (size_t t = 0; t < tokens; ++t) {
            const int32_t* best = ranked.data() + (r * tokens + t) * ranks;
            experts.insert(best, best + top_k);
        }
        if (experts.empty()) continue;
        require(*experts.begin() >= 0 && *experts.rbegin() < self.experts, "an expert is out of range");
        self.slices.foresee(static_cast<int>(first) + static_cast<int>(r), {experts.begin(), experts.end()});
    }
    self.slices.pump();
}

// The arena, if it has the kind and slot.
ExpertArena& checked(ExpertArena& arena, int64_t kind, int64_t slot = 0) {
    require(kind >= 0 && kind < arena.kinds(), "a kind of slots is out of range");
    require(slot >= 0 && (slot == 0 || slot < arena.slots(static_cast<int>(kind))), "a slot is out of range");
    return arena;
}

void resize(SlicesHolder& self, const std::vector<std::pair<int64_t, int64_t>>& slots) {
    require(2 * slots.size() == static_cast<size_t>(self.slices.arena.kinds()), "a size class has MSB and LSB slots");
    std::vector<int64_t> kinds;
    for (const auto& [msb, lsb] : slots) {
        require(msb >= 0 && lsb >= 0, "a number of slots is not negative");
        kinds.insert(kinds.end(), {msb, lsb});
    }
    self.slices.resize(kinds);
}
}  // namespace

void bind_expert_slices(nb::module_& m) {
    nb::exception<SliceReadFailure>(m, "SliceReadFailure");
    m.def("refill", [](MutableFlags msb, MutableFlags lsb, const Scores& hotness, const Flags& streamed, int64_t msb_slots,
                       int64_t lsb_slots, double hysteresis, int64_t swap_cap) {
        const int experts = narrow(side(msb, 0), kTooLarge);
        require(side(lsb, 0) == experts && side(hotness, 0) == experts && side(streamed, 0) == experts,
                "an expert has two flags and a hotness");
        refill(bytes(msb), bytes(lsb), hotness.data(), reinterpret_cast<const uint8_t*>(streamed.data()), experts, msb_slots,
               lsb_slots, {hysteresis, swap_cap});
    });
    nb::class_<ExpertArena>(m, "ExpertArena")
        .def("__init__",
             [](ExpertArena* self, const std::vector<int64_t>& bytes, const std::vector<int64_t>& slots) {
                 require(!bytes.empty() && bytes.size() == slots.size(), "a kind of slots has bytes and a number");
                 for (size_t kind = 0; kind < bytes.size(); ++kind) require(bytes[kind] > 0 && slots[kind] > 0, "slots have bytes");
                 new (self) ExpertArena(bytes, slots);
             })
        .def("size", [](ExpertArena& self, int kind) { return checked(self, kind).size(kind); })
        .def_prop_ro("capacity", &ExpertArena::capacity)
        .def_prop_ro("used", &ExpertArena::used)
        .def("has_room", [](ExpertArena& self, int kind, int reserve) { return checked(self, kind).has_room(kind, reserve); },
             nb::arg("kind"), nb::arg("reserve") = 0)
        .def("take", [](ExpertArena& self, int kind) { return checked(self, kind).take(kind); })
        .def("give", [](ExpertArena& self, int kind, int slot) { checked(self, kind, slot).give(kind, slot); })
        .def("move",
             [](ExpertArena& self, int kind, int from, int to) {
                 checked(self, kind, from);
                 checked(self, kind, to).move(kind, from, to);
             })
        .def("resize",
             [](ExpertArena& self, int kind, int64_t slots) {
                 require(slots >= 0, "a number of slots is not negative");
                 checked(self, kind).resize(kind, slots);
             })
        .def("address", [](ExpertArena& self, int kind, int slot) { return checked(self, kind, slot).address(kind, slot); });
    nb::class_<SlicesHolder>(m, "ExpertSlices")
        .def(nb::init<ReadPool&, const SlicesHolder::Sizes&, const std::vector<int>&, const std::vector<std::string>&,
                      const std::vector<int>&, const std::vector<std::vector<uint64_t>>&, std::vector<SlicesHolder::Table>, int>(),
             nb::keep_alive<1, 2>())
        .def_prop_ro("arena", [](SlicesHolder& self) -> ExpertArena& { return self.slices.arena; }, nb::rv_policy::reference_internal)
        .def("resize", &resize)
        .def("foresee", &foresee)
        .def("begin",
             [](SlicesHolder& self, int64_t row, const Experts& experts) {
                 self.check(row);
                 self.slices.begin(static_cast<int>(row), active(self, experts));
             })
        .def("begin_and_refill", &begin_and_refill)
        .def("keep",
             [](SlicesHolder& self, int64_t row, const Flags& msb, const Flags& lsb) {
                 self.check(row);
                 require(side(msb, 0) == self.experts && side(lsb, 0) == self.experts, "an expert has a flag");
                 self.slices.keep(static_cast<int>(row), reinterpret_cast<const uint8_t*>(msb.data()),
                                  reinterpret_cast<const uint8_t*>(lsb.data()));
             })
        .def("next",
             [](SlicesHolder& self) {
                 nb::gil_scoped_release release;
                 return std::vector<int>(self.slices.next());
             })
        .def("forget_plans", [](SlicesHolder& self) { self.slices.forget_plans(); })
        .def("finish",
             [](SlicesHolder& self) {
                 nb::gil_scoped_release release;
                 self.slices.finish();
             })
        .def_prop_ro("waited", [](SlicesHolder& self) { return self.slices.waited; })
        .def_prop_ro("reads", [](SlicesHolder& self) { return self.slices.reads; })
        .def_prop_ro("foreseen_hits", [](SlicesHolder& self) { return self.slices.foreseen_hits; })
        .def("record",
             [](SlicesHolder& self, bool on) {
                 self.slices.recording = on;
                 self.slices.waits.clear();
             })
        .def("take_waits", [](SlicesHolder& self) {
            std::vector<std::tuple<int, double, double>> waits;
            for (const auto& wait : std::exchange(self.slices.waits, {})) waits.emplace_back(wait.expert, wait.began, wait.ended);
            return waits;
        });
}
