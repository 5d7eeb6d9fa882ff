// Bindings of the read pool: lists in, lists out, the GIL let go while waiting.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "read_pool.hpp"

namespace nb = nanobind;
using elmoe::ReadPool;

void bind_read_pool(nb::module_& m) {
    nb::class_<ReadPool>(m, "ReadPool")
        .def("__init__",
             [](ReadPool* self, int threads) {
                 if (threads < 1 || threads > 64) throw nb::value_error("reading threads must be within 1..64");
                 new (self) ReadPool(threads);
             })
        .def("submit",
             [](ReadPool& self, const std::vector<int>& files, const std::vector<uint64_t>& offsets,
                const std::vector<uint64_t>& sizes, const std::vector<uint64_t>& destinations, int64_t priority) {
                 if (offsets.size() != files.size() || sizes.size() != files.size() || destinations.size() != files.size())
                     throw nb::value_error("a request has a file, an offset, a size and a destination");
                 std::vector<uint64_t> tickets;
                 for (size_t i = 0; i < files.size(); ++i)
                     tickets.push_back(self.submit(files[i], offsets[i], sizes[i], destinations[i], priority));
                 return tickets;
             })
        .def("wait",
             [](ReadPool& self, const std::vector<uint64_t>& tickets) {
                 std::vector<std::pair<uint64_t, int>> failures;
                 nb::gil_scoped_release release;
                 for (const auto& failure : self.wait(tickets)) failures.emplace_back(failure.ticket, failure.error);
                 return failures;
             })
        .def("done", &ReadPool::done)
        .def("hasten", &ReadPool::hasten)
        .def("set_bandwidth", &ReadPool::set_bandwidth)
        .def("inject_failure", &ReadPool::inject_failure)
        .def("inject_delay", &ReadPool::inject_delay)
        .def("record", &ReadPool::record)
        .def("take_events",
             [](ReadPool& self) {
                 std::vector<std::tuple<double, double, double, uint64_t, int64_t>> events;
                 for (const auto& e : self.take_events())
                     events.emplace_back(e.submitted, e.started, e.finished, e.bytes, e.priority);
                 return events;
             })
        .def("bytes_read", &ReadPool::bytes_read)
        .def("busy_seconds", &ReadPool::busy_seconds);
}
