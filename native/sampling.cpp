// Sampling: processors, Philox4x64-10, Gumbel noise; float64 in plain C++, one rounding per operation.
//
// z[i] = logit[i] / temperature - largest / temperature, weight[i] = exp32(float(z[i])). Sums of weights go over ascending ids in 16 float64
// lanes (id mod 16) and the fixed tree; that of top-p is one chain in descending order of logits. The token is the argmax of
// z[i] - log(-log u[i]), ties to the lower id, u from 52 bits of Philox. There is no integer accumulator.
#include <algorithm>
#include <cstring>

#include "operations.hpp"

namespace elmoe {

namespace {

// Natural logarithm of a positive normal number: FreeBSD's e_log.c without its special cases, as in arithmetic.py.
double log64(double x) {
    int64_t bits;
    std::memcpy(&bits, &x, 8);
    int64_t k = (bits >> 52) - 1023;
    bits = (bits & 0x000FFFFFFFFFFFFF) | 0x3FE0000000000000;
    double m;
    std::memcpy(&m, &bits, 8);  // in [1/2, 1)
    if (m < 0.70710678118654752440)
        m = m + m;
    else
        ++k;
    const double f = m - 1.0, s = f / (2.0 + f), z = s * s;
    double p = 1.479819860511658591e-01;
    for (double c : {1.531383769920937332e-01, 1.818357216161805012e-01, 2.222219843214978396e-01, 2.857142874366239149e-01,
                     3.999999999940941908e-01, 6.666666666666735130e-01})
        p = p * z + c;
    const double half_square = 0.5 * f * f, exponent = static_cast<double>(k);
    return exponent * 6.93147180369123816490e-01 -
           ((half_square - (s * (half_square + z * p) + exponent * 1.90821492927058770002e-10)) - f);
}

uint64_t multiply_high(uint64_t a, uint64_t b, uint64_t& low) {
    const auto product = static_cast<unsigned __int128>(a) * b;
    low = static_cast<uint64_t>(product);
    return static_cast<uint64_t>(product >> 64);
}

// First word of Philox4x64-10 with key (seed, choice) and counter (position, token, 0, 0).
uint64_t philox(uint64_t seed, uint64_t choice, uint64_t position, uint64_t token) {
    uint64_t c0 = position, c1 = token, c2 = 0, c3 = 0;
    for (int round = 0; round < 10; ++round) {
        uint64_t low0, low1;
        const uint64_t high0 = multiply_high(0xD2E7470EE14C6C93, c0, low0);
        const uint64_t high1 = multiply_high(0xCA5A826395121157, c2, low1);
        c0 = high1 ^ c1 ^ seed;
        c1 = low1;
        c2 = high0 ^ c3 ^ choice;
        c3 = low0;
        seed += 0x9E3779B97F4A7C15;
        choice += 0xBB67AE8584CAA73B;
    }
    return c0;
}

// 52 random bits of a token at a position.
uint64_t bits52(const SamplingParameters& p, int64_t position, int64_t token) {
    return philox(p.seed, p.choice, static_cast<uint64_t>(position), static_cast<uint64_t>(token)) >> 12;
}

double gumbel(uint64_t k) {
    const double u = (static_cast<double>(k) + 0.5) * 0x1p-52;
    return -log64(-log64(u));
}

// Whether the noise of k is surely below `gap`. It exceeds a gap of t or more where 1 - u < 1 - exp(-exp(-t)) < e^-t, and
// 2^-floor(t) leaves a factor of 1.8 from t = 2 on: no rounding turns that over. Saves both logarithms of nearly every token.
bool hopeless(uint64_t k, double gap) {
    if (!(gap >= 2)) return false;
    const int whole = gap < 52 ? static_cast<int>(gap) : 52;
    return (uint64_t{1} << 52) - k > (uint64_t{1} << (52 - whole)) + 1;
}

// Sum of float32 values as float64 in 16 lanes and a tree; `keep` may be null.
double lane_sum(const float* values, const uint8_t* keep, int size) {
    double lane[16] = {};
    for (int i = 0; i < size; ++i) lane[i % 16] = lane[i % 16] + (keep && !keep[i] ? 0.0 : static_cast<double>(values[i]));
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] = lane[i] + lane[i + half];
    return lane[0];
}

// Id of the highest value, of equals the lowest.
int highest_of(const float* values, int size) {
    int best = 0;
    for (int i = 1; i < size; ++i)
        if (values[i] > values[best]) best = i;
    return best;
}

}  // namespace

