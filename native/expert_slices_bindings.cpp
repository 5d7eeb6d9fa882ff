// Bindings of the enforced tier's mechanism: sizes are checked here, what is allowed is decided in Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <utility>

#include "expert_slices.hpp"

namespace nb = nanobind;
using namespace elmoe;

namespace {
using Table = nb::ndarray<int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Flags = nb::ndarray<const bool, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Experts = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const char* message) {
    if (!condition) throw nb::value_error(message);
}

std::vector<int> checked(const Experts& experts, size_t count) {
    std::vector<int> result(experts.data(), experts.data() + experts.size());
    for (int expert : result) require(expert >= 0 && static_cast<size_t>(expert) < count, "an expert is out of range");
    return result;
}

struct Slices {
    Slices(ReadPool& pool, int64_t msb, int64_t lsb, const std::vector<int>& files,
           const std::vector<std::vector<uint64_t>>& offsets, std::vector<Table> tables, int64_t reserve)
        : tables(std::move(tables)), experts(this->tables.empty() ? 0 : this->tables[0].shape(0)),
          slices(pool, msb, lsb, static_cast<int>(experts), files, flat(offsets, files.size(), experts),
                 pointers(this->tables, files.size(), experts), reserve) {
        require(msb > 0 && lsb > 0, "slices have bytes");
    }

    static std::vector<uint64_t> flat(const std::vector<std::vector<uint64_t>>& rows, size_t count, size_t experts) {
        require(count > 0 && experts > 0 && rows.size() == count, "a row has a file, offsets and addresses");
        std::vector<uint64_t> all;
        for (const auto& row : rows) {
            require(row.size() == experts, "an expert has an offset");
            all.insert(all.end(), row.begin(), row.end());
        }
        return all;
    }

    static std::vector<int64_t*> pointers(const std::vector<Table>& tables, size_t count, size_t experts) {
        require(tables.size() == count, "a row has a file, offsets and addresses");
        std::vector<int64_t*> result;
        for (const Table& table : tables) {
            require(table.shape(0) == experts && table.shape(1) == 2, "addresses are (experts, 2)");
            result.push_back(table.data());
        }
        return result;
    }

    void check(int row) const { require(row >= 0 && static_cast<size_t>(row) < tables.size(), "a row is out of range"); }

    std::vector<Table> tables;  // kept: the slices write to them
    size_t experts;
    ExpertSlices slices;
};
}  // namespace

void bind_expert_slices(nb::module_& m) {
    // Carries (row, expert, reason): names of files are known elsewhere.
    static PyObject* failure = PyErr_NewException("elmoe._native.SliceReadFailure", PyExc_RuntimeError, nullptr);
    m.attr("SliceReadFailure") = nb::handle(failure);
    nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
        try {
            std::rethrow_exception(pointer);
        } catch (const SliceReadFailure& e) {
            PyErr_SetObject(failure, nb::make_tuple(e.row, e.expert, e.what()).ptr());
        }
    });
    nb::class_<ExpertArena>(m, "ExpertArena")
        .def("__init__",
             [](ExpertArena* self, int64_t msb, int64_t lsb, int slots, int64_t capacity) {
                 require(msb > 0 && lsb > 0 && slots > 0, "slots have bytes");
                 new (self) ExpertArena(msb, lsb, slots, capacity);
             })
        .def("size", &ExpertArena::size)
        .def_prop_ro("capacity", &ExpertArena::capacity)
        .def_prop_ro("used", &ExpertArena::used)
        .def_prop_ro("held", &ExpertArena::held)
        .def("has_room", &ExpertArena::has_room, nb::arg("kind"), nb::arg("reserve") = 0)
        .def("take", &ExpertArena::take)
        .def("give", &ExpertArena::give)
        .def("resize", &ExpertArena::resize)
        .def("address", &ExpertArena::address);
    nb::class_<Slices>(m, "ExpertSlices")
        .def(nb::init<ReadPool&, int64_t, int64_t, const std::vector<int>&, const std::vector<std::vector<uint64_t>>&,
                      std::vector<Table>, int64_t>(),
             nb::keep_alive<1, 2>())
        .def_prop_ro("arena", [](Slices& self) -> ExpertArena& { return self.slices.arena; }, nb::rv_policy::reference_internal)
        .def("foresee",
             [](Slices& self, int row, const Experts& experts) {
                 self.check(row);
                 self.slices.foresee(row, checked(experts, self.experts));
             })
        .def("begin",
             [](Slices& self, int row, const Experts& active) {
                 self.check(row);
                 self.slices.begin(row, checked(active, self.experts));
             })
        .def("keep",
             [](Slices& self, int row, const Flags& msb, const Flags& lsb) {
                 self.check(row);
                 require(msb.size() == self.experts && lsb.size() == self.experts, "an expert has a flag");
                 self.slices.keep(row, reinterpret_cast<const uint8_t*>(msb.data()),
                                  reinterpret_cast<const uint8_t*>(lsb.data()));
             })
        .def("next",
             [](Slices& self) {
                 nb::gil_scoped_release release;
                 return std::vector<int>(self.slices.next());
             })
        .def("forget_plans", [](Slices& self) { self.slices.forget_plans(); })
        .def("finish",
             [](Slices& self) {
                 nb::gil_scoped_release release;
                 self.slices.finish();
             })
        .def_prop_ro("waited", [](Slices& self) { return self.slices.waited; })
        .def_prop_ro("reads", [](Slices& self) { return self.slices.reads; })
        .def_prop_ro("foreseen_hits", [](Slices& self) { return self.slices.foreseen_hits; })
        .def("record",
             [](Slices& self, bool on) {
                 self.slices.recording = on;
                 self.slices.waits.clear();
             })
        .def("take_waits", [](Slices& self) {
            std::vector<std::tuple<int, double, double>> waits;
            for (const auto& wait : std::exchange(self.slices.waits, {})) waits.emplace_back(wait.expert, wait.began, wait.ended);
            return waits;
        });
}
