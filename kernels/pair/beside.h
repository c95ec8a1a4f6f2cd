// What is found of one side beside a row's divergence, while the row is in cache.
#pragma once

#include <vector>

#include "complement/complement.h"
#include "pair/layout.h"

namespace kl {

// Writes a row's entropy and surprise where they are asked for, from what the divergence's sweep found.
// `states` are the blocks' where its temperature is the label's too and they are what it came from; otherwise
// empty.
void write_beside(const Layout&, const Beside&, std::int64_t r, const RowResult&,
                  const std::vector<State>& states);

// Whether the states of the row's blocks are worth keeping for it.
bool needs_states(const Layout&, const Beside&, std::int64_t r);

// What the label's -log q adds to the row's gradient.
LabelTerm label_term(const Layout&, const Beside&, std::int64_t r);

}  // namespace kl
