// Bindings of the enforced tier's mechanism: what stays is decided in Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <set>
#include <tuple>
#include <utility>

#include "slices_holder.hpp"

namespace nb = nanobind;
using namespace elmoe;

namespace {
using Flags = nb::ndarray<const bool, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Experts = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

using Ranked = nb::ndarray<const int32_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using MutableFlags = nb::ndarray<bool, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Scores = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::vector<int> checked(const Experts& experts, size_t count) {
    std::vector<int> result(experts.data(), experts.data() + experts.size());
    for (int expert : result)
        SlicesHolder::require(expert >= 0 && static_cast<size_t>(expert) < count, "an expert is out of range");
    return result;
}
}  // namespace

void bind_expert_slices(nb::module_& m) {
    nb::exception<SliceReadFailure>(m, "SliceReadFailure");
    m.def("refill", [](MutableFlags msb, MutableFlags lsb, const Scores& hotness, const Flags& streamed, int msb_slots,
                       int lsb_slots, double hysteresis, int64_t swap_cap) {
        const size_t experts = msb.size();
        SlicesHolder::require(lsb.size() == experts && hotness.size() == experts && streamed.size() == experts,
                              "an expert has two flags and a hotness");
        refill(reinterpret_cast<uint8_t*>(msb.data()), reinterpret_cast<uint8_t*>(lsb.data()), hotness.data(),
               reinterpret_cast<const uint8_t*>(streamed.data()), static_cast<int>(experts), msb_slots, lsb_slots,
               {hysteresis, swap_cap});
    });
    nb::class_<ExpertArena>(m, "ExpertArena")
        .def("__init__",
             [](ExpertArena* self, int64_t msb, int64_t lsb, int slots) {
                 SlicesHolder::require(msb > 0 && lsb > 0 && slots > 0, "slots have bytes");
                 new (self) ExpertArena(msb, lsb, slots);
             })
        .def("size", &ExpertArena::size)
        .def_prop_ro("capacity", &ExpertArena::capacity)
        .def_prop_ro("used", &ExpertArena::used)
        .def("has_room", &ExpertArena::has_room, nb::arg("kind"), nb::arg("reserve") = 0)
        .def("take", &ExpertArena::take)
        .def("give", &ExpertArena::give)
        .def("move", &ExpertArena::move)
        .def("resize", &ExpertArena::resize)
        .def("address", &ExpertArena::address);
    nb::class_<SlicesHolder>(m, "ExpertSlices")
        .def(nb::init<ReadPool&, int64_t, int64_t, std::vector<std::string>, std::vector<int>,
                      const std::vector<std::vector<uint64_t>>&, std::vector<SlicesHolder::Table>, int>(),
             nb::keep_alive<1, 2>())
        .def_prop_ro("arena", [](SlicesHolder& self) -> ExpertArena& { return self.slices.arena; }, nb::rv_policy::reference_internal)
        .def("resize",
             [](SlicesHolder& self, int msb, int lsb) {
                 SlicesHolder::require(msb >= 0 && lsb >= 0, "a number of slots is not negative");
                 self.slices.resize(msb, lsb);
             })
        .def("foresee",
             [](SlicesHolder& self, int row, const Ranked& ranked, size_t top_k) {
                 const size_t rows = ranked.shape(0), tokens = ranked.shape(1), ranks = ranked.shape(2);
                 if (rows == 0) return;
                 self.check(row);
                 self.check(row + static_cast<int>(rows) - 1);
                 SlicesHolder::require(top_k <= ranks, "fewer experts are ranked");
                 for (size_t r = 0; r < rows; ++r) {
                     std::set<int> experts;
                     for (size_t t = 0; t < tokens; ++t) {
                         const int32_t* best = ranked.data() + (r * tokens + t) * ranks;
                         experts.insert(best, best + top_k);
                     }
                     if (experts.empty()) continue;
                     SlicesHolder::require(*experts.begin() >= 0 && static_cast<size_t>(*experts.rbegin()) < self.experts,
                                           "an expert is out of range");
                     self.slices.foresee(row + static_cast<int>(r), {experts.begin(), experts.end()});
                 }
                 self.slices.pump();
             })
        .def("begin",
             [](SlicesHolder& self, int row, const Experts& active) {
                 self.check(row);
                 self.slices.begin(row, checked(active, self.experts));
             })
        .def("keep",
             [](SlicesHolder& self, int row, const Flags& msb, const Flags& lsb) {
                 self.check(row);
                 SlicesHolder::require(msb.size() == self.experts && lsb.size() == self.experts, "an expert has a flag");
                 self.slices.keep(row, reinterpret_cast<const uint8_t*>(msb.data()),
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
