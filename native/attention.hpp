// What the kinds of attention share.
#pragma once

#include "operations.hpp"

namespace elmoe {

// (tokens, rows rounded up to a block) = matrix * rms_norm(x), where x has its rows `step` values apart.
float* normed_projection(const Stack& matrix, const float* norm, float epsilon, const float* x, int64_t step, int tokens);

// The first tokens of runs of at most `most` neighbours of one sequence, and the end.
std::vector<int> runs_of(const Places& places, int most);

// x (tokens, rows) = x + (output * attended + bias); the bias may be null.
void add_output(const Matrix& output, const float* bias, const float* attended, int tokens, float* x);

}  // namespace elmoe