Sampled sample(const float* logits, int vocabulary, const SamplingParameters& p, int64_t position, const float* adjusted) {
    const Kernels& k = kernels();
    int best = highest_of(logits, vocabulary);
    auto* plain = scratch().get<float>(vocabulary);
    k.exp_shifted(logits, logits[best], plain, vocabulary);
    double plain_sum = lane_sum(plain, nullptr, vocabulary);
    auto result = [target = logits, likeliest = logits[best], sum = plain_sum](int token, double confidence) {
        const double distance = static_cast<double>(target[token]) - static_cast<double>(likeliest);
        return Sampled{token, confidence, distance - log64(sum)};
    };
    if (adjusted) {
        logits = adjusted;
        best = highest_of(logits, vocabulary);
        if (p.temperature == 0) {
            k.exp_shifted(logits, logits[best], plain, vocabulary);
            plain_sum = lane_sum(plain, nullptr, vocabulary);
        }
    }
    if (p.temperature == 0) return result(best, static_cast<double>(plain[best]) / plain_sum);

    auto* z = scratch().get<double>(vocabulary);
    auto* rounded = scratch().get<float>(vocabulary);
    auto* weights = scratch().get<float>(vocabulary);
    auto* alive = scratch().get<uint8_t>(vocabulary);
    const double highest = static_cast<double>(logits[best]) / p.temperature;
    for (int i = 0; i < vocabulary; ++i) {
        z[i] = static_cast<double>(logits[i]) / p.temperature - highest;
        rounded[i] = static_cast<float>(z[i]);
        alive[i] = 1;
    }
    k.exp_shifted(rounded, 0.0f, weights, vocabulary);
    auto* order = scratch().get<int32_t>(vocabulary);
    if (p.top_k > 0 || p.top_p < 1)
        for (int i = 0; i < vocabulary; ++i) order[i] = i;
    auto before = [logits](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
    int survivors = vocabulary;
    if (p.top_k > 0 && p.top_k < vocabulary) {
        survivors = static_cast<int>(p.top_k);
        std::nth_element(order, order + survivors - 1, order + vocabulary, before);
        for (int i = survivors; i < vocabulary; ++i) alive[order[i]] = 0;
    }
    const double total = lane_sum(weights, alive, vocabulary);
    if (p.top_p < 1) {
        const double limit = p.top_p * total;
        double reached = 0;
        auto after = [&](int32_t a, int32_t b) { return before(b, a); };
        int32_t* end = order + survivors;  // a heap: only as many are sorted as are kept
        std::make_heap(order, end, after);
        for (; end != order && reached < limit; --end) {
            reached = reached + static_cast<double>(weights[order[0]]);
            std::pop_heap(order, end, after);
        }
        for (int32_t* dead = order; dead != end; ++dead) alive[*dead] = 0;
    }
    // The likeliest token survives every processor; from it on others need to beat the highest so far.
    constexpr double kMostNoise = 37;  // -log(-log u) of the largest u is 36.7
    int token = best;
    double highest_noisy = z[best] + gumbel(bits52(p, position, best));
    for (int i = 0; i < vocabulary; ++i) {
        const double gap = highest_noisy - z[i];
        if (gap > kMostNoise || !alive[i] || i == best) continue;
        if (p.min_p > 0 && !(static_cast<double>(weights[i]) >= p.min_p)) continue;
        const uint64_t k52 = bits52(p, position, i);
        if (hopeless(k52, gap)) continue;
        const double noisy = z[i] + gumbel(k52);
        if (noisy > highest_noisy || (noisy == highest_noisy && i < token)) {
            token = i;
            highest_noisy = noisy;
        }
    }
    return result(token, static_cast<double>(weights[token]) / total);
}

}  // namespace elmoe
