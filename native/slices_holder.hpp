// Expert slices as a Python object: sizes are checked here, and the address tables that they write to are kept.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "expert_slices.hpp"
#include "holders.hpp"

namespace elmoe {

struct SlicesHolder {
    using Table = Array<int64_t, 2>;
    using Sizes = std::vector<std::pair<int64_t, int64_t>>;

    // `sizes`: (MSB, LSB) bytes by size class; the rest by row.
    SlicesHolder(ReadPool& pool, const Sizes& sizes, const std::vector<int>& classes, const std::vector<std::string>& names,
                 const std::vector<int>& files, const std::vector<std::vector<uint64_t>>& offsets, std::vector<Table> tables_,
                 int reserve)
        : tables(std::move(tables_)), experts(tables.empty() ? 0 : narrow(side(tables[0], 0), kTooLarge)),
          slices(pool, checked_sizes(sizes), experts, rows_of(sizes, classes, names, files, offsets), reserve) {}

    size_t rows() const { return tables.size(); }
    void check(int64_t row) const { require(row >= 0 && row < static_cast<int64_t>(rows()), "a row is out of range"); }

    std::vector<Table> tables;
    int experts;
    ExpertSlices slices;

  private:
    static std::vector<SizeClass> checked_sizes(const Sizes& sizes) {
        std::vector<SizeClass> result;
        for (const auto& [msb, lsb] : sizes) {
            require(msb > 0 && lsb >= 0, "slices have bytes");
            result.push_back({{msb, lsb}});
        }
        return result;
    }

    std::vector<SliceRow> rows_of(const Sizes& sizes, const std::vector<int>& classes, const std::vector<std::string>& names,
                                  const std::vector<int>& files, const std::vector<std::vector<uint64_t>>& offsets) const {
        const size_t count = tables.size();
        require(count > 0 && experts > 0 && classes.size() == count && names.size() == count && files.size() == count &&
                    offsets.size() == count && count <= static_cast<size_t>(INT_MAX) / experts,
                "a row has a size class, a file with a name, offsets and addresses");
        std::vector<SliceRow> result;
        for (size_t row = 0; row < count; ++row) {
            require(classes[row] >= 0 && static_cast<size_t>(classes[row]) < sizes.size(), "a size class is out of range");
            require(offsets[row].size() == static_cast<size_t>(experts), "an expert has an offset");
            require(side(tables[row], 0) == experts && side(tables[row], 1) == 2, "addresses are (experts, 2)");
            result.push_back({classes[row], names[row], files[row], offsets[row], tables[row].data()});
        }
        return result;
    }
};

}  // namespace elmoe
