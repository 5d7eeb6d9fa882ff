// The refill of one layer: the native twin of elmoe.policy.residency.refill, which is the definition. A property test
// (tests/unit/test_policy.py) holds both equal.
#pragma once

#include <cstdint>

namespace elmoe {

struct RefillRule {
    double hysteresis;
    int64_t swap_cap;
};

// In place on `msb` and `lsb` (experts), the residents; `hotness` (experts) is not negative; `streamed` (experts) marks what the
// step reads.
void refill(uint8_t* msb, uint8_t* lsb, const double* hotness, const uint8_t* streamed, int experts, int64_t msb_slots,
            int64_t lsb_slots, const RefillRule& rule);

}  // namespace elmoe
