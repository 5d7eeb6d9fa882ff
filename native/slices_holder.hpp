// Expert slices as a Python object: sizes are checked here, and the address tables that they write to are kept.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>
#include <utility>
#include <vector>

#include "expert_slices.hpp"

namespace elmoe {

struct SlicesHolder {
    using Table = nanobind::ndarray<int64_t, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;

    SlicesHolder(ReadPool& pool, int64_t msb, int64_t lsb, std::vector<std::string> names, std::vector<int> files,
                 const std::vector<std::vector<uint64_t>>& offsets, std::vector<Table> tables, int reserve)
        : tables(std::move(tables)), experts(this->tables.empty() ? 0 : this->tables[0].shape(0)),
          slices(pool, positive(msb), positive(lsb), static_cast<int>(experts), named(std::move(names), files.size()), files,
                 flat(offsets, files.size(), experts), pointers(this->tables, files.size(), experts), reserve) {}

    static void require(bool condition, const char* message) {
        if (!condition) throw nanobind::value_error(message);
    }
    static int64_t positive(int64_t bytes) {
        require(bytes > 0, "slices have bytes");
        return bytes;
    }
    static std::vector<std::string> named(std::vector<std::string> names, size_t count) {
        require(names.size() == count, "a file has a name");
        return names;
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

    std::vector<Table> tables;
    size_t experts;
    ExpertSlices slices;
};

}  // namespace elmoe
