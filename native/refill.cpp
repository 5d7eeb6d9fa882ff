#include "refill.hpp"

#include <algorithm>
#include <vector>

namespace elmoe {

namespace {
// The hottest `slots` of residents (favoured by the hysteresis) and the best few candidates; ties go to the lower expert.
void keep_hottest(uint8_t* resident, const double* hotness, const std::vector<uint8_t>& candidates, int64_t slots,
                  const RefillRule& rule) {
    const int experts = static_cast<int>(candidates.size());
    std::vector<int> order;
    int64_t held = 0;
    for (int e = 0; e < experts; ++e) {
        held += resident[e];
        if (candidates[e]) order.push_back(e);
    }
    if (order.empty() || slots == 0) return;
    std::vector<double> score(experts, -1.0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return hotness[a] > hotness[b]; });
    if (held + static_cast<int64_t>(order.size()) > slots) {
        const int64_t newcomers = std::min(slots - held + rule.swap_cap, slots);
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
    if (static_cast<int64_t>(order.size()) > slots) order.resize(slots);
    std::fill(resident, resident + experts, 0);
    for (int e : order) resident[e] = 1;
}
}  // namespace

void refill(uint8_t* msb, uint8_t* lsb, const double* hotness, const uint8_t* streamed, int experts, int64_t msb_slots,
            int64_t lsb_slots, const RefillRule& rule) {
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
